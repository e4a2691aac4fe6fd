internal import CCurl
internal import DiskStorage

/// One connection's worth of requests by libcurl: used by one thread at a time.
@safe
final class HTTPTransfer: @unchecked Sendable {  // whoever took it from the storage's list has it alone
    /// What a request asks for.
    struct Request {
        var address: String
        /// First and last byte.
        var range: ClosedRange<UInt64>
        /// The state that the file must be in.
        var condition: String?
        /// Whether this server gets what the user gave for it.
        var sendsSecrets: Bool
        var user: String?
        var password: String?
    }

    /// How a request ended.
    struct Outcome {
        /// libcurl's code; 0 is well.
        var code: UInt32
        var status: Int
        var response: HTTPResponse
        /// Where a redirect leads.
        var redirect: String?
        /// Bytes that are in the buffer.
        var received: Int
        /// Whether the answer's header was cut off.
        var isHeaderTooLong: Bool
        /// libcurl's words for a failure.
        var reason: String
    }

    private static let isReady: Bool = ccurl_initialize() == CURLE_OK

    private let handle: UnsafeMutableRawPointer
    private let errorText: UnsafeMutablePointer<CChar>
    private var response = HTTPResponse()
    private var isHeaderTooLong = false
    /// Where the body goes, and which part of the file it must be.
    private var target: IOBuffer?
    private var wanted: ClosedRange<UInt64> = 0...0
    private var received = 0

    init(_ settings: StorageSettings) throws(DiskError) {
        guard Self.isReady, let handle = unsafe curl_easy_init() else {
            throw DiskError(.system, "libcurl cannot be used")
        }
        unsafe self.handle = unsafe handle
        unsafe errorText = .allocate(capacity: Int(CURL_ERROR_SIZE))
        unsafe errorText.initialize(repeating: 0, count: Int(CURL_ERROR_SIZE))
        try set(settings)
        unsafe _ = ccurl_set_pointer(handle, CURLOPT_ERRORBUFFER, errorText)
        unsafe _ = ccurl_set_pointer(handle, CURLOPT_WRITEDATA, Unmanaged.passUnretained(self).toOpaque())
        unsafe _ = ccurl_set_pointer(handle, CURLOPT_HEADERDATA, Unmanaged.passUnretained(self).toOpaque())
        unsafe _ = ccurl_set_receiver(handle, CURLOPT_WRITEFUNCTION) { bytes, size, count, context in
            // The object that runs the request, which lasts longer.
            guard let bytes = unsafe bytes, let context = unsafe context else { return 0 }
            let transfer = unsafe Unmanaged<HTTPTransfer>.fromOpaque(context).takeUnretainedValue()
            return unsafe transfer.takeBody(IOBytes(start: bytes, count: size * count))
        }
        unsafe _ = ccurl_set_receiver(handle, CURLOPT_HEADERFUNCTION) { bytes, size, count, context in
            guard let bytes = unsafe bytes, let context = unsafe context else { return 0 }
            let transfer = unsafe Unmanaged<HTTPTransfer>.fromOpaque(context).takeUnretainedValue()
            return unsafe transfer.takeHeader(IOBytes(start: bytes, count: size * count))
        }
    }

    deinit {
        unsafe curl_easy_cleanup(handle)
        unsafe errorText.deallocate()
    }

    private func set(_ settings: StorageSettings) throws(DiskError) {
        let timeout = settings.timeout
        let numbers: [(CURLoption, Int)] = [
            (CURLOPT_NOSIGNAL, 1), (CURLOPT_FOLLOWLOCATION, 0), (CURLOPT_NOPROGRESS, 1),
            (CURLOPT_SSL_VERIFYPEER, settings.isInsecure ? 0 : 1),
            (CURLOPT_SSL_VERIFYHOST, settings.isInsecure ? 0 : 2),
            (CURLOPT_CONNECTTIMEOUT, timeout), (CURLOPT_LOW_SPEED_LIMIT, 512), (CURLOPT_LOW_SPEED_TIME, timeout),
            // A server that keeps a request alive by a byte now and then does not keep it for good.
            (CURLOPT_TIMEOUT, timeout * 20), (CURLOPT_TCP_KEEPALIVE, 1),
            (CURLOPT_HTTP_VERSION, Int(CURL_HTTP_VERSION_2TLS)), (CURLOPT_BUFFERSIZE, 256 << 10),
        ]
        for (option, value) in numbers where unsafe ccurl_set_number(handle, option, value) != CURLE_OK {
            throw DiskError(.system, "libcurl does not know its option \(option.rawValue)")
        }
        guard unsafe ccurl_set_http_only(handle) == CURLE_OK else {
            throw DiskError(.system, "libcurl has no HTTP or is too old")
        }
        unsafe _ = ccurl_set_text(handle, CURLOPT_USERAGENT, settings.userAgent ?? "vdmount")
        if let file = settings.certificateFile {
            guard unsafe ccurl_set_text(handle, CURLOPT_CAINFO, file) == CURLE_OK else {
                throw DiskError(.invalidArgument, "libcurl takes no file of certificates", image: file)
            }
        }
    }

    /// Asks for a range and fills `buffer`, which has room for it, with what comes of it.
    func run(_ request: Request, _ settings: StorageSettings, into buffer: IOBuffer) -> Outcome {
        response = HTTPResponse()
        isHeaderTooLong = false
        target = buffer
        wanted = request.range
        received = 0
        defer { target = nil }
        unsafe errorText[0] = 0
        unsafe _ = ccurl_set_text(handle, CURLOPT_URL, request.address)
        unsafe _ = ccurl_set_text(
            handle, CURLOPT_RANGE, "\(request.range.lowerBound)-\(request.range.upperBound)")
        unsafe _ = ccurl_set_text(handle, CURLOPT_USERNAME, request.sendsSecrets ? request.user : nil)
        unsafe _ = ccurl_set_text(handle, CURLOPT_PASSWORD, request.sendsSecrets ? request.password : nil)
        // What is compressed has other offsets.
        var lines = ["Accept-Encoding: identity"]
        if let condition = request.condition { lines.append("If-Range: \(condition)") }
        if request.sendsSecrets { lines += settings.headers }
        var list: UnsafeMutablePointer<curl_slist>? = nil
        for line in lines { unsafe list = curl_slist_append(list, line) ?? list }
        unsafe _ = ccurl_set_list(handle, CURLOPT_HTTPHEADER, list)
        let code = unsafe curl_easy_perform(handle)
        unsafe _ = ccurl_set_list(handle, CURLOPT_HTTPHEADER, nil)
        unsafe curl_slist_free_all(list)
        var reason = unsafe String(cString: errorText)
        if reason.isEmpty { reason = unsafe curl_easy_strerror(code).map { unsafe String(cString: $0) } ?? "" }
        return Outcome(
            code: code.rawValue, status: unsafe ccurl_status(handle), response: response,
            redirect: unsafe ccurl_redirect(handle).map { unsafe String(cString: $0) }, received: received,
            isHeaderTooLong: isHeaderTooLong, reason: reason.printable(limit: 300))
    }

    /// Takes bytes of the body; anything but their number ends the request.
    private func takeBody(_ bytes: IOBytes) -> Int {
        // Only the range that was asked for is let in; what an error's page says is not wanted.
        guard let target, unsafe ccurl_status(handle) == 206, !response.isEncoded,
            let range = response.contentRange?.bytes, range.lowerBound == wanted.lowerBound,
            bytes.count <= target.count - received
        else { return 0 }
        target.slice(received, bytes.count).copy(from: bytes)
        received += bytes.count
        return bytes.count
    }

    private func takeHeader(_ bytes: IOBytes) -> Int {
        guard bytes.count <= HTTPResponse.headerLimit, response.take(String(decoding: bytes.array, as: UTF8.self))
        else {
            isHeaderTooLong = true
            return 0
        }
        return bytes.count
    }
}

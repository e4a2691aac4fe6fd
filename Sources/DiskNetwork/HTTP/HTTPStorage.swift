public import DiskStorage
internal import Glibc

/// A file on a web server, read by ranges (HTTP/1.1 and 2; RFC 9110, section 14). Read-only.
///
/// Requests of several threads run at the same time, a connection each, which are kept. Every answer must be of the
/// same state of the file, by its entity tag, time of change and length: a file that changes on the server is an error
/// from then on, never a mixture. What fails in passing is asked for again, a limited number of times.
public final class HTTPStorage: Storage {
    public let traits = StorageTraits()
    public let name: String
    /// What changes whenever the file does; nil where the server tells its length alone.
    public var version: String? { state.text }

    private let address: StorageAddress
    private let settings: StorageSettings
    private let user: String?
    private let password: String?
    /// What the file was when it was opened.
    private let state: HTTPVersion
    private let shared: Monitor<Shared>

    private struct Shared {
        var idle: [HTTPTransfer] = []
        /// Where redirects led.
        var place: String
        /// What all that follows fails with.
        var failure: DiskError?
        var cache: HTTPBlockCache
    }

    /// Reads of so many bytes and more go past the cache.
    private static let directSize = 256 << 10
    /// The most bytes of one request.
    private static let longestRequest = 4 << 20
    private static let mostRedirects = 5
    private static let mostIdle = 32

    /// Opens `http://[user[:password]@]host[:port]/path` or the same with `https`.
    ///
    /// Throws `DiskError.Kind.notFound` if the server has no such file, `DiskError.Kind.refused` if it does not
    /// give it away or its certificate is not to be trusted, and `DiskError.Kind.unsupported` if it knows no ranges.
    public init(_ address: String, settings: StorageSettings = StorageSettings()) throws(DiskError) {
        guard let parsed = StorageAddress(address), parsed.kind == .http else {
            throw DiskError(.invalidArgument, "is no address of a file on a web server")
        }
        self.address = parsed
        self.settings = settings
        name = parsed.shown
        (user, password) = Self.credentials(parsed, settings)
        var plain = "\(parsed.scheme)://\(parsed.authority)\(parsed.path)"
        if let query = parsed.query { plain += "?\(query)" }
        shared = Monitor(Shared(place: plain, cache: HTTPBlockCache(size: settings.cacheSize)))
        let opening = try HTTPOpening(settings, parsed, user: user, password: password, place: plain)
        do throws(DiskError) {
            state = try opening.run()
        } catch {
            throw error.about(parsed.shown)
        }
        let place = opening.place
        let transfer = opening.transfer
        let first = opening.firstBytes
        shared.withLock { shared in
            shared.place = place
            shared.idle.append(transfer)
            if !first.isEmpty {
                _ = shared.cache.beginFetch(0, wanted: 1, blockCount: 1)
                shared.cache.endFetch(0, count: 1, bytes: first)
            }
        }
    }

    private static func credentials(_ address: StorageAddress, _ settings: StorageSettings) -> (String?, String?) {
        guard let information = address.userInformation else { return (settings.user, settings.password) }
        let parts = information.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
        let password = parts.count == 2 ? decoded(parts[1]) : settings.password
        return (decoded(parts[0]), password)
    }

    /// Text with its %XX taken for bytes.
    private static func decoded(_ text: Substring) -> String {
        var bytes: [UInt8] = []
        var rest = Array(text.utf8)[...]
        while let byte = rest.popFirst() {
            if byte == UInt8(ascii: "%"), rest.count >= 2,
                let value = UInt8(String(decoding: rest.prefix(2), as: UTF8.self), radix: 16)
            {
                bytes.append(value)
                rest = rest.dropFirst(2)
            } else {
                bytes.append(byte)
            }
        }
        return String(decoding: bytes, as: UTF8.self)
    }

    // MARK: - Storage

    public func length() -> UInt64 { state.length }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        guard offset < state.length else { return 0 }
        let count = Int(min(UInt64(buffer.count), state.length - offset))
        let target = buffer.slice(0, count)
        do throws(DiskError) {
            if count >= Self.directSize { try fetch(into: target, at: offset) } else { try readCached(target, offset) }
        } catch {
            throw error.about(name).at(offset)
        }
        return count
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        throw readOnly
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        throw readOnly
    }

    public func setLength(_ length: UInt64) throws(DiskError) { throw readOnly }
    public func flush() {}
    public func allocatedBytes() -> UInt64 { state.length }

    public func nextData(from offset: UInt64) -> Range<UInt64>? {
        offset < state.length ? offset..<state.length : nil
    }

    private var readOnly: DiskError {
        DiskError(.readOnly, "a file on a web server cannot be written; an overlay can", image: name)
    }

    // MARK: - Reading

    private func readCached(_ buffer: IOBuffer, _ offset: UInt64) throws(DiskError) {
        let blockSize = HTTPBlockCache.blockSize
        var done = 0
        while done < buffer.count {
            let position = offset + UInt64(done)
            let start = Int(position % blockSize)
            let last = (offset + UInt64(buffer.count) - 1) / blockSize
            let bytes = try block(position / blockSize, last: last)
            let count = min(bytes.count - start, buffer.count - done)
            guard count > 0 else { throw DiskError(.system, "the server sent too little", errno: EIO) }
            try bytes.withIOBytes { (source) throws(DiskError) in
                buffer.slice(done, count).copy(from: source.slice(start, count))
            }
            done += count
        }
    }

    private enum Step {
        case have([UInt8])
        case fetch(UInt64)
    }

    /// A block's bytes; `last` is the last one that the caller will want.
    private func block(_ number: UInt64, last: UInt64) throws(DiskError) -> [UInt8] {
        let blockCount = (state.length - 1) / HTTPBlockCache.blockSize + 1
        let step: Step = try shared.withLock { (shared) throws(DiskError) in
            while true {
                if let failure = shared.failure { throw failure }
                if let bytes = shared.cache.bytes(of: number) { return .have(bytes) }
                guard shared.cache.isFetching(number) else { break }
                self.shared.wait()
            }
            return .fetch(shared.cache.beginFetch(number, wanted: last - number + 1, blockCount: blockCount))
        }
        switch step {
        case .have(let bytes): return bytes
        case .fetch(let count): return try fetchBlocks(number, count)
        }
    }

    private func fetchBlocks(_ number: UInt64, _ count: UInt64) throws(DiskError) -> [UInt8] {
        let start = number * HTTPBlockCache.blockSize
        let length = min(count * HTTPBlockCache.blockSize, state.length - start)
        var bytes = [UInt8](repeating: 0, count: Int(length))
        var failure: DiskError?
        do throws(DiskError) {
            try bytes.withIOBuffer { (buffer) throws(DiskError) in try fetch(into: buffer, at: start) }
        } catch {
            failure = error
        }
        let content = failure == nil ? bytes : []
        shared.withLock { shared in
            shared.cache.endFetch(number, count: count, bytes: content)
            self.shared.changed()
        }
        if let failure { throw failure }
        return Array(bytes.prefix(Int(HTTPBlockCache.blockSize)))
    }

    /// Reads a range from the server.
    private func fetch(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        var done = 0
        while done < buffer.count {
            let piece = buffer.slice(done, min(buffer.count - done, Self.longestRequest))
            try fetchPiece(into: piece, at: offset + UInt64(done))
            done += piece.count
        }
    }

    private func fetchPiece(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        var done = 0
        var failures = 0
        while true {
            let place = try shared.withLock { (shared) throws(DiskError) in
                if let failure = shared.failure { throw failure }
                return shared.place
            }
            let rest = buffer.slice(done, buffer.count - done)
            let first = offset + UInt64(done)
            let outcome = try ask(place, first...first + UInt64(rest.count) - 1, into: rest)
            switch HTTPVerdict(outcome, first...first + UInt64(rest.count) - 1, state) {
            case .complete: return
            case .changed:
                let failure = DiskError(
                    .system, "the file was changed on the server while it was in use: open it anew", image: name,
                    errno: EIO)
                shared.withLock { shared in
                    shared.failure = failure
                    self.shared.changed()
                }
                throw failure
            case .failed(let error):
                // A redirect may have led to a place that is good for some time alone.
                guard place != originalPlace, failures < settings.retries else { throw error }
                failures += 1
                let opening = try HTTPOpening(settings, address, user: user, password: password, place: originalPlace)
                guard try opening.run() == state else { continue }
                shared.withLock { $0.place = opening.place }
            case .passing(let error, let delay):
                // Progress, or else the number of attempts is limited.
                done += outcome.received
                if outcome.received < 64 << 10 { failures += 1 }
                guard failures <= settings.retries else { throw error }
                usleep(UInt32(HTTPVerdict.delay(failures, asked: delay)))
            }
        }
    }

    private var originalPlace: String {
        let plain = "\(address.scheme)://\(address.authority)\(address.path)"
        return address.query.map { "\(plain)?\($0)" } ?? plain
    }

    private func ask(
        _ place: String, _ range: ClosedRange<UInt64>, into buffer: IOBuffer
    ) throws(DiskError) -> HTTPTransfer.Outcome {
        let idle = shared.withLock { $0.idle.popLast() }
        let transfer: HTTPTransfer
        if let idle { transfer = idle } else { transfer = try HTTPTransfer(settings) }
        let request = HTTPTransfer.Request(
            address: place, range: range, condition: state.condition,
            sendsSecrets: StorageAddress(place)?.origin == address.origin, user: user, password: password)
        let outcome = transfer.run(request, settings, into: buffer)
        shared.withLock { if $0.idle.count < Self.mostIdle { $0.idle.append(transfer) } }
        return outcome
    }
}

/// The first request: follows redirects, and learns of what state and length the file is.
private final class HTTPOpening {
    private let settings: StorageSettings
    private let address: StorageAddress
    private let user: String?
    private let password: String?
    /// Where redirects led.
    private(set) var place: String
    let transfer: HTTPTransfer
    /// The file's beginning.
    private(set) var firstBytes: [UInt8] = []

    init(
        _ settings: StorageSettings, _ address: StorageAddress, user: String?, password: String?, place: String
    ) throws(DiskError) {
        self.settings = settings
        self.address = address
        self.user = user
        self.password = password
        self.place = place
        transfer = try HTTPTransfer(settings)
    }

    func run() throws(DiskError) -> HTTPVersion {
        var bytes = [UInt8](repeating: 0, count: Int(HTTPBlockCache.blockSize))
        let range: ClosedRange<UInt64> = 0...HTTPBlockCache.blockSize - 1
        var redirects = 0
        var failures = 0
        while true {
            let parsed = StorageAddress(place)
            let request = HTTPTransfer.Request(
                address: place, range: range, condition: nil, sendsSecrets: parsed?.origin == address.origin,
                user: user, password: password)
            let outcome = try bytes.withIOBuffer { (buffer) throws(DiskError) in
                transfer.run(request, settings, into: buffer)
            }
            if [301, 302, 303, 307, 308].contains(outcome.status), let redirect = outcome.redirect {
                redirects += 1
                try follow(redirect, redirects)
                continue
            }
            switch HTTPVerdict(outcome, range, nil) {
            case .complete, .changed:
                let total = outcome.response.contentRange?.total ?? 0
                firstBytes = Array(bytes.prefix(min(outcome.received, Int(clamping: total))))
                return HTTPVersion(
                    length: total, entityTag: outcome.response.entityTag,
                    lastModified: outcome.response.lastModified)
            case .failed(let error): throw error
            case .passing(let error, let delay):
                // A name that is not known, or a port where nobody listens, is most often a mistake.
                failures += HTTPVerdict.isConnecting(outcome) ? max(1, settings.retries) : 1
                guard failures <= settings.retries else { throw error }
                usleep(UInt32(HTTPVerdict.delay(failures, asked: delay)))
            }
        }
    }

    private func follow(_ redirect: String, _ count: Int) throws(DiskError) {
        guard count <= 5 else { throw DiskError(.refused, "the server redirects more than 5 times") }
        guard let new = StorageAddress(redirect), new.kind == .http,
            new.scheme == "https" || StorageAddress(place)?.scheme == "http"
        else {
            throw DiskError(
                .refused, "the server redirects to where is not gone: only http and https, and not from https to http")
        }
        place = redirect
    }
}

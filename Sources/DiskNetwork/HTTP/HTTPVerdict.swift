internal import CCurl
internal import DiskStorage
internal import Glibc

/// What an answer to a request for a range means.
enum HTTPVerdict {
    /// The range is there, whole, of the state that it should be of.
    case complete
    /// The file is not what it was.
    case changed
    /// Asking again helps nothing.
    case failed(DiskError)
    /// Asking again may help, after so many seconds if the server says so.
    case passing(DiskError, after: Int?)

    /// - Parameter state: What the file was before; nil for the first request, which may also reach beyond its end.
    init(_ outcome: HTTPTransfer.Outcome, _ wanted: ClosedRange<UInt64>, _ state: HTTPVersion?) {
        let response = outcome.response
        guard !outcome.isHeaderTooLong else {
            let limit = HTTPResponse.headerLimit
            self = .failed(DiskError(.unsupported, "the header of the server's answer has more than \(limit) bytes"))
            return
        }
        if let failure = Self.failure(of: outcome) {
            self = failure
            return
        }
        if outcome.status == 416, state == nil, response.contentRange?.total == 0 {
            self = .complete  // an empty file has no ranges
            return
        }
        if outcome.status == 412 || outcome.status == 416, state != nil {
            self = .changed
            return
        }
        guard outcome.status == 206 else {
            self = Self.verdict(status: outcome.status, response, state)
            return
        }
        guard !response.isEncoded else {
            self = .failed(DiskError(.unsupported, "the server sends the file compressed, though asked not to"))
            return
        }
        guard let range = response.contentRange, let total = range.total, let bytes = range.bytes,
            bytes.lowerBound == wanted.lowerBound
        else {
            self = .failed(DiskError(.unsupported, "the server's answer does not say which bytes of how many it holds"))
            return
        }
        if let state,
            HTTPVersion(length: total, entityTag: response.entityTag, lastModified: response.lastModified) != state
        {
            self = .changed
            return
        }
        let expected = min(wanted.upperBound, total - 1) - wanted.lowerBound + 1
        if UInt64(outcome.received) >= expected {
            let isMore = outcome.code == CURLE_WRITE_ERROR.rawValue || UInt64(outcome.received) > expected
            self =
                isMore
                ? .failed(DiskError(.unsupported, "the server sends more bytes than it was asked for")) : .complete
        } else {
            let text = outcome.code == 0 ? "" : ": \(outcome.reason)"
            self = .passing(
                DiskError(
                    .system, "\(outcome.received) of \(expected) bytes came from the server\(text)", errno: EIO),
                after: nil)
        }
    }

    /// Failures of the connection; nil if there is an answer to look at.
    private static func failure(of outcome: HTTPTransfer.Outcome) -> HTTPVerdict? {
        // Bytes that were not wanted ended the request: the header says why.
        if outcome.code == 0 || outcome.code == CURLE_WRITE_ERROR.rawValue { return nil }
        switch CURLcode(rawValue: outcome.code) {
        case CURLE_PEER_FAILED_VERIFICATION, CURLE_SSL_ISSUER_ERROR:
            return .failed(
                DiskError(
                    .refused,
                    "the server's certificate is not to be trusted: \(outcome.reason); certificates of one's own are "
                        + "given with the storage option ca-file"))
        case CURLE_SSL_CACERT_BADFILE, CURLE_SSL_CONNECT_ERROR, CURLE_SSL_CERTPROBLEM, CURLE_URL_MALFORMAT,
            CURLE_UNSUPPORTED_PROTOCOL, CURLE_OUT_OF_MEMORY:
            return .failed(DiskError(.system, outcome.reason, errno: EIO))
        case CURLE_PARTIAL_FILE, CURLE_RECV_ERROR, CURLE_OPERATION_TIMEDOUT, CURLE_HTTP2, CURLE_HTTP2_STREAM:
            // What came before it is good if it is of the right file.
            if outcome.status == 206, outcome.received > 0 { return nil }
            return .passing(DiskError(.system, outcome.reason, errno: EIO), after: nil)
        default: return .passing(DiskError(.system, outcome.reason, errno: EIO), after: nil)
        }
    }

    private static func verdict(status: Int, _ response: HTTPResponse, _ state: HTTPVersion?) -> HTTPVerdict {
        switch status {
        case 200:
            // To If-Range this is the answer of a file that is another one now.
            let isSame = response.entityTag == state?.entityTag && response.lastModified == state?.lastModified
            if let state, state.condition != nil, !isSame { return .changed }
            return .failed(
                DiskError(
                    .unsupported,
                    "the server sends whole files only (no range requests), which an image cannot be used from: "
                        + "download it"))
        case 404, 410: return .failed(DiskError(.notFound, "the server has no such file (status \(status))"))
        case 401, 403, 407:
            return .failed(
                DiskError(
                    .refused,
                    "the server refuses it (status \(status)); storage options are user, password-file and header"))
        case 408, 425, 429, 500, 502, 503, 504:
            return .passing(
                DiskError(.system, "the server cannot answer now (status \(status))", errno: EIO),
                after: response.retryAfter)
        case 300..<400: return .failed(DiskError(.system, "the server redirects again (status \(status))", errno: EIO))
        default: return .failed(DiskError(.system, "the server answers with status \(status)", errno: EIO))
        }
    }

    /// Whether no server was reached.
    static func isConnecting(_ outcome: HTTPTransfer.Outcome) -> Bool {
        [CURLE_COULDNT_CONNECT.rawValue, CURLE_COULDNT_RESOLVE_HOST.rawValue].contains(outcome.code)
    }

    /// Microseconds to wait before the next attempt: longer each time, by chance, so that not all come at once.
    static func delay(_ failures: Int, asked: Int?) -> Int {
        if let asked, asked > 0 { return min(asked, 10) * 1_000_000 }
        let most = 100_000 << min(max(failures - 1, 0), 5)
        return Int.random(in: most / 2...most)
    }
}

/// What the header of an answer says, as far as it matters for ranges of a file (RFC 9110).
struct HTTPResponse {
    /// The most bytes of a header.
    static let headerLimit = 64 << 10

    /// `Content-Range: bytes FIRST-LAST/TOTAL` (RFC 9110, section 14.4).
    struct ContentRange: Equatable {
        /// Nil where the range could not be satisfied.
        var bytes: ClosedRange<UInt64>?
        /// Nil where the server does not say.
        var total: UInt64?
    }

    private(set) var entityTag: String?
    private(set) var lastModified: String?
    private(set) var contentRange: ContentRange?
    private(set) var isEncoded = false
    /// Seconds after which to ask again.
    private(set) var retryAfter: Int?
    private var headerSize = 0

    init() {}

    /// Takes a line of the header, of which there may be several one after the other (100 Continue, a proxy's); false
    /// if it is too long in all.
    mutating func take(_ line: String) -> Bool {
        headerSize += line.utf8.count
        guard headerSize <= Self.headerLimit else { return false }
        if line.hasPrefix("HTTP/") {
            let size = headerSize
            self = HTTPResponse()
            headerSize = size
            return true
        }
        guard let colon = line.firstIndex(of: ":") else { return true }
        let value = Self.trimmed(line[line.index(after: colon)...])
        switch line[..<colon].lowercased() {
        case "etag": entityTag = value
        case "last-modified": lastModified = value
        case "content-range": contentRange = Self.parse(range: value)
        case "content-encoding": isEncoded = isEncoded || value.lowercased() != "identity"
        case "retry-after": retryAfter = Int(value).flatMap { $0 >= 0 ? $0 : nil }
        default: break
        }
        return true
    }

    private static func trimmed(_ text: Substring) -> String {
        let head = text.drop { $0.isWhitespace }
        guard let last = head.lastIndex(where: { !$0.isWhitespace }) else { return "" }
        return String(head[...last])
    }

    static func parse(range text: String) -> ContentRange? {
        let words = text.split(separator: " ", maxSplits: 1)
        guard words.count == 2, words[0].lowercased() == "bytes" else { return nil }
        let parts = words[1].split(separator: "/", omittingEmptySubsequences: false)
        guard parts.count == 2 else { return nil }
        var total: UInt64?
        if parts[1] != "*" {
            // Everything else of this program counts on it that a file's length has 63 bits.
            guard let number = UInt64(parts[1]), number <= UInt64(Int64.max) else { return nil }
            total = number
        }
        if parts[0] == "*" { return ContentRange(bytes: nil, total: total) }
        let ends = parts[0].split(separator: "-", omittingEmptySubsequences: false)
        guard ends.count == 2, let first = UInt64(ends[0]), let last = UInt64(ends[1]), first <= last,
            last < total ?? .max
        else { return nil }
        return ContentRange(bytes: first...last, total: total)
    }
}

/// What tells one state of a file on a server from another.
struct HTTPVersion: Equatable {
    var length: UInt64
    var entityTag: String?
    var lastModified: String?

    /// For `If-Range`, which takes no weak tags (RFC 9110, section 13.1.5).
    var condition: String? {
        if let entityTag, !entityTag.hasPrefix("W/") { return entityTag }
        return lastModified
    }

    /// All in one; nil where only the length is known.
    var text: String? {
        guard entityTag != nil || lastModified != nil else { return nil }
        return "\(length) \(entityTag ?? "") \(lastModified ?? "")"
    }
}

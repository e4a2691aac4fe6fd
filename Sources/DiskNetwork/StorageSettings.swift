public import DiskStorage
internal import Glibc

/// How storages behind a network are reached: typed options with names, as `--storage-option NAME=VALUE` takes them.
public struct StorageSettings: Sendable {
    /// An option.
    public struct Key: Sendable {
        public let name: String
        /// Of which kinds of addresses it is one.
        public let schemes: String
        public let summary: String
    }

    /// All options.
    public static let keys: [Key] = [
        Key(name: "timeout", schemes: "all", summary: "seconds without an answer that count as failure (default: 30)"),
        Key(name: "retries", schemes: "all", summary: "attempts after the first one that failed in passing (5)"),
        Key(name: "user", schemes: "http, iscsi, nbds", summary: "who asks, where the address does not say"),
        Key(name: "password-file", schemes: "http, iscsi", summary: "a file whose first line is the password"),
        Key(name: "ca-file", schemes: "https", summary: "certificates to trust, PEM, instead of the system's"),
        Key(name: "insecure", schemes: "https, nbds", summary: "yes: do not check whose certificate the server has"),
        Key(name: "user-agent", schemes: "http", summary: "how requests call the program"),
        Key(
            name: "header", schemes: "http",
            summary: "a line 'Name: value' for each request to that server (repeatable)"),
        Key(name: "header-file", schemes: "http", summary: "a file with such lines, for what is secret"),
        Key(name: "cache", schemes: "http", summary: "memory for what was read last: bytes, or K, M (default: 8M)"),
        Key(
            name: "tls-certificates", schemes: "nbds", summary: "a folder with ca-cert.pem and the client's certificate"
        ),
        Key(name: "tls-psk-file", schemes: "nbds", summary: "a file with the keys that both sides share"),
        Key(name: "initiator-name", schemes: "iscsi", summary: "by which name the target knows this machine"),
    ]

    /// Seconds without an answer.
    public var timeout = 30
    /// Attempts after the first one.
    public var retries = 5
    public var user: String?
    public var password: String?
    public var certificateFile: String?
    public var isInsecure = false
    public var userAgent: String?
    public var headers: [String] = []
    /// Bytes of memory for what was read last.
    public var cacheSize = 8 << 20
    public var certificateFolder: String?
    public var sharedKeyFile: String?
    public var initiatorName: String?

    public init() {}

    /// The options of a command line, each `NAME=VALUE`; `DiskError.Kind.invalidArgument` for what is none. Files
    /// that hold secrets are read here.
    public init(_ options: [String]) throws(DiskError) {
        for option in options {
            guard let sign = option.firstIndex(of: "=") else {
                throw DiskError(
                    .invalidArgument, "a storage option is NAME=VALUE, not '\(option.printable(limit: 40))'")
            }
            try set(String(option[..<sign]), String(option[option.index(after: sign)...]))
        }
    }

    private mutating func set(_ name: String, _ value: String) throws(DiskError) {
        // The value may be a secret: it is not in messages.
        let invalid = DiskError(.invalidArgument, "the storage option '\(name.printable(limit: 40))' has no such value")
        guard !value.isEmpty, !value.utf8.contains(where: { $0 < 0x20 || $0 == 0x7f }) else { throw invalid }
        switch name {
        case "timeout": timeout = try Self.number(value, 1...3600, invalid)
        case "retries": retries = try Self.number(value, 0...100, invalid)
        case "user": user = value
        case "password-file": password = try Self.lines(of: value).first ?? ""
        case "ca-file": certificateFile = value
        case "insecure":
            guard ["yes", "no"].contains(value) else { throw invalid }
            isInsecure = value == "yes"
        case "user-agent": userAgent = value
        case "header": headers.append(try Self.header(value, invalid))
        case "header-file":
            for line in try Self.lines(of: value) where !line.isEmpty { headers.append(try Self.header(line, invalid)) }
        case "cache": cacheSize = try Self.size(value, invalid)
        case "tls-certificates": certificateFolder = value
        case "tls-psk-file": sharedKeyFile = value
        case "initiator-name": initiatorName = value
        default:
            let known = Self.keys.map(\.name).joined(separator: ", ")
            throw DiskError(
                .invalidArgument, "there is no storage option '\(name.printable(limit: 40))'; known are \(known)")
        }
    }

    private static func number(
        _ text: String, _ range: ClosedRange<Int>, _ invalid: DiskError
    ) throws(DiskError) -> Int {
        guard let number = Int(text), range.contains(number) else { throw invalid }
        return number
    }

    private static func size(_ text: String, _ invalid: DiskError) throws(DiskError) -> Int {
        let unit = text.hasSuffix("M") ? 1 << 20 : text.hasSuffix("K") ? 1 << 10 : 1
        let digits = unit == 1 ? text[...] : text.dropLast()
        guard let number = Int(digits), (0...(1 << 30) / unit).contains(number) else { throw invalid }
        return number * unit
    }

    /// A header that a request may be given: `Name: value`, and none that the requests live by.
    private static func header(_ line: String, _ invalid: DiskError) throws(DiskError) -> String {
        let name = line.prefix { $0 != ":" }.lowercased()
        let isName =
            !name.isEmpty
            && name.utf8.allSatisfy { (0x61...0x7a).contains($0) || (0x30...0x39).contains($0) || $0 == 0x2d }
        guard isName, name.count < line.count, line.utf8.count <= 8192, !line.utf8.contains(where: { $0 < 0x20 }),
            !["range", "if-range", "accept-encoding", "content-length", "transfer-encoding"].contains(name)
        else { throw invalid }
        return line
    }

    /// The lines of a small file.
    private static func lines(of path: String) throws(DiskError) -> [String] {
        let bytes = try FileStorage(path: path, isWritable: false).availableBytes(at: 0, count: 64 << 10, for: .header)
        return String(decoding: bytes, as: UTF8.self).split(omittingEmptySubsequences: false) { $0.isNewline }
            .map(String.init)
    }
}

internal import DiskImage
internal import DiskStorage

/// The kinds of QCOW2 that can be created, by the names they have in commands; the usual one first.
enum QCOW2Variant: String, CaseIterable, Sendable {
    case dynamic
    case metadata
    case fixed

    var summary: String {
        switch self {
        case .dynamic:
            "grows with what is written; options compat=0.10|1.1, refcount-bits=1…64, lazy-refcounts, extended-l2, "
                + "compression-type=zlib|zstd, data-file=NAME, data-file-raw"
        case .metadata: "grows with what is written, with all tables made in advance"
        case .fixed: "takes its whole space at once"
        }
    }

    /// The variant of that name.
    init(named name: String) throws(DiskError) {
        guard let variant = QCOW2Variant(rawValue: name.lowercased()) else {
            let known = Self.allCases.map(\.rawValue).joined(separator: ", ")
            throw DiskError(.invalidArgument, "QCOW2 has no variant '\(name)'; there are \(known)")
        }
        self = variant
    }
}

/// What a creation was asked for beside size and place, checked.
struct QCOW2CreateOptions: Sendable {
    /// 2 (compat 0.10) or 3 (compat 1.1).
    var version: UInt32 = 3
    /// log2 of a refcount's bits.
    var refcountOrder: UInt32 = 4
    var hasLazyRefcounts = false
    var hasExtendedL2 = false
    var compressionType = QCOW2CompressionType.deflate
    /// The name of the external data file.
    var dataFile: String?
    var isDataFileRaw = false

    static let names = [
        "compat", "compression-type", "data-file", "data-file-raw", "extended-l2", "lazy-refcounts", "refcount-bits",
    ]

    init(_ request: CreateRequest, _ variant: QCOW2Variant) throws(DiskError) {
        for (name, value) in request.options.sorted(by: { $0.key < $1.key }) { try set(name, value) }
        let isVersion3 =
            refcountOrder != 4 || hasLazyRefcounts || hasExtendedL2 || compressionType != .deflate || dataFile != nil
        guard version == 3 || !isVersion3 else {
            throw DiskError(.invalidArgument, "version 2 (compat=0.10) has none of the other options")
        }
        guard dataFile != nil || !isDataFileRaw else {
            throw DiskError(.invalidArgument, "data-file-raw=on belongs to data-file=NAME")
        }
        guard !isDataFileRaw || request.parent == nil else {
            throw DiskError(.invalidArgument, "a raw data file is the whole disk: there can be no parent")
        }
        guard variant == .dynamic || request.parent == nil || hasExtendedL2 && variant == .metadata else {
            throw DiskError(
                .invalidArgument,
                "the variant '\(variant.rawValue)' would hide the parent; 'metadata' does not with extended-l2=on")
        }
    }

    private mutating func set(_ name: String, _ value: String) throws(DiskError) {
        switch name {
        case "compat":
            switch value {
            case "0.10", "v2": version = 2
            case "1.1", "v3": version = 3
            default: throw Self.wrong(name, value, "0.10 or 1.1")
            }
        case "refcount-bits":
            guard let bits = UInt32(value), bits.isPowerOfTwo, bits <= 64 else {
                throw Self.wrong(name, value, "1, 2, 4, 8, 16, 32 or 64")
            }
            refcountOrder = UInt32(bits.trailingZeroBitCount)
        case "lazy-refcounts": hasLazyRefcounts = try Self.flag(name, value)
        case "extended-l2": hasExtendedL2 = try Self.flag(name, value)
        case "compression-type":
            switch value {
            case "zlib": compressionType = .deflate
            case "zstd": compressionType = .zstd
            default: throw Self.wrong(name, value, "zlib or zstd")
            }
        case "data-file":
            guard !value.isEmpty, !value.contains("/"), !value.utf8.contains(where: { $0 < 32 }),
                value.utf8.count <= 255
            else { throw Self.wrong(name, value, "the name of a file beside the image") }
            dataFile = value
        case "data-file-raw": isDataFileRaw = try Self.flag(name, value)
        default:
            throw DiskError(
                .invalidArgument,
                "QCOW2 has no option '\(name)'; there are \(Self.names.joined(separator: ", "))")
        }
    }

    private static func flag(_ name: String, _ value: String) throws(DiskError) -> Bool {
        switch value {
        case "on": true
        case "off": false
        default: throw wrong(name, value, "on or off")
        }
    }

    private static func wrong(_ name: String, _ value: String, _ possible: String) -> DiskError {
        DiskError(.invalidArgument, "the option '\(name)' is \(possible), not '\(value)'")
    }
}

internal import DiskStorage

/// Features without which an image cannot be understood (QCOW2, "Header", incompatible_features).
struct QCOW2IncompatibleFeatures: OptionSet, Sendable {
    let rawValue: UInt64
    /// Refcounts may be wrong: they are made anew before the image is written.
    static let dirty = Self(rawValue: 1 << 0)
    /// Something in the image is damaged: it must not be written.
    static let corrupt = Self(rawValue: 1 << 1)
    /// Guest clusters lie in a file of their own.
    static let externalDataFile = Self(rawValue: 1 << 2)
    /// The header says by what clusters are compressed; not deflate.
    static let compressionType = Self(rawValue: 1 << 3)
    /// L2 entries have 128 bits, and tell of subclusters.
    static let extendedL2 = Self(rawValue: 1 << 4)

    static let known: Self = [.dirty, .corrupt, .externalDataFile, .compressionType, .extendedL2]
}

/// Features that who does not know them may ignore.
struct QCOW2CompatibleFeatures: OptionSet, Sendable {
    let rawValue: UInt64
    /// Refcounts may be written late, under cover of the dirty bit.
    static let lazyRefcounts = Self(rawValue: 1 << 0)
}

/// Features whose bits a program that does not know them must clear before it changes the image.
struct QCOW2AutoclearFeatures: OptionSet, Sendable {
    let rawValue: UInt64
    /// The bitmaps of the extension are those of the disk as it is.
    static let bitmaps = Self(rawValue: 1 << 0)
    /// The external data file is the disk, byte by byte, also without this image.
    static let rawExternalData = Self(rawValue: 1 << 1)

    /// What a session that writes keeps up: bitmaps are not among it.
    static let maintained: Self = [.rawExternalData]
}

/// By what clusters are compressed (QCOW2, "Header", compression_type).
enum QCOW2CompressionType: UInt8, Sendable {
    /// Deflate, without zlib's wrapping.
    case deflate = 0
    case zstd = 1

    var name: String { self == .deflate ? "zlib" : "zstd" }
}

/// A line of the feature name table (QCOW2, "Feature name table"): 48 bytes.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 1 | type: 0 incompatible, 1 compatible, 2 autoclear |
/// | 1 | 1 | number of the bit |
/// | 2 | 46 | name, filled up with zeros |
struct QCOW2FeatureName: Sendable {
    static let byteCount = 48
    let type: UInt8
    let bit: UInt8
    let name: String

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        type = try fields.byte(at: 0)
        bit = try fields.byte(at: 1)
        let text = try fields.bytes(at: 2, count: 46).prefix { $0 != 0 }
        name = String(decoding: text, as: UTF8.self)
    }

    init(type: UInt8, bit: UInt8, name: String) {
        self.type = type
        self.bit = bit
        self.name = name
    }

    func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.byte(type, at: 0)
        fields.byte(bit, at: 1)
        fields.bytes(Array(name.utf8.prefix(46)), at: 2)
        return fields.bytes
    }

    /// The names that this library gives the features of the specification.
    static let all: [QCOW2FeatureName] = [
        QCOW2FeatureName(type: 0, bit: 0, name: "dirty bit"),
        QCOW2FeatureName(type: 0, bit: 1, name: "corrupt bit"),
        QCOW2FeatureName(type: 0, bit: 2, name: "external data file"),
        QCOW2FeatureName(type: 0, bit: 3, name: "compression type"),
        QCOW2FeatureName(type: 0, bit: 4, name: "extended L2 entries"),
        QCOW2FeatureName(type: 1, bit: 0, name: "lazy refcounts"),
        QCOW2FeatureName(type: 2, bit: 0, name: "bitmaps"),
        QCOW2FeatureName(type: 2, bit: 1, name: "raw external data"),
    ]
}

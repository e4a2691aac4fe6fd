internal import DiskStorage

/// The header's extensions (QEMU, docs/interop/qcow2, "Header extensions"): each is a type and a length, 32 bits both,
/// and its data, filled up to a multiple of eight bytes. They end with type 0, or where the backing file's name or the
/// second cluster begins.
struct QCOW2HeaderExtensions: Sendable {
    static let end: UInt32 = 0
    static let backingFormat: UInt32 = 0xe279_2aca
    static let featureNameTable: UInt32 = 0x6803_f857
    static let bitmaps: UInt32 = 0x2385_2875
    static let fullDiskEncryption: UInt32 = 0x0537_be77
    static let externalDataFile: UInt32 = 0x4441_5441

    /// What the backing file's format is called.
    var backingFormatName: String?
    /// The external data file's name.
    var dataFileName: String?
    /// The names of features, for messages.
    var featureNames: [QCOW2FeatureName] = []
    /// Where the bitmaps are.
    var bitmapDirectory: QCOW2BitmapDirectory?

    init() {}

    /// Parses them out of the first cluster, from the header's end on.
    init(parsing cluster: [UInt8], _ header: QCOW2Header) throws(DiskError) {
        let fields = FieldReader(cluster)
        var offset = (Int(header.headerLength) + 7) & ~7
        let end = header.backingFileOffset > 0 ? min(cluster.count, Int(header.backingFileOffset)) : cluster.count
        while offset + 8 <= end {
            let type: UInt32 = try fields.bigEndian(at: offset)
            let length = Int(try fields.bigEndian(at: offset + 4, as: UInt32.self))
            if type == Self.end { break }
            guard length <= end - offset - 8 else {
                throw DiskError(
                    .invalidImage, "a header extension is said to have \(length) bytes", offset: UInt64(offset + 4))
            }
            try take(type, try fields.bytes(at: offset + 8, count: length))
            offset += 8 + (length + 7) & ~7
        }
    }

    private mutating func take(_ type: UInt32, _ data: [UInt8]) throws(DiskError) {
        switch type {
        case Self.backingFormat: backingFormatName = String(decoding: data, as: UTF8.self)
        case Self.externalDataFile: dataFileName = String(decoding: data, as: UTF8.self)
        case Self.featureNameTable:
            for start in stride(
                from: 0, through: data.count - QCOW2FeatureName.byteCount, by: QCOW2FeatureName.byteCount)
            {
                featureNames.append(
                    try QCOW2FeatureName(parsing: Array(data[start..<start + QCOW2FeatureName.byteCount])))
            }
        case Self.bitmaps: bitmapDirectory = try QCOW2BitmapDirectory(parsing: data)
        // Others, also those that are not known, say nothing that reading or writing would need; encryption the header
        // tells of.
        default: break
        }
    }

    /// One extension as it is stored.
    static func encode(_ type: UInt32, _ data: [UInt8]) -> [UInt8] {
        var fields = FieldWriter(count: 8 + (data.count + 7) & ~7)
        fields.bigEndian(type, at: 0)
        fields.bigEndian(UInt32(data.count), at: 4)
        fields.bytes(data, at: 8)
        return fields.bytes
    }

    /// What is wrong if the header has an incompatible feature that is not known here.
    func checkFeatures(_ header: QCOW2Header) throws(DiskError) {
        let unknown = header.incompatible.subtracting(.known).rawValue
        guard unknown != 0 else { return }
        let names = (0..<64).filter { unknown & 1 << UInt64($0) != 0 }.map { bit in
            featureNames.first { $0.type == 0 && Int($0.bit) == bit && !$0.name.isEmpty }.map { "'\($0.name)'" }
                ?? "number \(bit)"
        }
        throw DiskError(
            .unsupported,
            "uses \(names.count == 1 ? "a feature that is" : "features that are") not supported: "
                + names.joined(separator: ", "), offset: QCOW2Header.incompatibleOffset)
    }
}

/// Where the bitmaps of an image are (QCOW2, "Bitmaps extension").
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | nb_bitmaps |
/// | 4 | 4 | reserved |
/// | 8 | 8 | bitmap_directory_size: bytes |
/// | 16 | 8 | bitmap_directory_offset |
struct QCOW2BitmapDirectory: Sendable, Equatable {
    /// Bytes of a directory at most: QEMU's limit of 65,535 bitmaps of a kilobyte each.
    static let byteLimit: UInt64 = 64 << 20

    let count: UInt32
    let size: UInt64
    let offset: UInt64

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        count = try fields.bigEndian(at: 0)
        size = try fields.bigEndian(at: 8)
        offset = try fields.bigEndian(at: 16)
    }
}

/// An entry of the bitmap directory (QCOW2, "Bitmap directory"), without its name.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | bitmap_table_offset |
/// | 8 | 4 | bitmap_table_size: entries |
/// | 12 | 4 | flags |
/// | 16 | 1 | type: 1, a dirty bitmap |
/// | 17 | 1 | granularity_bits |
/// | 18 | 2 | name_size |
/// | 20 | 4 | extra_data_size |
struct QCOW2BitmapEntry: Sendable {
    static let fixedByteCount = 24
    /// Entries of a bitmap's table at most (QEMU's limit too).
    static let tableLimit: UInt32 = 0x8000000

    let tableOffset: UInt64
    let tableSize: UInt32
    /// Bytes of the entry with extra data, name and padding.
    let byteCount: UInt64

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        tableOffset = try fields.bigEndian(at: 0)
        tableSize = try fields.bigEndian(at: 8)
        let nameSize: UInt16 = try fields.bigEndian(at: 18)
        let extraSize: UInt32 = try fields.bigEndian(at: 20)
        byteCount = (UInt64(Self.fixedByteCount) + UInt64(nameSize) + UInt64(extraSize) + 7) & ~7
    }
}

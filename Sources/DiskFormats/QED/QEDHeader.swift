internal import DiskStorage

/// The header of a QED image, little endian, in its first cluster ("QED Image File Format Specification", Header).
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | magic: `QED` and a zero byte |
/// | 4 | 4 | cluster_size: bytes, a power of two, 2^12 to 2^26 |
/// | 8 | 4 | table_size: clusters of an L1 or L2 table, a power of two, 1 to 16 |
/// | 12 | 4 | header_size: clusters before the first one for tables and data |
/// | 16 | 8 | features: who does not know a bit may not open the image |
/// | 24 | 8 | compat_features: unknown bits change nothing |
/// | 32 | 8 | autoclear_features: who does not know a bit clears it before the first change |
/// | 40 | 8 | l1_table_offset: bytes, a multiple of the cluster size |
/// | 48 | 8 | image_size: bytes of the disk, a multiple of 512 |
/// | 56 | 4 | backing_filename_offset: bytes; the name lies inside the header's clusters |
/// | 60 | 4 | backing_filename_size: bytes; no zero byte ends it |
struct QEDHeader: Sendable, Equatable {
    static let byteCount = 64
    private static let magic: StaticString = "QED\0"
    static let clusterSizes: ClosedRange<UInt64> = 1 << 12...1 << 26
    static let tableSizes: ClosedRange<UInt64> = 1...16
    /// Bytes of a backing file's name at most; QEMU stops at 1023.
    static let backingFilenameLimit: UInt64 = 4095
    /// Where `features` and `autoclear_features` stand, which change while the image is in use.
    static let featuresOffset: UInt64 = 16
    static let autoclearFeaturesOffset: UInt64 = 32

    /// The bits of `features`.
    struct Features: OptionSet, Sendable {
        let rawValue: UInt64
        /// QED_F_BACKING_FILE: what is not allocated here is in another image.
        static let backingFile = Features(rawValue: 1)
        /// QED_F_NEED_CHECK: a writer did not close the image; the tables must be looked through.
        static let needCheck = Features(rawValue: 2)
        /// QED_F_BACKING_FORMAT_NO_PROBE: the backing file is raw, whatever it looks like.
        static let backingFormatNoProbe = Features(rawValue: 4)
        static let known: Features = [.backingFile, .needCheck, .backingFormatNoProbe]
    }

    var clusterSize: UInt64
    /// In clusters.
    var tableSize: UInt64
    /// In clusters.
    var headerSize: UInt64 = 1
    var features: Features = []
    var compatFeatures: UInt64 = 0
    var autoclearFeatures: UInt64 = 0
    var l1TableOffset: UInt64
    var imageSize: UInt64
    var backingFilenameOffset: UInt64 = 0
    var backingFilenameSize: UInt64 = 0

    /// A new image: the L1 table follows the header's cluster.
    init(clusterSize: UInt64, tableSize: UInt64, imageSize: UInt64) {
        self.clusterSize = clusterSize
        self.tableSize = tableSize
        self.imageSize = imageSize
        l1TableOffset = clusterSize
    }

    // MARK: - Derived

    /// log2 of the cluster size.
    var clusterShift: UInt64 { UInt64(clusterSize.trailingZeroBitCount) }
    /// Bytes of a table: up to 1 GiB.
    var tableBytes: UInt64 { tableSize * clusterSize }
    /// log2 of the entries of a table.
    var tableShift: UInt64 { UInt64(tableBytes.trailingZeroBitCount) - 3 }
    /// How many entries a table has.
    var tableEntries: UInt64 { 1 << tableShift }
    /// Where the first cluster for tables and data may begin.
    var firstClusterOffset: UInt64 { headerSize * clusterSize }
    /// How many clusters the disk has.
    var clusterCount: UInt64 { imageSize.dividedRoundingUp(by: clusterSize) }
    /// Entries of the L1 table that lead to a part of the disk.
    var usedL1Entries: UInt64 { clusterCount.dividedRoundingUp(by: tableEntries) }

    /// The largest disk that an L1 table of this geometry reaches, as far as a disk can be.
    static func imageSizeLimit(clusterSize: UInt64, tableSize: UInt64) -> UInt64 {
        let tableShift = (tableSize * clusterSize / 8).trailingZeroBitCount
        let bits = 2 * tableShift + clusterSize.trailingZeroBitCount
        return bits >= 63 ? UInt64(Int64.max) & ~511 : 1 << UInt64(bits)
    }

    // MARK: - Parsing

    /// Whether a file that begins with these bytes is a QED image.
    static func hasMagic(_ head: [UInt8]) -> Bool { FieldReader(head).matches(magic, at: 0) }

    /// Reads the fields and checks them against each other; against the file's length, `checkPlaces` does.
    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard Self.hasMagic(bytes) else {
            throw DiskError(.invalidImage, "this is no QED image: it does not begin with 'QED' and a zero", offset: 0)
        }
        features = Features(rawValue: try fields.littleEndian(at: 16))
        let unknown = features.subtracting(.known)
        guard unknown.isEmpty else {
            throw DiskError(
                .unsupported,
                "the image needs features that are not known here (bits 0x\(String(unknown.rawValue, radix: 16)))",
                offset: Self.featuresOffset)
        }
        clusterSize = UInt64(try fields.littleEndian(at: 4, as: UInt32.self))
        guard clusterSize.isPowerOfTwo, Self.clusterSizes.contains(clusterSize) else {
            throw DiskError(
                .invalidImage, "a cluster is said to have \(clusterSize) bytes; powers of two from 4K to 64M can be",
                offset: 4)
        }
        tableSize = UInt64(try fields.littleEndian(at: 8, as: UInt32.self))
        guard tableSize.isPowerOfTwo, Self.tableSizes.contains(tableSize) else {
            throw DiskError(
                .invalidImage, "a table is said to have \(tableSize) clusters; powers of two from 1 to 16 can be",
                offset: 8)
        }
        headerSize = UInt64(try fields.littleEndian(at: 12, as: UInt32.self))
        guard headerSize > 0 else {
            throw DiskError(.invalidImage, "the header is said to have no clusters", offset: 12)
        }
        compatFeatures = try fields.littleEndian(at: 24)
        autoclearFeatures = try fields.littleEndian(at: Int(Self.autoclearFeaturesOffset))
        l1TableOffset = try fields.littleEndian(at: 40)
        imageSize = try fields.littleEndian(at: 48)
        let limit = Self.imageSizeLimit(clusterSize: clusterSize, tableSize: tableSize)
        guard imageSize % 512 == 0, imageSize <= limit else {
            throw DiskError(
                .invalidImage,
                "the disk is said to have \(imageSize) bytes; its tables allow multiples of 512 up to \(limit)",
                offset: 48)
        }
        backingFilenameOffset = UInt64(try fields.littleEndian(at: 56, as: UInt32.self))
        backingFilenameSize = UInt64(try fields.littleEndian(at: 60, as: UInt32.self))
        guard features.contains(.backingFile) else { return }
        guard backingFilenameOffset + backingFilenameSize <= firstClusterOffset else {
            throw DiskError(
                .invalidImage,
                "the backing file's name is said to end at byte \(backingFilenameOffset + backingFilenameSize), "
                    + "outside the header's \(firstClusterOffset) bytes", offset: 56)
        }
        guard 1...Self.backingFilenameLimit ~= backingFilenameSize else {
            throw DiskError(
                .invalidImage, "the backing file's name is said to have \(backingFilenameSize) bytes", offset: 60)
        }
    }

    /// Whether a table that begins at `offset` lies in the clusters behind the header, in a file that ends at `end`.
    func isTable(_ offset: UInt64, end: UInt64) -> Bool {
        offset & (clusterSize - 1) == 0 && offset >= firstClusterOffset && end >= tableBytes
            && offset <= end - tableBytes
    }

    /// The L1 table must lie in the file, behind the header.
    func checkPlaces(end: UInt64) throws(DiskError) {
        guard isTable(l1TableOffset, end: end) else {
            throw DiskError(
                .invalidImage,
                "the L1 table is said to begin at byte \(l1TableOffset) and has \(tableBytes) bytes: it must begin a "
                    + "cluster between the header's end at \(firstClusterOffset) and the file's at \(end)", offset: 40)
        }
    }

    // MARK: - Encoding

    /// The 64 bytes.
    func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes(Self.magic.withUTF8Buffer { unsafe Array($0) }, at: 0)
        fields.littleEndian(UInt32(truncatingIfNeeded: clusterSize), at: 4)
        fields.littleEndian(UInt32(truncatingIfNeeded: tableSize), at: 8)
        fields.littleEndian(UInt32(truncatingIfNeeded: headerSize), at: 12)
        fields.littleEndian(features.rawValue, at: 16)
        fields.littleEndian(compatFeatures, at: 24)
        fields.littleEndian(autoclearFeatures, at: 32)
        fields.littleEndian(l1TableOffset, at: 40)
        fields.littleEndian(imageSize, at: 48)
        fields.littleEndian(UInt32(truncatingIfNeeded: backingFilenameOffset), at: 56)
        fields.littleEndian(UInt32(truncatingIfNeeded: backingFilenameSize), at: 60)
        return fields.bytes
    }
}

internal import DiskStorage

/// The header of a QCOW2 image, big endian (QEMU, docs/interop/qcow2, "Header").
///
/// | offset | size | name in the specification |
/// |---|---|---|
/// | 0 | 4 | magic: `QFI\xfb` |
/// | 4 | 4 | version: 2 or 3 |
/// | 8 | 8 | backing_file_offset: of the backing file's name, 0 if there is none |
/// | 16 | 4 | backing_file_size: bytes of that name, 1023 at most |
/// | 20 | 4 | cluster_bits: log2 of a cluster's bytes, 9 to 21 |
/// | 24 | 8 | size: bytes of the disk |
/// | 32 | 4 | crypt_method: 0 none, 1 AES, 2 LUKS |
/// | 36 | 4 | l1_size: entries of the active L1 table |
/// | 40 | 8 | l1_table_offset |
/// | 48 | 8 | refcount_table_offset |
/// | 56 | 4 | refcount_table_clusters |
/// | 60 | 4 | nb_snapshots |
/// | 64 | 8 | snapshots_offset |
/// | 72 | 8 | incompatible_features (version 3, like all that follows) |
/// | 80 | 8 | compatible_features |
/// | 88 | 8 | autoclear_features |
/// | 96 | 4 | refcount_order: log2 of a refcount's bits, 0 to 6 |
/// | 100 | 4 | header_length |
/// | 104 | 1 | compression_type (if header_length says that it is there) |
/// | 105 | 7 | padding |
struct QCOW2Header: Sendable, Equatable {
    /// Bytes of the header of version 2, and of version 3 at least and as it is written here.
    static let byteCount2 = 72
    static let leastByteCount3 = 104
    static let byteCount3 = 112
    /// Where the fields lie that change while an image is written.
    static let refcountTableOffset: UInt64 = 48
    static let incompatibleOffset: UInt64 = 72
    static let autoclearOffset: UInt64 = 88

    /// log2 of a cluster's bytes.
    static let clusterBits: ClosedRange<UInt32> = 9...21
    /// The same with extended L2 entries: 32 subclusters, none smaller than a sector.
    static let leastExtendedClusterBits: UInt32 = 14
    /// Bytes of an L1 table, and of the refcount table, at most (QEMU's limits too).
    static let l1ByteLimit: UInt64 = 32 << 20
    static let refcountTableByteLimit: UInt64 = 8 << 20
    static let snapshotLimit: UInt32 = 65_536
    static let backingNameLimit: UInt32 = 1023

    var version: UInt32 = 3
    var backingFileOffset: UInt64 = 0
    var backingFileSize: UInt32 = 0
    var clusterBits: UInt32 = 16
    var size: UInt64
    var cryptMethod: UInt32 = 0
    var l1Size: UInt32 = 0
    var l1TableOffset: UInt64 = 0
    var refcountTableOffset: UInt64 = 0
    var refcountTableClusters: UInt32 = 0
    var snapshotCount: UInt32 = 0
    var snapshotsOffset: UInt64 = 0
    var incompatible: QCOW2IncompatibleFeatures = []
    var compatible: QCOW2CompatibleFeatures = []
    var autoclear: QCOW2AutoclearFeatures = []
    var refcountOrder: UInt32 = 4
    var headerLength: UInt32 = UInt32(Self.byteCount3)
    var compressionType: QCOW2CompressionType = .deflate

    init(size: UInt64) { self.size = size }
}

// MARK: - What it means

extension QCOW2Header {
    /// Whether a file that begins with these bytes is a QCOW2 image: the magic number, and a version that is not that
    /// of the older format.
    static func hasMagic(_ head: [UInt8]) -> Bool {
        guard head.count >= 8, head.starts(with: [0x51, 0x46, 0x49, 0xfb]) else { return false }
        return Array(head[4..<8]) != [0, 0, 0, 1]
    }

    var clusterSize: UInt64 { 1 << UInt64(clusterBits) }
    var hasExtendedL2: Bool { incompatible.contains(.extendedL2) }
    var hasDataFile: Bool { incompatible.contains(.externalDataFile) }
    /// log2 of the bytes of an L2 entry.
    var l2EntryShift: UInt64 { hasExtendedL2 ? 4 : 3 }
    /// log2 of the entries of an L2 table, which has one cluster.
    var l2Bits: UInt64 { UInt64(clusterBits) - l2EntryShift }
    /// Bytes of the disk that one L2 table covers.
    var l2Coverage: UInt64 { 1 << (l2Bits + UInt64(clusterBits)) }
    /// The entries that an L1 table needs for a disk of so many bytes.
    func l1EntryCount(for size: UInt64) -> UInt64 { size.dividedRoundingUp(by: l2Coverage) }
    var refcountBits: UInt32 { 1 << refcountOrder }
    /// Bytes of the refcount table.
    var refcountTableByteCount: UInt64 { UInt64(refcountTableClusters) << UInt64(clusterBits) }
}

// MARK: - Parsing and encoding

extension QCOW2Header {
    /// Parses a header; every field that is used later is inside its limits afterwards. Whether tables lie inside the
    /// file, the file must say; unknown features are the caller's business, which has their names.
    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard Self.hasMagic(bytes) else {
            throw DiskError(.invalidImage, "this is no QCOW2 image: it does not begin with 'QFI\\xfb'", offset: 0)
        }
        version = try fields.bigEndian(at: 4)
        guard version == 2 || version == 3 else {
            throw DiskError(.unsupported, "the QCOW version is \(version); 1 to 3 are known", offset: 4)
        }
        backingFileOffset = try fields.bigEndian(at: 8)
        backingFileSize = try fields.bigEndian(at: 16)
        clusterBits = try fields.bigEndian(at: 20)
        size = try fields.bigEndian(at: 24)
        cryptMethod = try fields.bigEndian(at: 32)
        l1Size = try fields.bigEndian(at: 36)
        l1TableOffset = try fields.bigEndian(at: 40)
        refcountTableOffset = try fields.bigEndian(at: 48)
        refcountTableClusters = try fields.bigEndian(at: 56)
        snapshotCount = try fields.bigEndian(at: 60)
        snapshotsOffset = try fields.bigEndian(at: 64)
        headerLength = UInt32(Self.byteCount2)
        if version == 3 {
            incompatible = .init(rawValue: try fields.bigEndian(at: 72))
            compatible = .init(rawValue: try fields.bigEndian(at: 80))
            autoclear = .init(rawValue: try fields.bigEndian(at: 88))
            refcountOrder = try fields.bigEndian(at: 96)
            headerLength = try fields.bigEndian(at: 100)
        }
        try checkLayout()
        if headerLength > Self.leastByteCount3 { try parseCompression(fields) }
        try checkEncryption()
        try checkTables()
    }

    private mutating func parseCompression(_ fields: FieldReader) throws(DiskError) {
        let number = try fields.byte(at: Self.leastByteCount3)
        guard let type = QCOW2CompressionType(rawValue: number) else {
            throw DiskError(
                .unsupported, "clusters are compressed by method \(number); 0 (zlib) and 1 (zstd) are known",
                offset: UInt64(Self.leastByteCount3))
        }
        compressionType = type
        guard (type == .deflate) != incompatible.contains(.compressionType) else {
            throw DiskError(
                .invalidImage, "the compression type is \(type.name), and the feature bit for it says otherwise",
                offset: UInt64(Self.leastByteCount3))
        }
    }

    private func checkLayout() throws(DiskError) {
        guard Self.clusterBits.contains(clusterBits) else {
            throw DiskError(
                .invalidImage, "a cluster is said to have 2^\(clusterBits) bytes; 2^9 to 2^21 can be", offset: 20)
        }
        guard !hasExtendedL2 || clusterBits >= Self.leastExtendedClusterBits else {
            throw DiskError(
                .invalidImage, "clusters of 2^\(clusterBits) bytes are too small for extended L2 entries", offset: 20)
        }
        guard refcountOrder <= 6 else {
            throw DiskError(
                .invalidImage, "a refcount is said to have 2^\(refcountOrder) bits; 64 is the most", offset: 96)
        }
        guard version == 2 || headerLength >= Self.leastByteCount3, UInt64(headerLength) <= clusterSize else {
            throw DiskError(.invalidImage, "the header is said to have \(headerLength) bytes", offset: 100)
        }
        guard !incompatible.contains(.compressionType) || headerLength > Self.leastByteCount3 else {
            throw DiskError(
                .invalidImage, "a feature bit says that there is a compression type, and the header ends before it",
                offset: 72)
        }
        if backingFileOffset != 0 {
            guard backingFileSize <= Self.backingNameLimit, backingFileOffset >= UInt64(headerLength),
                backingFileOffset <= clusterSize - min(clusterSize, UInt64(backingFileSize))
            else {
                throw DiskError(
                    .invalidImage,
                    "the backing file's name is said to have \(backingFileSize) bytes at \(backingFileOffset)",
                    offset: 8)
            }
        }
    }

    private func checkEncryption() throws(DiskError) {
        switch cryptMethod {
        case 0: break
        case 1, 2:
            let method = cryptMethod == 1 ? "AES" : "LUKS"
            throw DiskError(
                .unsupported,
                "is encrypted (\(method)), which is not supported; 'qemu-img convert' makes a decrypted copy",
                offset: 32)
        default:
            throw DiskError(.unsupported, "is encrypted by the unknown method \(cryptMethod)", offset: 32)
        }
    }

    private func checkTables() throws(DiskError) {
        guard size <= UInt64(Int64.max) else {
            throw DiskError(.invalidImage, "the disk is said to have \(size) bytes", offset: 24)
        }
        let needed = l1EntryCount(for: size)
        guard UInt64(l1Size) * 8 <= Self.l1ByteLimit, needed <= UInt64(l1Size) else {
            throw DiskError(
                .invalidImage,
                "the L1 table is said to have \(l1Size) entries; the disk needs \(needed), and "
                    + "\(Self.l1ByteLimit / 8) are the limit", offset: 36)
        }
        guard l1Size == 0 || l1TableOffset != 0 else {
            throw DiskError(.invalidImage, "the header does not say where the L1 table is", offset: 40)
        }
        guard refcountTableClusters > 0, refcountTableByteCount <= Self.refcountTableByteLimit else {
            throw DiskError(
                .invalidImage, "the refcount table is said to have \(refcountTableClusters) clusters", offset: 56)
        }
        guard snapshotCount <= Self.snapshotLimit else {
            throw DiskError(
                .invalidImage,
                "the image is said to have \(snapshotCount) snapshots; \(Self.snapshotLimit) are the limit",
                offset: 60)
        }
        let places = [
            (l1TableOffset, "L1 table", UInt64(40)), (refcountTableOffset, "refcount table", 48),
            (snapshotCount > 0 ? snapshotsOffset : 0, "snapshot table", 64),
        ]
        for (place, name, offset) in places where place & (clusterSize - 1) != 0 || place > QCOW2Entry.offsetMask {
            throw DiskError(
                .invalidImage, "the \(name) is said to begin at byte \(place), within a cluster", offset: offset)
        }
    }

    /// The bytes of the header, without extensions.
    func encode() -> [UInt8] {
        var fields = FieldWriter(count: version == 2 ? Self.byteCount2 : Self.byteCount3)
        fields.bytes([0x51, 0x46, 0x49, 0xfb], at: 0)
        fields.bigEndian(version, at: 4)
        fields.bigEndian(backingFileOffset, at: 8)
        fields.bigEndian(backingFileSize, at: 16)
        fields.bigEndian(clusterBits, at: 20)
        fields.bigEndian(size, at: 24)
        fields.bigEndian(cryptMethod, at: 32)
        fields.bigEndian(l1Size, at: 36)
        fields.bigEndian(l1TableOffset, at: 40)
        fields.bigEndian(refcountTableOffset, at: 48)
        fields.bigEndian(refcountTableClusters, at: 56)
        fields.bigEndian(snapshotCount, at: 60)
        fields.bigEndian(snapshotsOffset, at: 64)
        guard version == 3 else { return fields.bytes }
        fields.bigEndian(incompatible.rawValue, at: 72)
        fields.bigEndian(compatible.rawValue, at: 80)
        fields.bigEndian(autoclear.rawValue, at: 88)
        fields.bigEndian(refcountOrder, at: 96)
        fields.bigEndian(UInt32(Self.byteCount3), at: 100)
        fields.byte(compressionType.rawValue, at: Self.leastByteCount3)
        return fields.bytes
    }
}

extension QCOW2Header {
    /// The version and the features alone, of a header that may be of a later kind.
    init(featuresOf bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard Self.hasMagic(bytes) else { throw DiskError(.invalidImage, "this is no QCOW2 image", offset: 0) }
        size = 0
        version = try fields.bigEndian(at: 4)
        guard version == 3 else { return }
        incompatible = .init(rawValue: try fields.bigEndian(at: 72))
        headerLength = try fields.bigEndian(at: 100)
    }
}

internal import DiskStorage

/// The header of an image of QCOW version 1, big endian (QEMU, block/qcow.c, where alone it is described).
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | magic: `QFI\xfb` |
/// | 4 | 4 | version: 1 |
/// | 8 | 8 | backing_file_offset: of the backing file's name, 0 if there is none |
/// | 16 | 4 | backing_file_size: bytes of that name |
/// | 20 | 4 | mtime |
/// | 24 | 8 | size: bytes of the disk |
/// | 32 | 1 | cluster_bits: log2 of a cluster's bytes |
/// | 33 | 1 | l2_bits: log2 of the entries of an L2 table |
/// | 34 | 2 | padding |
/// | 36 | 4 | crypt_method: 0 none, 1 AES |
/// | 40 | 8 | l1_table_offset |
struct QCOWHeader: Sendable, Equatable {
    static let byteCount = 48
    static let clusterBits: ClosedRange<UInt8> = 9...16
    static let l2Bits: ClosedRange<UInt8> = 6...13
    static let backingNameLimit: UInt32 = 1023
    /// Bytes of an L1 table at most: 32 MiB, QEMU's limit for later versions.
    static let l1ByteLimit: UInt64 = 32 << 20

    var backingFileOffset: UInt64
    var backingFileSize: UInt32
    var size: UInt64
    var clusterBits: UInt64
    var l2Bits: UInt64
    var l1TableOffset: UInt64

    /// Whether a file that begins with these bytes is an image of version 1.
    static func hasMagic(_ head: [UInt8]) -> Bool { head.starts(with: [0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 1]) }

    var clusterSize: UInt64 { 1 << clusterBits }
    /// log2 of the bytes of the disk that one L2 table covers.
    var coverageShift: UInt64 { clusterBits + l2Bits }
    /// Entries of the L1 table.
    var l1Count: UInt64 { size.dividedRoundingUp(by: 1 << coverageShift) }
    /// Bytes of an L2 table.
    var l2ByteCount: UInt64 { 8 << l2Bits }

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard Self.hasMagic(bytes) else {
            throw DiskError(.invalidImage, "this is no QCOW image of version 1", offset: 0)
        }
        backingFileOffset = try fields.bigEndian(at: 8)
        backingFileSize = try fields.bigEndian(at: 16)
        size = try fields.bigEndian(at: 24)
        let cluster = try fields.byte(at: 32)
        let l2 = try fields.byte(at: 33)
        clusterBits = UInt64(cluster)
        l2Bits = UInt64(l2)
        let method: UInt32 = try fields.bigEndian(at: 36)
        l1TableOffset = try fields.bigEndian(at: 40)
        guard Self.clusterBits.contains(cluster), Self.l2Bits.contains(l2) else {
            throw DiskError(
                .invalidImage, "clusters are said to have 2^\(cluster) bytes, and L2 tables 2^\(l2) entries", offset: 32
            )
        }
        guard method == 0 else {
            throw DiskError(
                .unsupported,
                "is encrypted (\(method == 1 ? "AES" : "method \(method)")), which is not supported: "
                    + "\'qemu-img convert\' makes a decrypted copy", offset: 36)
        }
        guard size > 1, size <= UInt64(Int64.max), l1Count * 8 <= Self.l1ByteLimit else {
            throw DiskError(.invalidImage, "the disk is said to have \(size) bytes", offset: 24)
        }
        guard l1TableOffset >= UInt64(Self.byteCount), l1TableOffset & 7 == 0, l1TableOffset <= UInt64(Int64.max) else {
            throw DiskError(.invalidImage, "the L1 table is said to begin at byte \(l1TableOffset)", offset: 40)
        }
        guard backingFileOffset == 0 || backingFileSize <= Self.backingNameLimit else {
            throw DiskError(
                .invalidImage, "the backing file's name is said to have \(backingFileSize) bytes", offset: 16)
        }
    }
}

internal import DiskImage
internal import DiskPartitions
internal import DiskStorage

/// The header of a scratch overlay, vdmount's own format: little endian, 4096 bytes.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 16 | magic: `vdmount overlay` and a zero byte |
/// | 16 | 4 | version: 1 |
/// | 20 | 4 | block shift: log2 of a block's bytes, 12 to 21 |
/// | 24 | 8 | virtual size: bytes of the disk |
/// | 32 | 8 | table offset: 4096 |
/// | 40 | 8 | data offset: the first byte that a block may have, a multiple of the block size |
/// | 48 | 16 | UUID of this overlay |
/// | 64 | 4 | parent fields: bit 0 UUID, 1 modification UUID, 2 content ID, 3 length and time |
/// | 68 | 4 | the parent's content ID |
/// | 72 | 16 | the parent's UUID |
/// | 88 | 16 | the parent's modification UUID |
/// | 104 | 8 | the parent's size: bytes of its disk |
/// | 112 | 8 | when the parent's file was changed last: nanoseconds since 1970 |
/// | 120 | 8 | the parent's format, ASCII, filled up with zeros |
/// | 128 | 2 | bytes of the parent's path |
/// | 130 | 3900 | the parent's path, as the file system has it |
/// | 4092 | 4 | CRC-32 of what comes before |
///
/// What is said of the parent may change. Then the new header is written twice, first to the file's end
/// (``OverlayHeader/replace(in:)``).
///
/// The table has a 32-bit entry a block: 0, the image below holds it; 1, it is zeros; else the number of the file's
/// block that holds it. The file is sparse, so that the table takes the space of what was written.
struct OverlayHeader: Sendable, Equatable {
    static let byteCount = 4096
    static let tableOffset: UInt64 = 4096
    static let pathLimit = 3900
    private static let magic: StaticString = "vdmount overlay\0"
    /// log2 of a block's bytes.
    static let blockShifts: ClosedRange<UInt64> = 12...21
    /// Bytes of a disk at most. With the smallest blocks its table has 256 GiB, of which a file system keeps what is
    /// used; what the entries reach is checked when a block is taken.
    static let sizeLimit: UInt64 = 1 << 48

    let virtualSize: UInt64
    let blockShift: UInt64
    let uuid: DiskUUID
    /// As it was when the header was read.
    let parent: Parent

    /// What is recorded of the image below.
    struct Parent: Sendable, Equatable {
        let identity: ImageIdentity
        let size: UInt64
        /// For an image without any identity of its own: when it was changed last.
        let modified: Int64?
        let format: String
        let path: String
    }

    /// The bytes of a block.
    var blockSize: UInt64 { 1 << blockShift }
    /// How many blocks the disk has.
    var blockCount: UInt64 { virtualSize.dividedRoundingUp(by: blockSize) }
    /// Where the first block may lie; never below the second block of the file, so that no number is 0 or 1.
    var dataOffset: UInt64 {
        let end = Self.tableOffset + blockCount * 4
        return max(2 * blockSize, (end + blockSize - 1) & ~(blockSize - 1))
    }

    init(virtualSize: UInt64, blockShift: UInt64, uuid: DiskUUID, parent: Parent) {
        self.virtualSize = virtualSize
        self.blockShift = blockShift
        self.uuid = uuid
        self.parent = parent
    }

    /// Whether a file that begins with these bytes is an overlay.
    static func hasMagic(_ head: [UInt8]) -> Bool { FieldReader(head).matches(magic, at: 0) }

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard Self.hasMagic(bytes) else {
            throw DiskError(.invalidImage, "this is no overlay: it does not begin with 'vdmount overlay'", offset: 0)
        }
        let version: UInt32 = try fields.littleEndian(at: 16)
        guard version == 1 else {
            throw DiskError(.unsupported, "the overlay's version is \(version); 1 is known", offset: 16)
        }
        let body = try fields.bytes(at: 0, count: Self.byteCount - 4)
        let checksum: UInt32 = try fields.littleEndian(at: Self.byteCount - 4)
        guard crc32(body) == checksum else {
            throw DiskError(.invalidImage, "the header's checksum is wrong", offset: UInt64(Self.byteCount - 4))
        }
        blockShift = UInt64(try fields.littleEndian(at: 20, as: UInt32.self))
        guard Self.blockShifts.contains(blockShift) else {
            throw DiskError(
                .invalidImage, "a block is said to have 2^\(blockShift) bytes; 2^12 to 2^21 can be", offset: 20)
        }
        virtualSize = try fields.littleEndian(at: 24)
        guard virtualSize <= Self.sizeLimit, virtualSize % 512 == 0 else {
            throw DiskError(.invalidImage, "the disk is said to have \(virtualSize) bytes", offset: 24)
        }
        uuid = try DiskUUID(bigEndian: fields.bytes(at: 48, count: 16))
        parent = try Self.parent(fields)
        let table: UInt64 = try fields.littleEndian(at: 32)
        let data: UInt64 = try fields.littleEndian(at: 40)
        guard table == Self.tableOffset, data == dataOffset else {
            throw DiskError(
                .invalidImage, "the table is said to lie at \(table), the blocks from \(data) on", offset: 32)
        }
    }

    private static func parent(_ fields: FieldReader) throws(DiskError) -> Parent {
        let present: UInt32 = try fields.littleEndian(at: 64)
        var identity = ImageIdentity()
        if present & 1 != 0 { identity.uuid = try DiskUUID(bigEndian: fields.bytes(at: 72, count: 16)) }
        if present & 2 != 0 { identity.modificationUUID = try DiskUUID(bigEndian: fields.bytes(at: 88, count: 16)) }
        if present & 4 != 0 { identity.contentID = try fields.littleEndian(at: 68) }
        let format = try fields.bytes(at: 120, count: 8).prefix { $0 != 0 }
        let length: UInt16 = try fields.littleEndian(at: 128)
        guard length <= pathLimit else {
            throw DiskError(.invalidImage, "the parent's path is said to have \(length) bytes", offset: 128)
        }
        return Parent(
            identity: identity, size: try fields.littleEndian(at: 104),
            modified: present & 8 != 0 ? try fields.littleEndian(at: 112) : nil,
            format: String(decoding: format, as: UTF8.self),
            path: String(decoding: try fields.bytes(at: 130, count: Int(length)), as: UTF8.self))
    }

    /// The 4096 bytes.
    func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes(Self.magic.withUTF8Buffer { unsafe Array($0) }, at: 0)
        fields.littleEndian(UInt32(1), at: 16)
        fields.littleEndian(UInt32(truncatingIfNeeded: blockShift), at: 20)
        fields.littleEndian(virtualSize, at: 24)
        fields.littleEndian(Self.tableOffset, at: 32)
        fields.littleEndian(dataOffset, at: 40)
        fields.bytes(uuid.bytes, at: 48)
        let identity = parent.identity
        let present = [
            identity.uuid != nil, identity.modificationUUID != nil, identity.contentID != nil, parent.modified != nil,
        ]
        let bits = present.enumerated().reduce(UInt32(0)) { $0 | ($1.element ? 1 << UInt32($1.offset) : 0) }
        fields.littleEndian(bits, at: 64)
        fields.littleEndian(identity.contentID ?? 0, at: 68)
        fields.bytes((identity.uuid ?? .null).bytes, at: 72)
        fields.bytes((identity.modificationUUID ?? .null).bytes, at: 88)
        fields.littleEndian(parent.size, at: 104)
        fields.littleEndian(parent.modified ?? 0, at: 112)
        fields.bytes(parent.format.utf8.prefix(8), at: 120)
        let path = Array(parent.path.utf8.prefix(Self.pathLimit))
        fields.littleEndian(UInt16(path.count), at: 128)
        fields.bytes(path, at: 130)
        fields.littleEndian(crc32(Array(fields.bytes.dropLast(4))), at: Self.byteCount - 4)
        return fields.bytes
    }
}

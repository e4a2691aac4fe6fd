public import DiskStorage

/// The header of the block map: little endian, one block. The bits follow, one a block of the file, the first one in
/// the least significant bit; a set bit says that the block is in use.
///
/// VirtualBox's VCI layout.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | magic: `VBLK` |
/// | 4 | 4 | version: 1 |
/// | 8 | 8 | blocks managed, a multiple of 4096: the bits fill whole blocks |
/// | 16 | 8 | blocks free |
/// | 24 | 8 | blocks used by metadata |
/// | 32 | 8 | blocks used by cached data |
/// | 40 | 472 | reserved: 0 |
public struct VCIBlockMap: Sendable, Equatable {
    static let byteCount = 512
    private static let magic: StaticString = "VBLK"

    /// Blocks that there are bits for.
    public var managed: UInt64
    /// Blocks free: managed = free + metadata + data, always.
    public var free: UInt64
    /// Blocks used by header, map and tree.
    public var metadata: UInt64
    /// Blocks used by cached data.
    public var data: UInt64

    init(managed: UInt64, metadata: UInt64, data: UInt64) {
        self.managed = managed
        self.metadata = metadata
        self.data = data
        free = managed - metadata - data
    }

    /// Takes 512 bytes apart.
    public init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard fields.matches(Self.magic, at: 0) else {
            throw DiskError(.invalidImage, "the block map does not begin with 'VBLK'")
        }
        let version: UInt32 = try fields.littleEndian(at: 4)
        guard version == 1 else {
            throw DiskError(.unsupported, "the block map's version is \(version); 1 is known")
        }
        managed = try fields.littleEndian(at: 8)
        free = try fields.littleEndian(at: 16)
        metadata = try fields.littleEndian(at: 24)
        data = try fields.littleEndian(at: 32)
        let used = try metadata.adding(data, "the number of used blocks")
        guard managed == (try used.adding(free, "the number of blocks")) else {
            throw DiskError(
                .invalidImage,
                "the block map counts \(free) blocks free, \(metadata) of metadata and \(data) of data: "
                    + "not the \(managed) that there are")
        }
    }

    /// The 512 bytes.
    public func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes(Self.magic.withUTF8Buffer { unsafe Array($0) }, at: 0)
        fields.littleEndian(UInt32(1), at: 4)
        fields.littleEndian(managed, at: 8)
        fields.littleEndian(free, at: 16)
        fields.littleEndian(metadata, at: 24)
        fields.littleEndian(data, at: 32)
        return fields.bytes
    }
}

/// The bits of a block map from used ranges, piece by piece: of a large cache they are more than memory should hold.
struct VCIMapBits {
    /// Bytes of a piece, of which the last one may have fewer.
    static let pieceSize = 64 << 10
    /// In ascending order, none over another.
    private let used: [Range<UInt64>]
    private var position = 0

    init(_ used: [Range<UInt64>]) { self.used = used }

    /// The bits of the next `count` bytes, which begin with the one of block `start`; nil if all are zero.
    mutating func next(from start: UInt64, count: Int) -> [UInt8]? {
        let end = start + UInt64(count) * 8
        guard position < used.count, used[position].lowerBound < end else { return nil }
        var bytes = [UInt8](repeating: 0, count: count)
        while position < used.count, used[position].lowerBound < end {
            let range = used[position]
            let part = max(range.lowerBound, start) - start..<min(range.upperBound, end) - start
            Self.set(part, in: &bytes)
            guard range.upperBound <= end else { break }
            position += 1
        }
        return bytes
    }

    private static func set(_ range: Range<UInt64>, in bytes: inout [UInt8]) {
        var bit = range.lowerBound
        while bit < range.upperBound {
            let index = Int(bit / 8)
            if bit % 8 == 0, range.upperBound - bit >= 8 {
                bytes[index] = 0xff
                bit += 8
            } else {
                bytes[index] |= 1 << UInt8(bit % 8)
                bit += 1
            }
        }
    }
}

public import DiskStorage

/// The header of a VCI, a block cache: little endian, packed, 1024 bytes at the beginning of the file.
///
/// VirtualBox's VCI layout, which VirtualBox declares and never finished; `docs/formats-vci.md` has what was decided
/// where it is silent. A *block* is 512 bytes here, and a block's *address* counts blocks from the file's beginning.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | signature: `VCI` and a zero byte |
/// | 4 | 4 | version: 1 |
/// | 8 | 8 | size of the file in blocks, metadata included; its maximum, if it is dynamic |
/// | 16 | 1 | unclean: 1 while it is open, or if it was not closed cleanly |
/// | 17 | 4 | type: 1 dynamic, 2 fixed |
/// | 21 | 8 | address of the tree's root |
/// | 29 | 8 | address of the block map |
/// | 37 | 4 | blocks of the block map, its header included |
/// | 41 | 16 | UUID of the cached image |
/// | 57 | 16 | modification UUID of the cached image when the cache was last valid |
/// | 73 | 951 | reserved: 0 |
public struct VCIHeader: Sendable, Equatable {
    /// Bytes of it in the file.
    public static let byteCount = 1024
    /// How many blocks that is.
    static let blocks: UInt64 = 2
    private static let signature: StaticString = "VCI\0"

    /// Whether the file takes its space at once.
    public enum FileType: UInt32, Sendable {
        /// It grows up to its size.
        case dynamic = 1
        /// All its space is taken when it is made.
        case fixed = 2
    }

    /// The size of the file in blocks; its maximum, if it is dynamic.
    public var size: UInt64
    /// Whether it is open, or was not closed cleanly.
    public var isUnclean: Bool
    public var type: FileType
    /// The address of the tree's root.
    public var rootAddress: UInt64
    /// The address of the block map.
    public var mapAddress: UInt64
    /// Blocks of the block map, its header included.
    public var mapBlocks: UInt32
    /// The cached image's UUID; null: the cache belongs to none yet.
    public var imageUUID: DiskUUID
    /// The cached image's modification UUID.
    public var modificationUUID: DiskUUID

    /// Whether a file that begins with these bytes is a VCI, whatever state it is in.
    public static func hasSignature(_ bytes: [UInt8]) -> Bool { FieldReader(bytes).matches(signature, at: 0) }

    /// Takes 1024 bytes apart.
    public init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard Self.hasSignature(bytes) else { throw DiskError(.invalidImage, "the header does not begin with 'VCI'") }
        let version: UInt32 = try fields.littleEndian(at: 4)
        guard version == 1 else { throw DiskError(.unsupported, "the version is \(version); 1 is known") }
        size = try fields.littleEndian(at: 8)
        // Any other value than the one that says so is no clean end.
        isUnclean = try fields.byte(at: 16) != 0
        let number: UInt32 = try fields.littleEndian(at: 17)
        guard let type = FileType(rawValue: number) else {
            throw DiskError(.unsupported, "the type is \(number); 1 (dynamic) and 2 (fixed) are known")
        }
        self.type = type
        rootAddress = try fields.littleEndian(at: 21)
        mapAddress = try fields.littleEndian(at: 29)
        mapBlocks = try fields.littleEndian(at: 37)
        imageUUID = try DiskUUID(bigEndian: fields.bytes(at: 41, count: 16))
        modificationUUID = try DiskUUID(bigEndian: fields.bytes(at: 57, count: 16))
    }

    /// The header of an empty cache that belongs to no image.
    public init(_ layout: VCILayout, type: FileType) {
        self.type = type
        size = layout.size
        isUnclean = false
        rootAddress = layout.rootAddress
        mapAddress = VCILayout.mapAddress
        mapBlocks = layout.mapBlocks
        (imageUUID, modificationUUID) = (.null, .null)
    }

    /// The 1024 bytes.
    public func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes(Self.signature.withUTF8Buffer { unsafe Array($0) }, at: 0)
        fields.littleEndian(UInt32(1), at: 4)
        fields.littleEndian(size, at: 8)
        fields.byte(isUnclean ? 1 : 0, at: 16)
        fields.littleEndian(type.rawValue, at: 17)
        fields.littleEndian(rootAddress, at: 21)
        fields.littleEndian(mapAddress, at: 29)
        fields.littleEndian(mapBlocks, at: 37)
        fields.bytes(imageUUID.bytes, at: 41)
        fields.bytes(modificationUUID.bytes, at: 57)
        return fields.bytes
    }
}

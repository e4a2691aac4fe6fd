internal import DiskStorage

/// A VDI's pre-header and header: little endian. As VirtualBox's images have them.
///
/// | 1.1 | 0.x | size | name |
/// |---|---|---|---|
/// | 0 | 0 | 64 | text, `<<< … >>>` and a line feed; not looked at |
/// | 64 | 64 | 4 | signature: 0xbeda107f |
/// | 68 | 68 | 4 | version: major in the high half, minor in the low one |
/// | 72 | – | 4 | header size: 384 (0x180), or 400 (0x190) with the BIOS geometry |
/// | 76 | 72 | 4 | image type: 1 dynamic, 2 fixed, 3 undo, 4 differencing |
/// | 80 | 76 | 4 | flags; bit 8: new blocks are filled with zeros |
/// | 84 | 80 | 256 | comment, UTF-8, zero-terminated |
/// | 340 | – | 4 | offset of the block map (0.x: 420) |
/// | 344 | – | 4 | offset of the blocks (0.x: after the map) |
/// | 348 | 336 | 16 | legacy geometry: cylinders, heads, sectors, bytes of a sector |
/// | 364 | – | 4 | unused |
/// | 368 | 352 | 8 | disk size, bytes |
/// | 376 | 360 | 4 | block size, bytes |
/// | 380 | – | 4 | extra bytes before each block's data |
/// | 384 | 364 | 4 | blocks of the disk |
/// | 388 | 368 | 4 | blocks allocated |
/// | 392 | 372 | 16 | UUID of the image |
/// | 408 | 388 | 16 | UUID of its last modification |
/// | 424 | 404 | 16 | UUID of the parent |
/// | 440 | – | 16 | the parent's modification UUID |
/// | 456 | – | 16 | BIOS (logical) geometry; with a header size of 400 |
///
/// UUIDs are stored as Windows stores GUIDs. The block map has a 32-bit entry a block: ``VDIEntry``.
struct VDIHeader: Sendable, Equatable {
    /// What kind of image it is.
    enum ImageType: UInt32, Sendable {
        case dynamic = 1
        case fixed = 2
        /// What differencing images were once called.
        case undo = 3
        case differencing = 4

        var name: String {
            switch self {
            case .dynamic: "dynamic"
            case .fixed: "fixed"
            case .undo: "undo"
            case .differencing: "differencing"
            }
        }
    }

    /// Cylinders, heads and sectors, and the bytes of a sector.
    struct Geometry: Sendable, Equatable {
        var cylinders: UInt32 = 0
        var heads: UInt32 = 0
        var sectors: UInt32 = 0
        var sectorSize: UInt32 = 512

        /// `C/H/S`; nil where nothing is recorded.
        var description: String? { cylinders == 0 ? nil : "\(cylinders)/\(heads)/\(sectors)" }
    }

    static let signature: UInt32 = 0xbeda_107f
    /// The bytes that pre-header and header take at most.
    static let byteCount = 512
    static let version11: UInt32 = 0x0001_0001
    /// The flag by which new blocks are filled with zeros.
    static let zeroExpand: UInt32 = 1 << 8
    /// Bytes of the comment, its terminator included.
    static let commentSize = 256
    /// The most blocks that a new image, or one that grows, may have: QEMU reads no more.
    static let blockLimit: UInt64 = 0x1fff_ff80
    /// Bytes of a block.
    static let blockSizes: ClosedRange<UInt64> = 512...1 << 30
    /// Bytes of pre-header and header at least, in either version.
    private static let minimumSize: (version0: UInt64, version1: UInt64) = (420, 456)

    var version = Self.version11
    /// The bytes of the header without the pre-header; 0 in version 0.x, which does not say.
    var headerSize: UInt32 = 400
    var type: ImageType
    var flags: UInt32 = 0
    var comment = ""
    var mapOffset: UInt64
    var blocksOffset: UInt64
    var geometry = Geometry()
    /// Bytes of the disk, as the image says; see ``VDIHeader/virtualSize``.
    var diskSize: UInt64
    var blockSize: UInt64
    /// Bytes before each block's data.
    var blockExtra: UInt64 = 0
    var blockCount: UInt64
    /// How many blocks the file holds, as the header says: where other programs put the next one.
    var allocatedBlocks: UInt32 = 0
    var uuid: DiskUUID
    var modificationUUID: DiskUUID
    var parentUUID = DiskUUID.null
    var parentModificationUUID = DiskUUID.null
    var biosGeometry: Geometry? = Geometry()

    // MARK: - What follows from the fields

    /// The disk in whole sectors: what is beyond the last one is not shown, as in VirtualBox.
    var virtualSize: UInt64 { diskSize & ~511 }
    var isVersion0: Bool { version >> 16 == 0 }
    /// "1.1".
    var versionName: String { "\(version >> 16).\(version & 0xffff)" }
    /// Where the map ends.
    var mapEnd: UInt64 { mapOffset + blockCount * 4 }
    /// The bytes of the file that a block takes.
    var stride: UInt64 { blockSize + blockExtra }
    /// Whether it lies over another image: what is free here is asked there. An image that is not called differencing
    /// but names a parent is one all the same, unless everything in it is allocated.
    var isChild: Bool {
        type == .differencing || type == .undo || type == .dynamic && !parentUUID.isNull
    }
    /// Where the count of allocated blocks stands.
    var allocatedBlocksOffset: UInt64 { isVersion0 ? 368 : 388 }
    /// Where the disk's size stands.
    var diskSizeOffset: UInt64 { isVersion0 ? 352 : 368 }
    /// Where the modification UUID stands.
    var modificationUUIDOffset: UInt64 { isVersion0 ? 388 : 408 }

    /// Whether a file that begins with these bytes is a VDI.
    static func hasSignature(_ head: [UInt8]) -> Bool {
        (try? FieldReader(head).littleEndian(at: 64, as: UInt32.self)) == signature
    }

    init(
        type: ImageType, mapOffset: UInt64, blocksOffset: UInt64, diskSize: UInt64, blockSize: UInt64,
        blockCount: UInt64, uuid: DiskUUID, modificationUUID: DiskUUID
    ) {
        self.type = type
        self.mapOffset = mapOffset
        self.blocksOffset = blocksOffset
        self.diskSize = diskSize
        self.blockSize = blockSize
        self.blockCount = blockCount
        self.uuid = uuid
        self.modificationUUID = modificationUUID
    }

    // MARK: - Parsing

    /// Reads and checks the header. The file's length is not known here.
    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        let signature: UInt32 = try fields.littleEndian(at: 64)
        guard signature == Self.signature else {
            throw DiskError(.invalidImage, "this is no VDI: the signature is missing", offset: 64)
        }
        version = try fields.littleEndian(at: 68)
        let isVersion0 = version >> 16 == 0
        guard isVersion0 || version == Self.version11 else {
            throw DiskError(
                .unsupported, "the VDI's version is \(version >> 16).\(version & 0xffff); 1.1 and 0.x are known",
                offset: 68)
        }
        // Version 0.x lacks the header size in front, and some fields further back.
        let base = isVersion0 ? 72 : 76
        headerSize = isVersion0 ? 0 : try fields.littleEndian(at: 72)
        let typeNumber: UInt32 = try fields.littleEndian(at: base)
        guard let type = ImageType(rawValue: typeNumber) else {
            throw DiskError(
                .unsupported, "the image type is \(typeNumber); 1 (dynamic) to 4 (differencing) are known",
                offset: UInt64(base))
        }
        self.type = type
        flags = try fields.littleEndian(at: base + 4)
        let text = try fields.bytes(at: base + 8, count: Self.commentSize).prefix { $0 != 0 }
        comment = String(decoding: text, as: UTF8.self)
        let sizes = isVersion0 ? 352 : 368
        diskSize = try fields.littleEndian(at: sizes)
        blockSize = UInt64(try fields.littleEndian(at: sizes + 8, as: UInt32.self))
        blockExtra = isVersion0 ? 0 : UInt64(try fields.littleEndian(at: 380, as: UInt32.self))
        let counts = isVersion0 ? 364 : 384
        blockCount = UInt64(try fields.littleEndian(at: counts, as: UInt32.self))
        allocatedBlocks = try fields.littleEndian(at: counts + 4)
        mapOffset =
            isVersion0 ? Self.minimumSize.version0 : UInt64(try fields.littleEndian(at: 340, as: UInt32.self))
        blocksOffset =
            isVersion0 ? mapOffset + blockCount * 4 : UInt64(try fields.littleEndian(at: 344, as: UInt32.self))
        geometry = try Self.geometry(fields, at: isVersion0 ? 336 : 348)
        let uuids = isVersion0 ? 372 : 392
        uuid = try Self.uuid(fields, at: uuids)
        modificationUUID = try Self.uuid(fields, at: uuids + 16)
        parentUUID = try Self.uuid(fields, at: uuids + 32)
        parentModificationUUID = isVersion0 ? .null : try Self.uuid(fields, at: 440)
        biosGeometry = headerSize >= 400 ? try Self.geometry(fields, at: 456) : nil
        try checkSizes()
        try checkPlaces()
    }

    private static func geometry(_ fields: FieldReader, at offset: Int) throws(DiskError) -> Geometry {
        Geometry(
            cylinders: try fields.littleEndian(at: offset), heads: try fields.littleEndian(at: offset + 4),
            sectors: try fields.littleEndian(at: offset + 8), sectorSize: try fields.littleEndian(at: offset + 12))
    }

    private static func uuid(_ fields: FieldReader, at offset: Int) throws(DiskError) -> DiskUUID {
        try DiskUUID(mixedEndian: fields.bytes(at: offset, count: 16))
    }

    private func checkSizes() throws(DiskError) {
        guard geometry.sectorSize == 512 else {
            throw DiskError(
                .unsupported, "a sector is said to have \(geometry.sectorSize) bytes; 512 are known",
                offset: isVersion0 ? 348 : 360)
        }
        guard blockSize.isPowerOfTwo, Self.blockSizes.contains(blockSize) else {
            throw DiskError(
                .invalidImage, "a block is said to have \(blockSize) bytes; powers of two from 512 to 1 GiB can be",
                offset: isVersion0 ? 360 : 376)
        }
        guard blockExtra == 0 || blockExtra.isPowerOfTwo && blockExtra <= Self.blockSizes.upperBound else {
            throw DiskError(
                .invalidImage, "\(blockExtra) bytes are said to lie before each block; powers of two can be",
                offset: 380)
        }
        guard diskSize <= blockCount * blockSize else {
            throw DiskError(
                .invalidImage,
                "the disk is said to have \(diskSize) bytes, and \(blockCount) blocks of \(blockSize) bytes, which is "
                    + "less", offset: diskSizeOffset)
        }
    }

    private func checkPlaces() throws(DiskError) {
        guard !isVersion0 else { return }
        guard headerSize >= 384, UInt64(headerSize) + 72 <= mapOffset, mapOffset >= Self.minimumSize.version1 else {
            throw DiskError(
                .invalidImage, "the header is said to have \(headerSize) bytes, the block map to lie at \(mapOffset)",
                offset: 72)
        }
        guard mapOffset % 4 == 0 else {
            throw DiskError(.invalidImage, "the block map is said to lie at \(mapOffset), not aligned", offset: 340)
        }
        guard blocksOffset >= mapEnd else {
            throw DiskError(
                .invalidImage,
                "the blocks are said to lie from \(blocksOffset) on, inside the block map, which ends at \(mapEnd)",
                offset: 344)
        }
    }

    // MARK: - Encoding

    /// The 512 bytes of a header of version 1.1.
    func encode() -> [UInt8] {
        precondition(version == Self.version11, "new images have version 1.1")
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes("<<< vdmount VirtualBox Disk Image >>>\n".utf8, at: 0)
        fields.littleEndian(Self.signature, at: 64)
        fields.littleEndian(version, at: 68)
        fields.littleEndian(headerSize, at: 72)
        fields.littleEndian(type.rawValue, at: 76)
        fields.littleEndian(flags, at: 80)
        fields.bytes(comment.utf8.prefix(Self.commentSize - 1), at: 84)
        fields.littleEndian(UInt32(truncatingIfNeeded: mapOffset), at: 340)
        fields.littleEndian(UInt32(truncatingIfNeeded: blocksOffset), at: 344)
        Self.encode(geometry, at: 348, into: &fields)
        fields.littleEndian(diskSize, at: 368)
        fields.littleEndian(UInt32(truncatingIfNeeded: blockSize), at: 376)
        fields.littleEndian(UInt32(truncatingIfNeeded: blockExtra), at: 380)
        fields.littleEndian(UInt32(truncatingIfNeeded: blockCount), at: 384)
        fields.littleEndian(allocatedBlocks, at: 388)
        for (offset, uuid) in [(392, uuid), (408, modificationUUID), (424, parentUUID), (440, parentModificationUUID)] {
            fields.bytes(uuid.mixedEndian, at: offset)
        }
        if let biosGeometry { Self.encode(biosGeometry, at: 456, into: &fields) }
        return fields.bytes
    }

    static func encode(_ geometry: Geometry, at offset: Int, into fields: inout FieldWriter) {
        fields.littleEndian(geometry.cylinders, at: offset)
        fields.littleEndian(geometry.heads, at: offset + 4)
        fields.littleEndian(geometry.sectors, at: offset + 8)
        fields.littleEndian(geometry.sectorSize, at: offset + 12)
    }
}

/// What an entry of the block map says beside the number of a block of the file.
enum VDIEntry {
    /// The parent holds the block; in a base it is zeros.
    static let free = UInt32.max
    /// The block is zeros, whatever lies below.
    static let zero = UInt32.max - 1
    /// Blocks that a file can have: what is left of 32 bits.
    static let limit = UInt64(zero)
}

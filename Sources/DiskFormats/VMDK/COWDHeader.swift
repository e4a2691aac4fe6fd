internal import DiskImage
internal import DiskStorage

/// The header of an ESX sparse extent (vmfsSparse), little endian (VMware Virtual Disk Format 5.0, "ESX Server Sparse
/// Extents"): 2048 bytes.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | magicNumber: `COWD` |
/// | 4 | 4 | version: 1 |
/// | 8 | 4 | flags: 3 |
/// | 12 | 4 | numSectors: of the disk that the extent holds |
/// | 16 | 4 | grainSize: sectors, a power of two up to 2048 |
/// | 20 | 4 | gdOffset: sector of the grain directory |
/// | 24 | 4 | numGDEntries |
/// | 28 | 4 | freeSector: the first that nothing uses |
/// | 32 | 12 | of a base: cylinders, heads, sectors |
/// | 32 | 1024 | of a child: parentFileName; newer ones leave it empty, the descriptor has it |
/// | 1056 | 4 | of a child: parentGeneration |
/// | 1060 | 4 | generation |
/// | 1064 | 60 | name |
/// | 1124 | 512 | description |
/// | 1636 | 4 | savedGeneration |
/// | 1640 | 8 | reserved |
/// | 1648 | 4 | uncleanShutdown |
/// | 1652 | 396 | padding |
///
/// What is not a property here is kept as it was read.
struct COWDHeader: Sendable, Equatable {
    static let byteCount = 2048
    /// Where the number of the first free sector lies.
    static let freeSectorOffset = 28
    /// Where the mark of an unclean shutdown lies.
    static let uncleanOffset = 1648
    /// Entries of a grain table; the header does not say it.
    static let entriesPerTable: UInt32 = 4096
    /// Sectors of a grain table.
    static let tableSectorCount: UInt32 = 32
    /// Sectors of a grain at most: 1 MiB.
    static let grainLimit: UInt32 = 2048

    let capacitySectors: UInt32
    let grainSectors: UInt32
    let directorySector: UInt32
    let directoryEntryCount: UInt32
    var freeSector: UInt32
    var isUnclean: Bool
    private var bytes: [UInt8]

    /// Whether a file that begins with these bytes is an ESX sparse extent.
    static func hasMagic(_ head: [UInt8]) -> Bool { FieldReader(head).matches("COWD", at: 0) }

    /// A new extent's, whose directory follows the header. `geometry` is a base's.
    init(capacitySectors: UInt32, grainSectors: UInt32, freeSector: UInt32, geometry: DiskGeometry?) {
        self.capacitySectors = capacitySectors
        self.grainSectors = grainSectors
        directorySector = UInt32(Self.byteCount / 512)
        directoryEntryCount = Self.directoryEntryCount(capacitySectors, grainSectors)
        self.freeSector = freeSector
        isUnclean = false
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes("COWD".utf8, at: 0)
        fields.littleEndian(UInt32(1), at: 4)
        fields.littleEndian(UInt32(3), at: 8)
        fields.littleEndian(capacitySectors, at: 12)
        fields.littleEndian(grainSectors, at: 16)
        fields.littleEndian(directorySector, at: 20)
        fields.littleEndian(directoryEntryCount, at: 24)
        if let geometry {
            fields.littleEndian(UInt32(clamping: geometry.cylinders), at: 32)
            fields.littleEndian(UInt32(clamping: geometry.heads), at: 36)
            fields.littleEndian(UInt32(clamping: geometry.sectors), at: 40)
        }
        bytes = fields.bytes
    }

    /// Entries that the directory of such an extent needs.
    static func directoryEntryCount(_ capacitySectors: UInt32, _ grainSectors: UInt32) -> UInt32 {
        UInt32(UInt64(capacitySectors).dividedRoundingUp(by: UInt64(grainSectors) * UInt64(entriesPerTable)))
    }

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard fields.matches("COWD", at: 0) else {
            throw DiskError(.invalidImage, "this is no ESX sparse header: it does not begin with 'COWD'", offset: 0)
        }
        self.bytes = try fields.bytes(at: 0, count: Self.byteCount)
        let version: UInt32 = try fields.littleEndian(at: 4)
        guard version == 1 else {
            throw DiskError(.unsupported, "the ESX sparse extent's version is \(version); 1 is known", offset: 4)
        }
        capacitySectors = try fields.littleEndian(at: 12)
        grainSectors = try fields.littleEndian(at: 16)
        directorySector = try fields.littleEndian(at: 20)
        directoryEntryCount = try fields.littleEndian(at: 24)
        freeSector = try fields.littleEndian(at: Self.freeSectorOffset)
        isUnclean = try fields.littleEndian(at: Self.uncleanOffset, as: UInt32.self) != 0
        guard grainSectors.isPowerOfTwo, grainSectors <= Self.grainLimit else {
            throw DiskError(
                .invalidImage,
                "the grain size is \(grainSectors) sectors; it must be a power of two, and \(Self.grainLimit) at most",
                offset: 16)
        }
        guard directorySector >= UInt32(Self.byteCount / 512) else {
            throw DiskError(
                .invalidImage, "the grain directory is said to begin at sector \(directorySector), inside the header",
                offset: 20)
        }
        let needed = Self.directoryEntryCount(capacitySectors, grainSectors)
        guard directoryEntryCount >= needed else {
            throw DiskError(
                .invalidImage,
                "the grain directory has \(directoryEntryCount) entries, \(capacitySectors) sectors need \(needed)",
                offset: 24)
        }
    }

    /// The parent's name in a child's header, or nil if it is empty. Whether the extent is a child's, its descriptor
    /// says: in a base the same bytes are the geometry.
    var parentFileName: [UInt8]? {
        let name = bytes[32..<1056].prefix { $0 != 0 }
        return name.isEmpty ? nil : Array(name)
    }

    static func == (a: COWDHeader, b: COWDHeader) -> Bool { a.encode() == b.encode() }

    /// The 2048 bytes.
    func encode() -> [UInt8] {
        var fields = FieldWriter(bytes)
        fields.littleEndian(freeSector, at: Self.freeSectorOffset)
        fields.littleEndian(UInt32(isUnclean ? 1 : 0), at: Self.uncleanOffset)
        return fields.bytes
    }
}

extension VMDKDescriptor {
    /// A descriptor for an ESX sparse extent that is opened by itself: a disk of that one extent, without a parent.
    init(describing header: COWDHeader) {
        self.init(
            createType: .vmfsSparse,
            extents: [
                VMDKExtentDescription(
                    sectorCount: UInt64(header.capacitySectors), type: .vmfsSparse, fileName: "extent")
            ])
    }
}

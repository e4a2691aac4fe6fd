internal import DiskStorage

/// The header of a hosted sparse extent, little endian (VMware Virtual Disk Format 5.0, "Hosted Sparse Extents").
///
/// | offset | size | name in the specification |
/// |---|---|---|
/// | 0 | 4 | magicNumber: `KDMV` |
/// | 4 | 4 | version: 1, 2 (zeroed-grain entries), 3 (streams) |
/// | 8 | 4 | flags (``Flags``) |
/// | 12 | 8 | capacity: sectors of the disk that the extent holds |
/// | 20 | 8 | grainSize: sectors, a power of two |
/// | 28 | 8 | descriptorOffset: sector of the embedded descriptor, 0 if there is none |
/// | 36 | 8 | descriptorSize: sectors set aside for it |
/// | 44 | 4 | numGTEsPerGT: entries of a grain table, 512 |
/// | 48 | 8 | rgdOffset: sector of the redundant grain directory |
/// | 56 | 8 | gdOffset: sector of the grain directory; all ones: the footer says where |
/// | 64 | 8 | overHead: sectors of metadata before the first grain |
/// | 72 | 1 | uncleanShutdown |
/// | 73 | 4 | singleEndLineChar … doubleEndLineChar2: line feed, space, return, line feed |
/// | 77 | 2 | compressAlgorithm: 0 none, 1 deflate |
/// | 79 | 433 | pad |
struct VMDKSparseHeader: Sendable, Equatable {
    static let byteCount = 512
    /// Where the mark of an unclean shutdown lies.
    static let uncleanOffset = 72

    /// The header's flags.
    struct Flags: OptionSet, Sendable {
        let rawValue: UInt32
        /// The four bytes that a transfer in text mode would change are there.
        static let newlineTest = Flags(rawValue: 1 << 0)
        /// There is a redundant grain directory, with tables of its own.
        static let redundantDirectory = Flags(rawValue: 1 << 1)
        /// A table entry of 1 is a grain of zeros.
        static let zeroGrains = Flags(rawValue: 1 << 2)
        /// Grains are compressed.
        static let compressed = Flags(rawValue: 1 << 16)
        /// Grains and tables are preceded by markers.
        static let markers = Flags(rawValue: 1 << 17)
    }

    var version: UInt32 = 1
    var flags: Flags = [.newlineTest, .redundantDirectory]
    var capacitySectors: UInt64
    var grainSectors: UInt64 = 128
    var descriptorSector: UInt64 = 0
    var descriptorSectorCount: UInt64 = 0
    var entriesPerTable: UInt32 = 512
    var redundantDirectorySector: UInt64 = 0
    var directorySector: UInt64 = 0
    var overheadSectors: UInt64 = 0
    var isUnclean = false
    var compressAlgorithm: UInt16 = 0

    /// A ``directorySector`` that stands for "see the footer" (GD_AT_END).
    static let directoryAtEnd = UInt64.max
    /// Sectors of a grain at most: 64 MiB, of a compressed one 4 MiB, which is held in memory.
    static let grainLimit: UInt64 = 64 << 11
    static let compressedGrainLimit: UInt64 = 4 << 11
    /// Entries of a grain table: at least a sector of them, at most 256 KiB. All known writers have 512; QEMU reads
    /// up to that.
    static let tableEntries: ClosedRange<UInt32> = 128...65_536
    /// Entries of a grain directory at most: 32 MiB of them.
    static let directoryLimit: UInt64 = 8 << 20
    /// Sectors of an embedded descriptor at most: 2 MiB.
    static let descriptorLimit: UInt64 = 4096
    /// Sectors that a 32-bit entry of a grain table reaches: 2 TiB.
    static let fileSectorLimit: UInt64 = 1 << 32

    /// What a transfer in text mode would have changed: LF, space, CR, LF.
    private static let newlineTest: [UInt8] = [0x0a, 0x20, 0x0d, 0x0a]

    init(capacitySectors: UInt64) { self.capacitySectors = capacitySectors }
}

// MARK: - What it means

extension VMDKSparseHeader {
    /// Whether a file that begins with these bytes is a hosted sparse extent.
    static func hasMagic(_ head: [UInt8]) -> Bool { FieldReader(head).matches("KDMV", at: 0) }

    /// Whether the file holds a descriptor and nothing else.
    var isDescriptorOnly: Bool { capacitySectors == 0 }
    /// Whether the real header is the footer.
    var directoryIsAtEnd: Bool { directorySector == Self.directoryAtEnd }
    var usesRedundantDirectory: Bool { flags.contains(.redundantDirectory) }
    var hasZeroGrains: Bool { flags.contains(.zeroGrains) && version >= 2 }
    var isCompressed: Bool { compressAlgorithm != 0 }
    var hasMarkers: Bool { flags.contains(.markers) }
    /// Sectors of the disk that a grain table covers.
    var tableCoverage: UInt64 { grainSectors * UInt64(entriesPerTable) }
    /// Entries of the grain directory.
    var directoryEntryCount: UInt64 { capacitySectors.dividedRoundingUp(by: tableCoverage) }
    /// Sectors of the grain directory.
    var directorySectorCount: UInt64 { directoryEntryCount.dividedRoundingUp(by: 128) }
    /// Sectors of a grain table.
    var tableSectorCount: UInt64 { UInt64(entriesPerTable).dividedRoundingUp(by: 128) }
}

// MARK: - Parsing and encoding

extension VMDKSparseHeader {
    /// Parses a header or footer; every field that is used later is inside its limits afterwards. Whether the tables
    /// lie inside the file, the file must say.
    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard fields.matches("KDMV", at: 0) else {
            throw DiskError(.invalidImage, "this is no sparse extent header: it does not begin with 'KDMV'", offset: 0)
        }
        version = try fields.littleEndian(at: 4)
        flags = Flags(rawValue: try fields.littleEndian(at: 8))
        capacitySectors = try fields.littleEndian(at: 12)
        grainSectors = try fields.littleEndian(at: 20)
        descriptorSector = try fields.littleEndian(at: 28)
        descriptorSectorCount = try fields.littleEndian(at: 36)
        entriesPerTable = try fields.littleEndian(at: 44)
        redundantDirectorySector = try fields.littleEndian(at: 48)
        directorySector = try fields.littleEndian(at: 56)
        overheadSectors = try fields.littleEndian(at: 64)
        isUnclean = try fields.byte(at: Self.uncleanOffset) != 0
        compressAlgorithm = try fields.littleEndian(at: 77)
        try checkKind(newlineTest: fields.bytes(at: 73, count: 4))
        try checkPlaces()
        if !isDescriptorOnly { try checkSizes() }
    }

    private func checkKind(newlineTest: [UInt8]) throws(DiskError) {
        guard (1...3).contains(version) else {
            throw DiskError(.unsupported, "the sparse extent's version is \(version); 1 to 3 are known", offset: 4)
        }
        if flags.contains(.newlineTest), newlineTest != Self.newlineTest {
            let hasLineEnd = newlineTest.contains { $0 == 0x0a || $0 == 0x0d }
            throw DiskError(
                .invalidImage,
                hasLineEnd
                    ? "the file was damaged by a transfer in text mode, which changes line ends: copy it again in "
                        + "binary mode"
                    : "the header is damaged: the bytes that would tell of a transfer in text mode are missing",
                offset: 73)
        }
        guard compressAlgorithm <= 1 else {
            throw DiskError(
                .unsupported, "grains are compressed by algorithm \(compressAlgorithm); 1 (deflate) is known",
                offset: 77)
        }
        guard isCompressed || !flags.contains(.compressed) else {
            throw DiskError(
                .invalidImage, "the flags say that grains are compressed, the algorithm is 0 (none)", offset: 77)
        }
    }

    /// Sectors of the file are offsets in bytes that fit into 63 bits.
    private func checkPlaces() throws(DiskError) {
        let places: [(UInt64, String, UInt64)] = [
            (descriptorSector, "descriptor", 28), (directoryIsAtEnd ? 0 : directorySector, "grain directory", 56),
            (usesRedundantDirectory ? redundantDirectorySector : 0, "redundant grain directory", 48),
            (overheadSectors, "first grain", 64),
        ]
        for (sector, name, offset) in places where sector > VMDKExtentDescription.sectorLimit {
            throw DiskError(.invalidImage, "the \(name) is said to begin at sector \(sector)", offset: offset)
        }
        if descriptorSector != 0, descriptorSectorCount > Self.descriptorLimit {
            throw DiskError(
                .invalidImage,
                "the embedded descriptor is said to have \(descriptorSectorCount) sectors; "
                    + "\(Self.descriptorLimit) are the limit", offset: 36)
        }
    }

    private func checkSizes() throws(DiskError) {
        guard capacitySectors <= VMDKExtentDescription.sectorLimit else {
            throw DiskError(
                .invalidImage,
                "the extent is said to have \(capacitySectors) sectors; \(VMDKExtentDescription.sectorLimit) are "
                    + "the limit",
                offset: 12)
        }
        let limit = isCompressed ? Self.compressedGrainLimit : Self.grainLimit
        guard grainSectors.isPowerOfTwo, grainSectors <= limit else {
            throw DiskError(
                .invalidImage,
                "the grain size is \(grainSectors) sectors; it must be a power of two, and \(limit) at most", offset: 20
            )
        }
        guard entriesPerTable.isPowerOfTwo, Self.tableEntries.contains(entriesPerTable) else {
            throw DiskError(
                .invalidImage,
                "a grain table is said to have \(entriesPerTable) entries; 512 is usual, a power of two from "
                    + "\(Self.tableEntries.lowerBound) to \(Self.tableEntries.upperBound) is possible", offset: 44)
        }
        guard directoryEntryCount <= Self.directoryLimit else {
            throw DiskError(
                .invalidImage,
                "the grain directory would have \(directoryEntryCount) entries; \(Self.directoryLimit) are the limit",
                offset: 12)
        }
        guard directorySector != 0 else {
            throw DiskError(.invalidImage, "the header does not say where the grain directory is", offset: 56)
        }
        guard !usesRedundantDirectory || redundantDirectorySector != 0 else {
            throw DiskError(.invalidImage, "the header does not say where the redundant grain directory is", offset: 48)
        }
    }

    /// The 512 bytes.
    func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes("KDMV".utf8, at: 0)
        fields.littleEndian(version, at: 4)
        fields.littleEndian(flags.rawValue, at: 8)
        fields.littleEndian(capacitySectors, at: 12)
        fields.littleEndian(grainSectors, at: 20)
        fields.littleEndian(descriptorSector, at: 28)
        fields.littleEndian(descriptorSectorCount, at: 36)
        fields.littleEndian(entriesPerTable, at: 44)
        fields.littleEndian(redundantDirectorySector, at: 48)
        fields.littleEndian(directorySector, at: 56)
        fields.littleEndian(overheadSectors, at: 64)
        fields.byte(isUnclean ? 1 : 0, at: Self.uncleanOffset)
        fields.bytes(Self.newlineTest, at: 73)
        fields.littleEndian(compressAlgorithm, at: 77)
        return fields.bytes
    }
}

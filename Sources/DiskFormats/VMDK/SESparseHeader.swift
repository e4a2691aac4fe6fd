internal import DiskStorage

/// The constant header of an seSparse extent, little endian. There is no public specification; this is what QEMU's
/// `block/vmdk.c` reads and demands (docs/formats-vmdk.md).
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | magic: 0xcafebabe |
/// | 8 | 8 | version: 0x0000000200000001 |
/// | 16 | 8 | capacity: sectors of the disk that the extent holds |
/// | 24 | 8 | grain size: sectors, 8 |
/// | 32 | 8 | grain table size: sectors, 64 |
/// | 40 | 8 | flags: 0 |
/// | 48 | 32 | reserved: 0 |
/// | 80 | 16 | sector and sectors of the volatile header |
/// | 96 | 16 | of the journal's header |
/// | 112 | 16 | of the journal |
/// | 128 | 16 | of the grain directory |
/// | 144 | 16 | of the grain tables |
/// | 160 | 16 | of the free bitmap |
/// | 176 | 16 | of the back map |
/// | 192 | 16 | of the grains |
/// | 208 | 304 | padding: 0 |
struct SESparseHeader: Sendable, Equatable {
    static let byteCount = 512
    private static let magic: UInt64 = 0xcafe_babe
    private static let version: UInt64 = 0x2_0000_0001
    /// Sectors of such a disk at most: ESX's limit of 64 TiB.
    static let capacityLimit: UInt64 = 1 << 37

    var capacitySectors: UInt64
    var grainSectors: UInt64
    var tableSectors: UInt64
    var volatileHeaderSector: UInt64
    var directorySector: UInt64
    var directorySectorCount: UInt64
    /// Where the grain tables lie, one after the other; directory entries are their numbers.
    var tablesSector: UInt64
    var tablesSectorCount: UInt64
    /// Where the grains lie, one after the other; table entries hold their numbers.
    var grainsSector: UInt64

    /// Whether a file that begins with these bytes is an seSparse extent.
    static func hasMagic(_ head: [UInt8]) -> Bool {
        guard let found = try? FieldReader(head).littleEndian(at: 0, as: UInt64.self) else { return false }
        return found == magic
    }

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard try fields.littleEndian(at: 0) == Self.magic else {
            throw DiskError(.invalidImage, "this is no seSparse header: its magic number is another", offset: 0)
        }
        let version: UInt64 = try fields.littleEndian(at: 8)
        guard version == Self.version else {
            throw DiskError(
                .unsupported, "the seSparse version is 0x\(String(version, radix: 16)); 0x200000001 is known", offset: 8
            )
        }
        capacitySectors = try fields.littleEndian(at: 16)
        grainSectors = try fields.littleEndian(at: 24)
        tableSectors = try fields.littleEndian(at: 32)
        volatileHeaderSector = try fields.littleEndian(at: 80)
        directorySector = try fields.littleEndian(at: 128)
        directorySectorCount = try fields.littleEndian(at: 136)
        tablesSector = try fields.littleEndian(at: 144)
        tablesSectorCount = try fields.littleEndian(at: 152)
        grainsSector = try fields.littleEndian(at: 192)
        guard try fields.bytes(at: 40, count: 40).allSatisfy({ $0 == 0 }) else {
            throw DiskError(.unsupported, "the seSparse header has flags, of which none is known", offset: 40)
        }
        guard try fields.bytes(at: 208, count: 304).allSatisfy({ $0 == 0 }) else {
            throw DiskError(.unsupported, "the seSparse header has more fields than are known", offset: 208)
        }
        try checkSizes()
    }

    private func checkSizes() throws(DiskError) {
        guard grainSectors == 8, tableSectors == 64 else {
            throw DiskError(
                .unsupported,
                "the seSparse grains have \(grainSectors) sectors and its tables \(tableSectors); 8 and 64 are known",
                offset: 24)
        }
        guard capacitySectors <= Self.capacityLimit else {
            throw DiskError(
                .invalidImage,
                "the extent is said to have \(capacitySectors) sectors; \(Self.capacityLimit) are the limit", offset: 16
            )
        }
        let places: [(UInt64, String, UInt64)] = [
            (volatileHeaderSector, "volatile header", 80), (directorySector, "grain directory", 128),
            (tablesSector, "grain tables", 144), (grainsSector, "grains", 192),
        ]
        for (sector, name, offset) in places {
            guard sector > 0, sector <= VMDKExtentDescription.sectorLimit else {
                throw DiskError(.invalidImage, "the \(name) are said to begin at sector \(sector)", offset: offset)
            }
        }
        // A directory entry of 8 bytes for each 4096 grains of 8 sectors.
        let needed = capacitySectors.dividedRoundingUp(by: 4096 * 8).dividedRoundingUp(by: 64)
        guard directorySectorCount >= needed else {
            throw DiskError(
                .invalidImage, "the grain directory has \(directorySectorCount) sectors, the disk needs \(needed)",
                offset: 136)
        }
    }

    /// Reads and checks both headers of an extent; one with a journal to replay is refused.
    init(reading storage: any Storage) throws(DiskError) {
        try self.init(
            parsing: try storage.bytes(at: 0, count: Self.byteCount, for: .header, "the seSparse header"))
        let place = volatileHeaderSector * 512
        let bytes = try storage.bytes(
            at: place, count: SESparseVolatileHeader.byteCount, for: .header, "the seSparse volatile header")
        do throws(DiskError) {
            try SESparseVolatileHeader(parsing: bytes).checkClean()
        } catch {
            throw DiskError(error.kind, error.message, image: error.image, offset: place + (error.offset ?? 0))
        }
    }
}

/// The header of an seSparse extent that changes with it, little endian.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | magic: 0xcafecafe |
/// | 8 | 8 | number of free grain tables |
/// | 16 | 8 | next transaction's number |
/// | 24 | 8 | replay journal: not 0 if the journal has what the tables lack |
/// | 32 | 480 | padding: 0 |
struct SESparseVolatileHeader: Sendable, Equatable {
    static let byteCount = 512
    private static let magic: UInt64 = 0xcafe_cafe

    let needsReplay: Bool

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard try fields.littleEndian(at: 0) == Self.magic else {
            throw DiskError(
                .invalidImage, "this is no seSparse volatile header: its magic number is another", offset: 0)
        }
        needsReplay = try fields.littleEndian(at: 24, as: UInt64.self) != 0
        guard try fields.bytes(at: 32, count: 480).allSatisfy({ $0 == 0 }) else {
            throw DiskError(.unsupported, "the seSparse volatile header has more fields than are known", offset: 32)
        }
    }

    /// Refuses an extent whose tables are not up to date: how its journal is replayed is not published.
    func checkClean() throws(DiskError) {
        guard !needsReplay else {
            throw DiskError(
                .needsRepair,
                "the seSparse extent was not closed cleanly, and only ESX can replay its journal: "
                    + "open and close the virtual machine's disk there, then copy it again", offset: 24)
        }
    }
}

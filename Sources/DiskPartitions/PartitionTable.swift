public import DiskStorage

/// A partition of a disk: where it lies and what its table says about it.
public struct Partition: Sendable, Equatable {
    /// As Linux numbers them: the place in the table from 1 on; logical partitions of a master boot record from 5 on.
    public let number: Int
    /// Where it begins, in bytes.
    public let offset: UInt64
    /// How long it is, in bytes; not zero, and inside the disk.
    public let length: UInt64
    /// The type: a GUID in lower case, or of a master boot record `0x83`.
    public let type: String
    /// The type in words, of the common ones.
    public let typeName: String?
    /// The name that the GUID partition table has for it.
    public let name: String?
    /// What Linux calls PARTUUID: the partition's GUID in lower case, or the disk signature and the number,
    /// `12345678-01`. A master boot record without signature has none.
    public let uuid: String?
    /// Whether it is marked to be booted from (by a BIOS).
    public let isBootable: Bool
    /// The attributes of the GUID partition table (UEFI 2.10, table 5-8), or 0.
    public let attributes: UInt64

    /// The bytes of the disk that it takes.
    public var range: Range<UInt64> { offset..<offset + length }
}

/// The partitions of a disk.
///
/// Read are the GUID partition table (UEFI Specification 2.10, chapter 5) and the PC's master boot record with its
/// chain of logical partitions, on disks of 512- and of 4096-byte sectors. How it is told which:
///
/// 1. A valid boot record without an entry of type 0xee, but with others, is a master boot record, whatever is left of
///    an older GUID partition table.
/// 2. An entry of type 0xee, alone or beside others ("hybrid"), announces a GUID partition table: its header in sector
///    1 of 512 bytes, of 4096 bytes, and, if neither is good, its copy in the last sector of 512 or of 4096 bytes.
/// 3. Without any boot record, or with one that has no entries, a good GUID partition table counts too, unless the disk
///    begins with a file system: then the table is a remainder.
/// 4. Boot records do not say of which size their sectors are. They are taken to be of 512 bytes, unless nothing that
///    is known (a file system, a boot record of logical partitions) lies where the partitions begin then, and something
///    does if they are of 4096 bytes.
/// 5. The boot sector of a file system ends in the same signature as a boot record. It is none if a boot indicator is
///    neither 0 nor 0x80; and if the disk begins with a file system, neither if no entry makes sense.
///
/// A table that contradicts itself or the disk has no partitions, and ``warning`` says what is wrong: partitions that
/// overlap each other or the table, reach beyond the disk, or form a circle. Half a table is worse than none.
public struct PartitionTable: Sendable, Equatable {
    /// The kinds of tables.
    public enum Kind: String, Sendable {
        /// There is none.
        case none
        /// A master boot record.
        case mbr
        /// A GUID partition table.
        case gpt
    }

    /// What kind of table there is; also of one that is damaged.
    public let kind: Kind
    /// Bytes of a sector, as the table counts them; 512 if there is none.
    public let sectorSize: Int
    /// The disk's GUID in lower case, or the signature of its master boot record as `0x12345678`, if there is one.
    public let diskIdentifier: String?
    /// In ascending order of their numbers. An extended partition, which only holds others, is not among them.
    public let partitions: [Partition]
    /// Where the table lies, in bytes: ascending, disjoint, none inside a partition. When anything is written there,
    /// or in the first and the last 32 KiB of the disk, the table may have become another one.
    public let areas: [Range<UInt64>]
    /// What is wrong with the table, if anything.
    public let warning: String?

    /// Entries of a GUID partition table take at most these bytes; 16 KiB are usual.
    static let entriesLimit = 1 << 20
    /// Logical partitions at most.
    static let logicalLimit = 128

    init(
        _ kind: Kind, sectorSize: Int = 512, diskIdentifier: String? = nil, partitions: [Partition] = [],
        areas: [Range<UInt64>] = [], warning: String? = nil
    ) {
        self.kind = kind
        self.sectorSize = sectorSize
        self.diskIdentifier = diskIdentifier
        self.partitions = partitions
        self.areas = areas
        self.warning = warning
    }

    /// Reads the table of `source`. An error means that the source cannot be read; a bad table is no error.
    public static func read(from source: some SectorSource) throws(DiskError) -> PartitionTable {
        let record = try MasterBootRecord(reading: source, at: 0)
        guard let record, record.isPlausible else {
            return strayGUIDTable(in: source) ?? PartitionTable(.none)
        }
        if record.isProtective {
            return GUIDTableReader(source).read()
        }
        if record.isEmpty {
            if let table = strayGUIDTable(in: source) { return table }
            if FileSystem.isKnown(in: source, offset: 0, length: source.size) { return PartitionTable(.none) }
        }
        return try BootRecordReader(source, record).read()
    }

    /// A GUID partition table that no boot record announces.
    private static func strayGUIDTable(in source: some SectorSource) -> PartitionTable? {
        guard let table = GUIDTableReader(source).readStray() else { return nil }
        return FileSystem.isKnown(in: source, offset: 0, length: source.size) ? nil : table
    }

    /// What is wrong with ranges that must lie inside the disk without touching each other, or nil.
    static func conflict(
        _ partitions: [Partition], areas: [Range<UInt64>], sectorSize: Int
    ) -> String? {
        let named = partitions.map { ($0.range, "partition \($0.number)") } + areas.map { ($0, "the partition table") }
        let sorted = named.sorted { ($0.0.lowerBound, $0.0.upperBound) < ($1.0.lowerBound, $1.0.upperBound) }
        for (first, second) in zip(sorted, sorted.dropFirst()) where first.0.upperBound > second.0.lowerBound {
            let sector = second.0.lowerBound / UInt64(sectorSize)
            return "\(first.1) and \(second.1) overlap at sector \(sector)"
        }
        return nil
    }
}

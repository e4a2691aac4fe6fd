internal import DiskStorage

/// The partitions of a device and the places where its partition tables lie, in sectors of 512 bytes; for
/// partitionedDevice images.
///
/// Read are the PC's master boot record with its chain of logical partitions (Microsoft's and Linux's kind) and the
/// GUID partition table (UEFI Specification 2.10, chapter 5), on devices of 512- and 4096-byte sectors.
struct VMDKPartitionTable: Sendable {
    struct Partition: Sendable, Equatable {
        /// As Linux numbers them: 1 to 4 primary and from 5 on logical ones, or the place in the GUID partition table.
        let number: Int
        let sectors: Range<UInt64>
    }

    /// In ascending order of their numbers. An extended partition, which only holds others, is not among them.
    private(set) var partitions: [Partition] = []
    /// What a copy of the tables consists of: ascending, disjoint, none inside a partition.
    private(set) var tableAreas: [Range<UInt64>] = []

    /// Sectors at the front that belong to the tables and boot loaders if no partition lies there.
    private static let frontLimit: UInt64 = 2048
    /// Logical partitions at most: what ends a chain that is circular.
    private static let logicalLimit = 128
    /// Bytes of a GUID partition table at most; 16 KiB are usual.
    private static let entriesLimit: UInt64 = 1 << 20

    /// Reads the tables of a device that is `sectorCount` sectors long.
    init(reading device: any Storage, sectorCount: UInt64) throws(DiskError) {
        let record = try device.bytes(at: 0, count: 512, for: .header, "the partition table")
        let fields = FieldReader(record)
        guard try fields.littleEndian(at: 510, as: UInt16.self) == 0xaa55 else {
            throw DiskError(.invalidImage, "the device has no partition table", image: device.name, offset: 510)
        }
        let entries = try Self.entries(of: fields)
        if entries.contains(where: { $0.type == 0xee }) {
            try readGUIDTable(device, sectorCount)
        } else {
            try readPrimary(entries, device)
        }
        try check(sectorCount, device.name)
    }

    private func check(_ sectorCount: UInt64, _ name: String) throws(DiskError) {
        for partition in partitions where partition.sectors.upperBound > sectorCount {
            throw DiskError(
                .invalidImage,
                "partition \(partition.number) ends at sector \(partition.sectors.upperBound), "
                    + "the device at \(sectorCount)",
                image: name)
        }
        let all = (partitions.map(\.sectors) + tableAreas).sorted { $0.lowerBound < $1.lowerBound }
        for (first, second) in zip(all, all.dropFirst()) where first.upperBound > second.lowerBound {
            throw DiskError(
                .invalidImage,
                "partitions, or a partition and a partition table, overlap at sector \(second.lowerBound)", image: name)
        }
    }

    /// The sectors from 0 on that belong to the tables: `needed` of them, and what else lies before every partition.
    private func frontArea(_ needed: UInt64) -> Range<UInt64> {
        let firstPartition = partitions.map(\.sectors.lowerBound).min() ?? needed
        return 0..<max(needed, min(firstPartition, Self.frontLimit))
    }
}

// MARK: - Master boot record

extension VMDKPartitionTable {
    /// An entry of a boot record: 16 bytes, type at 4, first sector at 8, number of sectors at 12, little endian.
    private struct Entry {
        let type: UInt8
        let start: UInt64
        let count: UInt64

        var isExtended: Bool { [0x05, 0x0f, 0x85].contains(type) }
    }

    /// The four entries, from byte 446 on.
    private static func entries(of fields: FieldReader) throws(DiskError) -> [Entry] {
        var entries: [Entry] = []
        for offset in stride(from: 446, to: 510, by: 16) {
            let start: UInt32 = try fields.littleEndian(at: offset + 8)
            let count: UInt32 = try fields.littleEndian(at: offset + 12)
            entries.append(Entry(type: try fields.byte(at: offset + 4), start: UInt64(start), count: UInt64(count)))
        }
        return entries
    }

    private mutating func readPrimary(_ entries: [Entry], _ device: any Storage) throws(DiskError) {
        for (index, entry) in entries.enumerated() where entry.type != 0 && entry.count > 0 && !entry.isExtended {
            partitions.append(Partition(number: index + 1, sectors: entry.start..<entry.start + entry.count))
        }
        var records: [Range<UInt64>] = []
        var number = 5
        for extended in entries where extended.isExtended && extended.count > 0 {
            try readLogical(extended.start, device, &number, &records)
        }
        tableAreas = [frontArea(1)] + records.sorted { $0.lowerBound < $1.lowerBound }
    }

    /// Follows a chain of extended boot records: in each, the first entry is a logical partition, relative to the
    /// record, and the second the next record, relative to the extended partition.
    private mutating func readLogical(
        _ base: UInt64, _ device: any Storage, _ number: inout Int, _ records: inout [Range<UInt64>]
    ) throws(DiskError) {
        var sector = base
        while true {
            guard records.count < Self.logicalLimit, !records.contains(sector..<sector + 1) else {
                throw DiskError(
                    .invalidImage, "the chain of logical partitions is circular or too long", image: device.name,
                    offset: sector * 512)
            }
            let fields = FieldReader(try device.bytes(at: sector * 512, count: 512, for: .header, "a partition table"))
            guard try fields.littleEndian(at: 510, as: UInt16.self) == 0xaa55 else { return }
            records.append(sector..<sector + 1)
            let entries = try Self.entries(of: fields)
            if entries[0].type != 0, entries[0].count > 0 {
                let start = sector + entries[0].start
                partitions.append(Partition(number: number, sectors: start..<start + entries[0].count))
                number += 1
            }
            guard entries[1].isExtended, entries[1].count > 0 else { return }
            sector = base + entries[1].start
        }
    }
}

// MARK: - GUID partition table

extension VMDKPartitionTable {
    /// Reads the primary header, at sector 1 of the device's own sectors, and its entries.
    ///
    /// | offset | size | header | | offset | size | entry |
    /// |---|---|---|---|---|---|---|
    /// | 0 | 8 | `EFI PART` | | 0 | 16 | type, all zeros: unused |
    /// | 12 | 4 | bytes of the header | | 32 | 8 | first sector |
    /// | 16 | 4 | CRC-32 of the header, with this field as 0 | | 40 | 8 | last sector |
    /// | 32 | 8 | the other header's sector | | | | |
    /// | 48 | 8 | last sector that a partition may have | | | | |
    /// | 72 | 8 | first sector of the entries | | | | |
    /// | 80 | 4 | entries | | | | |
    /// | 84 | 4 | bytes of one | | | | |
    /// | 88 | 4 | CRC-32 of all entries | | | | |
    private mutating func readGUIDTable(_ device: any Storage, _ sectorCount: UInt64) throws(DiskError) {
        let broken = { (what: String, offset: UInt64) in
            DiskError(.invalidImage, "the GUID partition table is broken: \(what)", image: device.name, offset: offset)
        }
        var sectorSize: UInt64 = 512
        var bytes = try device.bytes(at: 512, count: 512, for: .header, "the GUID partition table")
        if !FieldReader(bytes).matches("EFI PART", at: 0) {
            sectorSize = 4096
            bytes = try device.bytes(at: 4096, count: 512, for: .header, "the GUID partition table")
        }
        let header = FieldReader(bytes)
        guard header.matches("EFI PART", at: 0) else { throw broken("there is no header", 512) }
        let size: UInt32 = try header.littleEndian(at: 12)
        guard (92...512).contains(size) else { throw broken("its header has \(size) bytes", sectorSize + 12) }
        var copy = FieldWriter(Array(bytes[0..<Int(size)]))
        copy.littleEndian(UInt32(0), at: 16)
        guard try header.littleEndian(at: 16) == Deflate.crc32(copy.bytes) else {
            throw broken("the header's checksum is wrong", sectorSize + 16)
        }
        let firstEntry = try header.littleEndian(at: 72, as: UInt64.self)
        let count: UInt32 = try header.littleEndian(at: 80)
        let entrySize: UInt32 = try header.littleEndian(at: 84)
        let length = UInt64(count) * UInt64(entrySize)
        guard entrySize >= 128, length <= Self.entriesLimit else {
            throw broken("it has \(count) entries of \(entrySize) bytes", sectorSize + 80)
        }
        let place = try firstEntry.multiplied(by: sectorSize, "the place of the partition table's entries")
        let entries = FieldReader(try device.bytes(at: place, count: Int(length), for: .header, "the partition table"))
        guard try header.littleEndian(at: 88) == Deflate.crc32(entries.bytes) else {
            throw broken("the entries' checksum is wrong", place)
        }
        let scale = sectorSize / 512
        try readEntries(entries, count: Int(count), size: Int(entrySize), scale)
        let front = frontArea((place + length).dividedRoundingUp(by: 512))
        let lastUsable = try header.littleEndian(at: 48, as: UInt64.self)
        let end = try lastUsable.adding(1).multiplied(by: scale, "the end of the partitions")
        // The copy of the table lies behind the partitions, at the device's end.
        let back = max(end, front.upperBound)..<max(end, front.upperBound, sectorCount)
        tableAreas = back.isEmpty || back.count > Self.entriesLimit / 256 ? [front] : [front, back]
    }

    private mutating func readEntries(
        _ entries: FieldReader, count: Int, size: Int, _ scale: UInt64
    ) throws(DiskError) {
        for index in 0..<count {
            let offset = index * size
            if try entries.bytes(at: offset, count: 16).allSatisfy({ $0 == 0 }) { continue }
            let first = try entries.littleEndian(at: offset + 32, as: UInt64.self)
            let last = try entries.littleEndian(at: offset + 40, as: UInt64.self)
            let start = try first.multiplied(by: scale, "a partition's beginning")
            let end = try last.adding(1).multiplied(by: scale, "a partition's end")
            guard start < end else {
                throw DiskError(.invalidImage, "partition \(index + 1) ends at sector \(last), before it begins")
            }
            partitions.append(Partition(number: index + 1, sectors: start..<end))
        }
    }
}

internal import DiskStorage

/// Reads a master boot record and its chain of logical partitions.
struct BootRecordReader<Source: SectorSource> {
    private let source: Source
    private let record: MasterBootRecord

    init(_ source: Source, _ record: MasterBootRecord) {
        self.source = source
        self.record = record
    }

    /// A table that contradicts itself or the disk, and how.
    private struct Contradiction: Error {
        let text: String

        init(_ text: String) { self.text = text }
    }

    /// The table in sectors of one size.
    private struct Reading {
        let sectorSize: UInt64
        /// How many whole sectors the disk has.
        let diskSectors: UInt64
        var partitions: [Partition] = []
        var areas: [Range<UInt64>] = []
        /// Whether a boot record of logical partitions stands where it should.
        var hasChain = false
    }

    func read() throws(DiskError) -> PartitionTable {
        if source.sectorSize == 4096, case .success(let large) = try reading(sectorSize: 4096) { return table(large) }
        let small = try reading(sectorSize: 512)
        // Only what is known can tell the sizes apart; see PartitionTable.
        if !hasEvidence(small), case .success(let large) = try reading(sectorSize: 4096), hasEvidence(.success(large)) {
            return table(large)
        }
        switch small {
        case .success(let small): return table(small)
        case .failure(let contradiction):
            if FileSystem.isKnown(in: source, offset: 0, length: source.size) { return PartitionTable(.none) }
            return PartitionTable(
                .mbr, diskIdentifier: signature, areas: [0..<512],
                warning: "the partition table is not used, it contradicts itself: \(contradiction.text)")
        }
    }

    private var signature: String? {
        record.diskSignature == 0 ? nil : "0x" + DiskText.hexadecimal(record.diskSignature, digits: 8)
    }

    private func table(_ reading: Reading) -> PartitionTable {
        PartitionTable(
            .mbr, sectorSize: Int(reading.sectorSize), diskIdentifier: signature, partitions: reading.partitions,
            areas: reading.areas.sorted { $0.lowerBound < $1.lowerBound })
    }

    /// Whether something that is known lies where it should if the sectors are of that size.
    private func hasEvidence(_ result: Result<Reading, Contradiction>) -> Bool {
        guard case .success(let reading) = result else { return false }
        if reading.hasChain { return true }
        // As many as a record can have itself: the logical ones have a chain.
        return reading.partitions.prefix(4).contains { partition in
            FileSystem.isKnown(in: source, offset: partition.offset, length: partition.length)
        }
    }

    /// The table as it is in sectors of that size, or what is wrong then.
    private func reading(sectorSize: UInt64) throws(DiskError) -> Result<Reading, Contradiction> {
        var reading = Reading(sectorSize: sectorSize, diskSectors: source.size / sectorSize)
        reading.areas = [0..<sectorSize]
        var number = 5
        var containers: [Range<UInt64>] = []
        for (index, entry) in record.entries.enumerated() where entry.isUsed {
            guard entry.start > 0, entry.end <= reading.diskSectors else {
                return .failure(outside("partition \(index + 1)", entry.start..<entry.end, reading))
            }
            guard entry.isExtended else {
                add(entry, at: entry.start, number: index + 1, to: &reading)
                continue
            }
            containers.append(entry.start..<entry.end)
        }
        for container in containers {
            if let contradiction = try readLogical(container, &number, &reading) { return .failure(contradiction) }
        }
        reading.partitions.sort { $0.number < $1.number }
        let primary = reading.partitions.filter { $0.number < 5 }
        let ranges = containers.map { $0.lowerBound * sectorSize..<$0.upperBound * sectorSize }
        let size = Int(sectorSize)
        if let text = PartitionTable.conflict(primary, areas: [0..<sectorSize] + ranges, sectorSize: size)
            ?? PartitionTable.conflict(reading.partitions, areas: reading.areas, sectorSize: size)
        {
            return .failure(Contradiction(text))
        }
        return .success(reading)
    }

    /// Follows a chain of extended boot records: in each, one entry is a logical partition, relative to the record, and
    /// one the next record, relative to the extended partition. What else is there is ignored, as Linux does.
    private func readLogical(
        _ container: Range<UInt64>, _ number: inout Int, _ reading: inout Reading
    ) throws(DiskError) -> Contradiction? {
        var sector = container.lowerBound
        while true {
            let place = sector * reading.sectorSize..<(sector + 1) * reading.sectorSize
            guard reading.areas.count <= PartitionTable.logicalLimit, !reading.areas.contains(place) else {
                return Contradiction("the chain of logical partitions is circular or too long, at sector \(sector)")
            }
            reading.areas.append(place)
            let link = try MasterBootRecord(reading: source, at: place.lowerBound)
            guard let link, link.isPlausible else {
                // An extended partition that never held any may begin with anything.
                if sector == container.lowerBound { return nil }
                return Contradiction("the chain of logical partitions breaks off at sector \(sector)")
            }
            reading.hasChain = true
            if let entry = link.entries.first(where: { $0.isData }) {
                // Sums of three 32-bit numbers.
                let sectors = sector + entry.start..<sector + entry.end
                guard entry.start > 0, sectors.upperBound <= container.upperBound else {
                    return outside("partition \(number)", sectors, reading)
                }
                add(entry, at: sectors.lowerBound, number: number, to: &reading)
                number += 1
            }
            guard let next = link.entries.first(where: { $0.isExtended }) else { return nil }
            sector = container.lowerBound + next.start
            guard sector < container.upperBound else {
                return outside("a boot record of logical partitions", sector..<sector + 1, reading)
            }
        }
    }

    private func outside(_ what: String, _ sectors: Range<UInt64>, _ reading: Reading) -> Contradiction {
        if sectors.upperBound <= reading.diskSectors {
            return Contradiction("\(what) lies where it cannot, at sector \(sectors.lowerBound)")
        }
        return Contradiction(
            "\(what) ends behind sector \(sectors.upperBound - 1), the disk has \(reading.diskSectors) sectors")
    }

    private func add(_ entry: MasterBootRecord.Entry, at sector: UInt64, number: Int, to reading: inout Reading) {
        let hexNumber = DiskText.hexadecimal(number, digits: 2)
        reading.partitions.append(
            Partition(
                number: number, offset: sector * reading.sectorSize, length: entry.count * reading.sectorSize,
                type: "0x" + DiskText.hexadecimal(entry.type, digits: 2),
                typeName: PartitionTypes.name(of: entry.type), name: nil,
                uuid: signature.map { $0.dropFirst(2) + "-" + hexNumber }, isBootable: entry.bootIndicator == 0x80,
                attributes: 0))
    }
}

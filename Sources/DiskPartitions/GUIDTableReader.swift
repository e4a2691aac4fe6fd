internal import DiskStorage

/// Reads a GUID partition table: the primary one, or if that is damaged its copy at the disk's end.
struct GUIDTableReader<Source: SectorSource> {
    private let source: Source

    init(_ source: Source) { self.source = source }

    /// A header with its entries, both as their checksums say.
    private struct Copy {
        let sectorSize: UInt64
        let header: GUIDTableHeader
        let entries: FieldReader
    }

    /// A place that was looked at, and what is there.
    private struct Attempt {
        let sectorSize: UInt64
        /// Whether there is a header, good or bad.
        var hasHeader = false
        var copy: Copy?
        var damage = ""
    }

    private static var sectorSizes: [UInt64] { [512, 4096] }

    /// Reads the table that a protective boot record announced.
    func read() -> PartitionTable {
        let (primary, damage) = readPrimary()
        if let primary { return table(primary, warning: nil) }
        guard let backup = readBackup() else {
            return PartitionTable(
                .gpt, areas: [0..<min(source.size, 1024)],
                warning: "the GUID partition table is damaged, and so is its copy: \(damage)")
        }
        return table(backup, warning: Self.warning(damage))
    }

    /// Reads a table that nothing announced; nil if there is no good one.
    func readStray() -> PartitionTable? {
        let (primary, damage) = readPrimary()
        if let primary {
            return table(
                primary, warning: "the boot record that announces the GUID partition table is missing or damaged")
        }
        guard let backup = readBackup() else { return nil }
        return table(backup, warning: Self.warning(damage))
    }

    private static func warning(_ damage: String) -> String {
        "the GUID partition table is damaged (\(damage)), its copy at the disk's end is used: "
            + "gdisk or parted put it right"
    }

    // MARK: - Finding a good copy

    /// The good table behind sector 0, or what is wrong with it.
    private func readPrimary() -> (copy: Copy?, damage: String) {
        var damage = "there is no header"
        for sectorSize in Self.sectorSizes {
            let attempt = attempt(at: 1, sectorSize)
            if let copy = attempt.copy { return (copy, "") }
            if attempt.hasHeader { damage = attempt.damage }
        }
        return (nil, damage)
    }

    /// The good copy in the disk's last sector, or where the primary header says.
    private func readBackup() -> Copy? {
        for sectorSize in Self.sectorSizes {
            let sectors = source.size / sectorSize
            guard sectors > 2 else { continue }
            if let copy = attempt(at: sectors - 1, sectorSize).copy { return copy }
            // A disk that was made larger has its copy where it ended before. The primary header is good then, and
            // only its entries are not.
            if let alternate = alternate(sectorSize), (2..<sectors - 1).contains(alternate),
                let copy = attempt(at: alternate, sectorSize).copy
            {
                return copy
            }
        }
        return nil
    }

    private func alternate(_ sectorSize: UInt64) -> UInt64? {
        guard let sector = try? source.fields(at: sectorSize, count: Int(sectorSize)) else { return nil }
        return (try? GUIDTableHeader(parsing: sector))?.alternateLBA
    }

    /// What is at that sector. That it cannot be read is damage like any other: there is a copy.
    private func attempt(at lba: UInt64, _ sectorSize: UInt64) -> Attempt {
        var attempt = Attempt(sectorSize: sectorSize)
        do throws(DiskError) {
            guard let fields = try source.fields(at: lba * sectorSize, count: Int(sectorSize)) else { return attempt }
            attempt.hasHeader = fields.matches("EFI PART", at: 0)
            let header = try GUIDTableHeader(parsing: fields)
            attempt.copy = Copy(
                sectorSize: sectorSize, header: header, entries: try readEntries(header, at: lba, sectorSize))
        } catch {
            attempt.damage = error.message
            attempt.hasHeader = attempt.hasHeader || error.kind == .system
        }
        return attempt
    }

    private func readEntries(
        _ header: GUIDTableHeader, at lba: UInt64, _ sectorSize: UInt64
    ) throws(DiskError) -> FieldReader {
        let sectors = source.size / sectorSize
        guard header.myLBA == lba else {
            throw DiskError(.invalidImage, "its header says that it is in sector \(header.myLBA)")
        }
        guard header.firstUsableLBA >= 2, header.firstUsableLBA <= header.lastUsableLBA,
            header.lastUsableLBA < sectors
        else {
            throw DiskError(
                .invalidImage,
                "its partitions lie from sector \(header.firstUsableLBA) to \(header.lastUsableLBA), "
                    + "the disk has \(sectors) sectors")
        }
        let (length, overflow) = header.entryCount.multipliedReportingOverflow(by: header.entrySize)
        guard header.entrySize >= 128, header.entrySize.isPowerOfTwo, header.entryCount > 0, !overflow,
            length <= PartitionTable.entriesLimit
        else {
            throw DiskError(.invalidImage, "it has \(header.entryCount) entries of \(header.entrySize) bytes")
        }
        let place = try header.entriesLBA.multiplied(by: sectorSize, "the place of its entries")
        guard header.entriesLBA >= 2, let entries = try source.fields(at: place, count: Int(length)) else {
            throw DiskError(.invalidImage, "its entries are said to be at sector \(header.entriesLBA)")
        }
        guard crc32(entries.bytes) == header.entriesChecksum else {
            throw DiskError(.invalidImage, "its entries' checksum is wrong")
        }
        return entries
    }

    // MARK: - Understanding it

    private func table(_ copy: Copy, warning: String?) -> PartitionTable {
        let header = copy.header
        let size = copy.sectorSize
        // All of this lies inside the disk, as readEntries has seen.
        let usable = header.firstUsableLBA * size..<(header.lastUsableLBA + 1) * size
        let entries = header.entriesLBA * size..<header.entriesLBA * size + UInt64(copy.entries.count)
        var areas = [0..<usable.lowerBound]
        if header.myLBA == 1, let end = entries.upperBound.alignedUp(to: size), end <= usable.lowerBound {
            areas = [0..<end]
        }
        if usable.upperBound < source.size { areas.append(usable.upperBound..<source.size) }
        let identifier = header.diskGUID.description
        do throws(DiskError) {
            guard !entries.overlaps(usable) else {
                throw DiskError(.invalidImage, "its entries, at sector \(header.entriesLBA), lie among the partitions")
            }
            let partitions = try partitions(copy)
            if let text = PartitionTable.conflict(partitions, areas: areas, sectorSize: Int(size)) {
                throw DiskError(.invalidImage, text)
            }
            return PartitionTable(
                .gpt, sectorSize: Int(size), diskIdentifier: identifier, partitions: partitions, areas: areas,
                warning: warning)
        } catch {
            return PartitionTable(
                .gpt, sectorSize: Int(size), diskIdentifier: identifier, areas: areas,
                warning: "the GUID partition table is not used, it contradicts itself: \(error.message)")
        }
    }

    private func partitions(_ copy: Copy) throws(DiskError) -> [Partition] {
        let header = copy.header
        var partitions: [Partition] = []
        for index in 0..<Int(header.entryCount) {
            let entry = try GUIDTableEntry(parsing: copy.entries, at: index * Int(header.entrySize))
            if entry.type.isNull { continue }
            guard entry.firstLBA >= header.firstUsableLBA, entry.firstLBA <= entry.lastLBA,
                entry.lastLBA <= header.lastUsableLBA
            else {
                throw DiskError(
                    .invalidImage,
                    "partition \(index + 1) lies from sector \(entry.firstLBA) to \(entry.lastLBA), "
                        + "where \(header.firstUsableLBA) to \(header.lastUsableLBA) are to be used")
            }
            partitions.append(
                Partition(
                    number: index + 1, offset: entry.firstLBA * copy.sectorSize,
                    length: (entry.lastLBA - entry.firstLBA + 1) * copy.sectorSize, type: entry.type.description,
                    typeName: PartitionTypes.name(of: entry.type), name: entry.name,
                    uuid: entry.uniqueGUID.description, isBootable: entry.isLegacyBootable,
                    attributes: entry.attributes))
        }
        return partitions
    }
}

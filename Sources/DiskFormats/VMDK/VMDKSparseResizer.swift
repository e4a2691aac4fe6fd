internal import DiskStorage

/// Gives a sparse extent file another capacity: what its header and its tables must have for that.
///
/// Whatever of it a crash leaves undone, the file is one that has its old or its new capacity. New tables and
/// directories lie at the file's end, and the header, which is one sector, is written when they are durable. What
/// tables have for grains behind the end of the disk is cleared before a header makes them part of it.
struct VMDKSparseResizer {
    let storage: any Storage
    let layout: VMDKSparseFile.Layout
    /// Sectors that the header gives the extent.
    private(set) var capacity: UInt64
    let grainSectors: UInt64
    let hasZeroGrains: Bool
    let entriesPerTable: UInt64
    /// Where the directories lie, in bytes: the one that counts, and its copy if there is one.
    private(set) var directories: [UInt64]
    /// Entries for which the directories have room where they are.
    private let slots: UInt64
    /// Where the metadata in front ends, in bytes.
    private let metadataEnd: UInt64
    /// The first sector that may hold a table: what lies before is header and descriptor.
    let firstTable: UInt64
    /// Where the header's next free sector is, in bytes; 0 where it tells none.
    private let freeOffset: UInt64

    var grainSize: UInt64 { grainSectors * 512 }
    var tableSize: UInt64 { entriesPerTable * 4 }

    /// Bytes that a sector number of 32 bits reaches.
    private static let limit = VMDKSparseHeader.fileSectorLimit * 512

    init(_ storage: any Storage, _ layout: VMDKSparseFile.Layout) throws(DiskError) {
        self.storage = storage
        self.layout = layout
        switch layout {
        case .hosted:
            let header = try VMDKOpener.readHeader(of: storage)
            capacity = header.capacitySectors
            grainSectors = header.grainSectors
            hasZeroGrains = header.hasZeroGrains
            entriesPerTable = UInt64(header.entriesPerTable)
            directories = [header.directorySector * 512]
            if header.usesRedundantDirectory { directories.append(header.redundantDirectorySector * 512) }
            slots = header.directorySectorCount * 128
            let descriptorEnd =
                header.descriptorSector == 0 ? 0 : header.descriptorSector + header.descriptorSectorCount
            metadataEnd = max(header.overheadSectors, descriptorEnd) * 512
            firstTable = max(1, descriptorEnd)
            freeOffset = 0
        case .cowd:
            let header = try COWDHeader(
                parsing: try storage.bytes(at: 0, count: COWDHeader.byteCount, for: .header, "the COWD header"))
            capacity = UInt64(header.capacitySectors)
            grainSectors = UInt64(header.grainSectors)
            hasZeroGrains = false
            entriesPerTable = UInt64(COWDHeader.entriesPerTable)
            directories = [UInt64(header.directorySector) * 512]
            slots = UInt64(header.directoryEntryCount).dividedRoundingUp(by: 128) * 128
            metadataEnd = UInt64(COWDHeader.byteCount)
            firstTable = metadataEnd / 512
            freeOffset = UInt64(header.freeSector) * 512
        }
    }

    private func tableCount(_ sectors: UInt64) -> UInt64 {
        sectors.dividedRoundingUp(by: grainSectors * entriesPerTable)
    }

    // MARK: - Growing

    /// Makes room in the tables for `sectors` of an extent that has `length` sectors of its disk now, and has what is
    /// new hide what a parent has in the extent's first `hidden` sectors.
    mutating func grow(from length: UInt64, to sectors: UInt64, hidingUpTo hidden: UInt64) throws(DiskError) {
        try checkFits(sectors)
        try clear(from: length, givingBack: false)
        let old = tableCount(capacity)
        let new = max(old, tableCount(sectors))
        let zeroGrains = grains(behind: length, upTo: min(hidden, sectors))
        let fileEnd = try max(storage.length(), freeOffset).dividedRoundingUp(by: 512) * 512
        var position = fileEnd
        let addedTables = position
        position += UInt64(directories.count) * (new - old) * tableSize
        var places = directories
        if new > slots {
            for index in places.indices {
                places[index] = position
                position += new.dividedRoundingUp(by: 128) * 512
            }
        }
        let missingTables = position
        position += try missingTableCount(for: zeroGrains, of: old) * tableSize
        let firstGrain = position.dividedRoundingUp(by: grainSize) * grainSize
        if !hasZeroGrains, !zeroGrains.isEmpty { position = firstGrain + UInt64(zeroGrains.count) * grainSize }
        guard position <= Self.limit else { throw tooLarge(sectors) }
        guard sectors > capacity || position > fileEnd || !zeroGrains.isEmpty else { return }
        // All of it reads as zeros then, and no entry leads outside of the file.
        if position > fileEnd { try storage.setLength(position) }
        try storage.flush()
        for (index, place) in places.enumerated() {
            if place != directories[index] { try copyDirectory(directories[index], old, to: place) }
            try addTables(old..<new, from: addedTables + UInt64(index) * (new - old) * tableSize, to: place)
        }
        directories = places
        try addMissingTables(for: zeroGrains, of: old, from: missingTables)
        try enterZeroGrains(zeroGrains, from: firstGrain)
        try storage.flush()
        capacity = max(capacity, sectors)
        try writeHeader(free: try storage.length())
    }

    /// The last grain, too, must begin at a sector that an entry can name.
    private func checkFits(_ sectors: UInt64) throws(DiskError) {
        guard sectors <= VMDKSparseHeader.fileSectorLimit else { throw tooLarge(sectors) }
        let tables = UInt64(directories.count) * (tableCount(sectors) * (tableSize + 4) + 512)
        let grains = sectors.dividedRoundingUp(by: grainSectors) * grainSize
        guard max(metadataEnd, 2 * grainSize) + tables + grains <= Self.limit, layout == .hosted || sectors < 1 << 32
        else { throw tooLarge(sectors) }
    }

    private func tooLarge(_ sectors: UInt64) -> DiskError {
        DiskError(
            .unsupported,
            "\(sectors * 512) bytes do not fit into one sparse file, which ends at 2 TiB with its tables: convert the "
                + "image to the variant 'split' or 'fixed'", image: storage.name)
    }

    private func copyDirectory(_ directory: UInt64, _ count: UInt64, to place: UInt64) throws(DiskError) {
        for index in stride(from: 0, to: count, by: 16_384) {
            let bytes = try storage.bytes(
                at: directory + index * 4, count: Int(min(16_384, count - index)) * 4, for: .table,
                "the grain directory")
            try storage.write(bytes, at: place + index * 4, for: .table)
        }
    }

    /// Enters tables that lie one after the other from `offset` on in a directory.
    private func addTables(_ range: Range<UInt64>, from offset: UInt64, to directory: UInt64) throws(DiskError) {
        for first in stride(from: range.lowerBound, to: range.upperBound, by: 16_384) {
            let count = min(16_384, range.upperBound - first)
            var entries = FieldWriter(count: Int(count) * 4)
            for number in 0..<count {
                let table = offset + (first + number - range.lowerBound) * tableSize
                entries.littleEndian(UInt32(truncatingIfNeeded: table / 512), at: Int(number) * 4)
            }
            try storage.write(entries.bytes, at: directory + first * 4, for: .table)
        }
    }

    /// Writes what may have changed, in one write of one sector.
    private func writeHeader(free: UInt64) throws(DiskError) {
        var fields = FieldWriter(try storage.bytes(at: 0, count: 512, for: .header, "the extent's header"))
        switch layout {
        case .hosted:
            fields.littleEndian(capacity, at: 12)
            if directories.count > 1 { fields.littleEndian(directories[1] / 512, at: 48) }
            fields.littleEndian(directories[0] / 512, at: 56)
        case .cowd:
            fields.littleEndian(UInt32(truncatingIfNeeded: capacity), at: 12)
            fields.littleEndian(UInt32(truncatingIfNeeded: directories[0] / 512), at: 20)
            fields.littleEndian(UInt32(truncatingIfNeeded: tableCount(capacity)), at: 24)
            fields.littleEndian(
                UInt32(truncatingIfNeeded: free.dividedRoundingUp(by: 512)), at: COWDHeader.freeSectorOffset)
        }
        try storage.write(fields.bytes, at: 0, for: .header)
        try storage.flush()
    }

    // MARK: - What is behind the end

    /// Grains whose entries are cleared before they are given back.
    private static let batchLimit = 65_536

    /// Clears the entries of all grains behind the first `sectors` of the disk, and the bytes behind them in the grain
    /// with the last of them; with `givingBack`, the grains' space goes back to the file system.
    func clear(from sectors: UInt64, givingBack: Bool) throws(DiskError) {
        let end = try storage.length()
        if !givingBack, sectors % grainSectors != 0 { try clearTail(of: sectors, end) }
        let firstGrain = sectors.dividedRoundingUp(by: grainSectors)
        var cleared: [UInt32] = []
        for directory in directories.reversed() {
            // The copy first: a grain is given back when neither leads to it.
            for index in stride(from: firstGrain / entriesPerTable, to: tableCount(capacity), by: 1) {
                let from = index * entriesPerTable < firstGrain ? firstGrain % entriesPerTable : 0
                let found = try clearTable(index, of: directory, from: from, end)
                guard givingBack, directory == directories[0] else { continue }
                cleared += found
                if cleared.count >= Self.batchLimit { try giveBack(&cleared, end) }
            }
        }
        try storage.flush()
        try giveBack(&cleared, end)
    }

    /// Clears the entries of a table from one on; answers those that led somewhere.
    private func clearTable(
        _ index: UInt64, of directory: UInt64, from first: UInt64, _ end: UInt64
    ) throws(DiskError) -> [UInt32] {
        let table = try entry(at: directory + index * 4)
        guard table >= firstTable, UInt64(table) * 512 + tableSize <= end else { return [] }
        let place = UInt64(table) * 512 + first * 4
        let bytes = try storage.bytes(
            at: place, count: Int(entriesPerTable - first) * 4, for: .table, "a grain table")
        guard bytes.contains(where: { $0 != 0 }) else { return [] }
        try storage.write([UInt8](repeating: 0, count: bytes.count), at: place, for: .table)
        let fields = FieldReader(bytes)
        var found: [UInt32] = []
        for number in 0..<bytes.count / 4 {
            let sector: UInt32 = try fields.littleEndian(at: number * 4)
            if sector > 1 || sector == 1 && !hasZeroGrains { found.append(sector) }
        }
        return found
    }

    private func giveBack(_ grains: inout [UInt32], _ end: UInt64) throws(DiskError) {
        guard !grains.isEmpty else { return }
        try storage.flush()
        for sector in grains {
            let start = UInt64(sector) * 512
            guard start >= metadataEnd, start < end else { continue }
            try storage.discard(start..<min(start + grainSize, end), mustZero: false, for: .guestData)
        }
        grains = []
    }

    /// What a grain has behind the disk's end is no part of the disk; so it must be zeros when the disk gets longer.
    private func clearTail(of sectors: UInt64, _ end: UInt64) throws(DiskError) {
        let grain = sectors / grainSectors
        let table = try entry(at: directories[0] + grain / entriesPerTable * 4)
        guard table > 0, UInt64(table) * 512 + tableSize <= end else { return }
        let sector = try entry(at: UInt64(table) * 512 + grain % entriesPerTable * 4)
        guard sector > 1 || sector == 1 && !hasZeroGrains else { return }
        let start = UInt64(sector) * 512 + sectors % grainSectors * 512
        let stop = min(end, UInt64(sector) * 512 + grainSize)
        guard start < stop, start >= metadataEnd else { return }
        try storage.writeZeros(start..<stop, for: .guestData)
        try storage.flush()
    }

    func entry(at offset: UInt64) throws(DiskError) -> UInt32 {
        let bytes = try storage.bytes(at: offset, count: 4, for: .table, "a table")
        return try FieldReader(bytes).littleEndian(at: 0)
    }

    // MARK: - Shrinking

    /// Gives up all behind the first `sectors`; the descriptor gives the extent no more already.
    mutating func shrink(to sectors: UInt64) throws(DiskError) {
        try clear(from: sectors, givingBack: true)
        let end = try usedEnd(tableCount(sectors))
        capacity = sectors
        try writeHeader(free: end)
        if end < (try storage.length()) {
            try storage.setLength(end)
            try storage.flush()
        }
    }

    /// Where the last of what is in use ends, with that many tables.
    private func usedEnd(_ tables: UInt64) throws(DiskError) -> UInt64 {
        let length = try storage.length()
        var end = metadataEnd
        for directory in directories {
            end = max(end, directory + tables.dividedRoundingUp(by: 128) * 512)
            for index in 0..<tables {
                let table = UInt64(try entry(at: directory + index * 4)) * 512
                guard table > 0, table + tableSize <= length else { continue }
                end = max(end, table + tableSize)
                guard directory == directories[0] else { continue }
                let fields = FieldReader(
                    try storage.bytes(at: table, count: Int(tableSize), for: .table, "a grain table"))
                for number in 0..<Int(entriesPerTable) {
                    let sector: UInt32 = try fields.littleEndian(at: number * 4)
                    if sector > 1 { end = max(end, UInt64(sector) * 512 + grainSize) }
                }
            }
        }
        return min(end, length)
    }
}

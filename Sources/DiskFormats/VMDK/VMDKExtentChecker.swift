internal import DiskImage
internal import DiskStorage

/// Looks through the tables of one sparse extent: against their copies, the file's size and each other.
struct VMDKExtentChecker {
    /// What may be changed.
    enum Repair {
        case nothing
        /// Only what loses nothing: copies of tables are made equal again.
        case copiesOnly
        /// Also entries that cannot be right: they are cleared.
        case everything
    }

    private let extent: VMDKOpenExtent
    private let tables: VMDKGrainTables
    private let storage: any Storage
    private let length: UInt64

    init(_ extent: VMDKOpenExtent, _ storage: any Storage) throws(DiskError) {
        guard let tables = extent.map.grains else { preconditionFailure("only sparse extents have tables") }
        self.extent = extent
        self.tables = tables
        self.storage = storage
        length = try storage.length()
    }

    /// Whether there could be grains where they are said to begin.
    private var canBeLongEnough: Bool { tables.firstDataOffset < VMDKSparseFile.limit }
    private var entriesPerTable: UInt64 { 1 << tables.tableShift }
    private var tableSize: UInt64 { 4 << tables.tableShift }
    private var tableCount: UInt64 { extent.map.length.dividedRoundingUp(by: tables.tableCoverage) }
    private var grainCount: UInt64 { extent.map.length.dividedRoundingUp(by: tables.grainSize) }

    /// The state of one run.
    private struct Run {
        var report = CheckReport()
        let repair: Repair
        var seen: GrainSet
        /// The sectors at which tables begin that have been looked through, and how many those are.
        var seenTables: GrainSet
        var tableCount: UInt64 = 0
        /// The bytes of those that lie among the grains.
        var tableBytes: UInt64 = 0
        /// The end of the file, moved by tables that repair adds.
        var end: UInt64
        var hasWritten = false
    }

    /// Checks everything; the extent must not be in use for writing.
    func check(repair: Repair) throws(DiskError) -> CheckReport {
        var run = Run(
            repair: repair, seen: GrainSet(count: length / tables.grainSize + 1),
            seenTables: GrainSet(count: length / 512 + 1, limit: 1 << 26),
            end: canBeLongEnough ? max(length, tables.firstDataOffset) : length)
        run.report.totalBlocks = grainCount
        noteLength(&run)
        if run.seen.isOff {
            run.report.add(
                .init(.note, file: storage.name, "the file has too many grains to look for any that are used twice"))
        }
        let step: UInt64 = 16_384
        for first in stride(from: 0, to: tableCount, by: Int(step)) {
            let count = min(step, tableCount - first)
            let primary = try entries(at: tables.directoryOffset + first * 4, count)
            let copy =
                tables.redundantDirectoryOffset == 0
                ? nil : try entries(at: tables.redundantDirectoryOffset + first * 4, count)
            for index in 0..<Int(count) {
                try checkTable(first + UInt64(index), primary[index], copy?[index], &run)
            }
            guard run.report.remaining(.loss) <= Self.lossLimit else {
                run.report.add(
                    .init(
                        .loss, file: storage.name,
                        "more than \(Self.lossLimit) findings: nothing from directory entry "
                            + "\(first + count) on is checked"
                    ))
                break
            }
        }
        try repairLength(&run)
        if run.hasWritten { try storage.flush() }
        noteLeak(&run)
        return run.report
    }

    /// Notes that the file ends before the place where its grains begin.
    private func noteLength(_ run: inout Run) {
        guard let damage = extent.damage else { return }
        let isFixed = run.repair == .everything && canBeLongEnough
        run.report.add(
            .init(canBeLongEnough ? .repairable : .loss, file: storage.name, damage, isRepaired: isFixed))
    }

    /// Makes such a file longer: after its tables, as far as they are there, were looked through, so that what is
    /// missing of them could be taken from their copies.
    private func repairLength(_ run: inout Run) throws(DiskError) {
        guard extent.damage != nil, run.repair == .everything, canBeLongEnough,
            try storage.length() < tables.firstDataOffset
        else { return }
        try storage.setLength(tables.firstDataOffset)
        run.hasWritten = true
    }

    /// After so many losses that stay, the rest of the extent is not looked at.
    private static let lossLimit = 10_000

    // MARK: - Tables

    /// Notes that a table is looked through; answers false if that was done for an earlier entry. Whatever the
    /// directory says, the work is bounded by the file's length.
    private func isNew(_ sector: UInt32, _ run: inout Run) -> Bool {
        run.tableCount += 1
        guard run.seenTables.insert(UInt64(sector)), run.tableCount <= length / tableSize + 1 else { return false }
        if UInt64(sector) * 512 >= tables.firstDataOffset { run.tableBytes += tableSize }
        return true
    }

    private func isTableInside(_ sector: UInt32) -> Bool {
        let offset = UInt64(sector) * 512
        return sector != 0 && offset >= 512 && offset + tableSize <= length
    }

    private func checkTable(
        _ number: UInt64, _ primarySector: UInt32, _ copySector: UInt32?, _ run: inout Run
    ) throws(DiskError) {
        let isPrimaryUsable = isTableInside(primarySector)
        let isCopyUsable = copySector.map(isTableInside) ?? false
        if primarySector == 0 && (copySector ?? 0) == 0 { return }
        guard isPrimaryUsable || isCopyUsable else {
            let place = "directory entry \(number) puts its grain table at sector \(primarySector), outside the file"
            try clear(
                place, at: tables.directoryOffset + number * 4,
                copy: copySector == nil ? nil : tables.redundantDirectoryOffset + number * 4, &run)
            return
        }
        guard isNew(isPrimaryUsable ? primarySector : copySector ?? 0, &run) else {
            run.report.add(
                .init(
                    .loss, file: storage.name,
                    "directory entry \(number) has its grain table, at sector \(primarySector), in common with another")
            )
            return
        }
        var primary = isPrimaryUsable ? try entries(at: UInt64(primarySector) * 512, entriesPerTable) : []
        var copy = isCopyUsable ? try entries(at: UInt64(copySector ?? 0) * 512, entriesPerTable) : []
        if copySector != nil, !isPrimaryUsable || !isCopyUsable {
            let isFixed = run.repair != .nothing
            run.report.add(
                .init(
                    .repairable, file: storage.name,
                    "grain table \(number) is missing from the \(isPrimaryUsable ? "redundant" : "primary") directory",
                    isRepaired: isFixed))
            let source = isPrimaryUsable ? primary : copy
            if isFixed { try addTable(source, number, toPrimary: !isPrimaryUsable, &run) }
            try checkEntries(
                number, source, nil, UInt64(isPrimaryUsable ? primarySector : copySector ?? 0) * 512, nil, &run)
            return
        }
        if !isPrimaryUsable { swap(&primary, &copy) }
        try checkEntries(
            number, primary, copySector == nil ? nil : copy, UInt64(primarySector) * 512,
            copySector.map { UInt64($0) * 512 }, &run)
    }

    /// Adds a copy of a table at the end of the file and points the directory that lacks it there.
    private func addTable(
        _ entries: [UInt32], _ number: UInt64, toPrimary: Bool, _ run: inout Run
    ) throws(DiskError) {
        guard let offset = run.end.alignedUp(to: 512), offset + tableSize <= VMDKSparseFile.limit else {
            throw DiskError(.invalidImage, "there is no room for another grain table", image: storage.name)
        }
        var table = FieldWriter(count: Int(tableSize))
        for (index, entry) in entries.enumerated() { table.littleEndian(entry, at: index * 4) }
        try storage.write(table.bytes, at: offset, for: .table)
        try storage.flush()
        run.end = offset + tableSize
        let directory = toPrimary ? tables.directoryOffset : tables.redundantDirectoryOffset
        try set(UInt32(truncatingIfNeeded: offset / 512), at: directory + number * 4, &run)
    }

    // MARK: - Entries

    private func isGrainInside(_ entry: UInt32) -> Bool {
        let offset = UInt64(entry) * 512
        return offset >= tables.firstDataOffset && offset < length
    }

    private func isZeroOrAbsent(_ entry: UInt32) -> Bool { entry == 0 || entry == 1 && tables.hasZeroGrains }

    private func checkEntries(
        _ table: UInt64, _ primary: [UInt32], _ copy: [UInt32]?, _ primaryOffset: UInt64, _ copyOffset: UInt64?,
        _ run: inout Run
    ) throws(DiskError) {
        let first = table * entriesPerTable
        for index in 0..<Int(min(entriesPerTable, grainCount - first)) {
            let entry = primary[index]
            let isUsable = isZeroOrAbsent(entry) || isGrainInside(entry)
            if let copy, let copyOffset, copy[index] != entry {
                let other = copy[index]
                let isOtherUsable = isZeroOrAbsent(other) || isGrainInside(other)
                if isUsable || isOtherUsable {
                    let isFixed = run.repair != .nothing
                    run.report.add(
                        .init(
                            .repairable, file: storage.name,
                            "grain \(first + UInt64(index)): the table says sector \(entry), its copy \(other)",
                            isRepaired: isFixed))
                    if isFixed {
                        let place = UInt64(index) * 4
                        if isUsable {
                            try set(entry, at: copyOffset + place, &run)
                        } else {
                            try set(other, at: primaryOffset + place, &run)
                        }
                    }
                    try note(isUsable ? entry : other, first + UInt64(index), &run)
                    continue
                }
            }
            guard isUsable else {
                try clear(
                    "grain \(first + UInt64(index)) is said to lie at sector \(entry), outside the file's data",
                    at: primaryOffset + UInt64(index) * 4, copy: copyOffset.map { $0 + UInt64(index) * 4 }, &run)
                continue
            }
            try note(entry, first + UInt64(index), &run)
        }
    }

    /// Counts a grain, and finds those that are used twice or whose marker is another's.
    private func note(_ entry: UInt32, _ grain: UInt64, _ run: inout Run) throws(DiskError) {
        guard !isZeroOrAbsent(entry) else { return }
        run.report.allocatedBlocks += 1
        let offset = UInt64(entry) * 512
        if extent.map.kind == .compressed {
            let head = try storage.availableBytes(at: offset, count: 12, for: .guestData)
            guard head.count == 12 else { return }
            let sector: UInt64 = try FieldReader(head).littleEndian(at: 0)
            if extent.compressedGrains?.hasMarkers == true, sector != grain << tables.grainShift / 512 {
                run.report.add(
                    .init(
                        .loss, file: storage.name,
                        "grain \(grain): the marker at byte \(offset) belongs to sector \(sector)"))
            }
            return
        }
        if !run.seen.insert(offset / tables.grainSize) {
            run.report.add(
                .init(
                    .loss, file: storage.name,
                    "grain \(grain) shares its place in the file, byte \(offset), with another"))
        }
    }

    // MARK: - Changes

    /// An entry that cannot be right, in the table and its copy: its data is lost; repair makes it absent.
    private func clear(_ message: String, at offset: UInt64, copy: UInt64?, _ run: inout Run) throws(DiskError) {
        let isFixed = run.repair == .everything
        run.report.add(.init(.loss, file: storage.name, message, isRepaired: isFixed))
        guard isFixed else { return }
        try set(0, at: offset, &run)
        if let copy { try set(0, at: copy, &run) }
    }

    private func set(_ value: UInt32, at offset: UInt64, _ run: inout Run) throws(DiskError) {
        var field = FieldWriter(count: 4)
        field.littleEndian(value, at: 0)
        try storage.write(field.bytes, at: offset, for: .table)
        run.hasWritten = true
    }

    private func entries(at offset: UInt64, _ count: UInt64) throws(DiskError) -> [UInt32] {
        let bytes = try storage.bytes(at: offset, count: Int(count) * 4, for: .table, "a table")
        return unsafe bytes.withUnsafeBytes { memory in
            (0..<Int(count)).map {
                unsafe UInt32(littleEndian: memory.loadUnaligned(fromByteOffset: $0 * 4, as: UInt32.self))
            }
        }
    }

    /// Grains in the file that nothing points to.
    private func noteLeak(_ run: inout Run) {
        guard extent.map.kind == .sparse, length > tables.firstDataOffset else { return }
        // (Nothing of it can be more than the file is long.)
        let data = length - tables.firstDataOffset
        let room = (data - min(data, run.tableBytes)) / tables.grainSize
        guard room > run.report.allocatedBlocks else { return }
        let lost = (room - run.report.allocatedBlocks) * tables.grainSize
        if lost > 0 {
            run.report.add(
                .init(
                    .leak, file: storage.name,
                    "\(lost) bytes of the file's length are not in use; 'vdimg compact' gives them back"))
        }
    }
}

/// Which places of a file hold a grain: a bit each.
private struct GrainSet {
    private var words: [UInt64]
    /// Too many to keep: nothing is found to be used twice.
    let isOff: Bool

    /// 2^28 places take 32 MiB.
    static let usualLimit: UInt64 = 1 << 28

    init(count: UInt64, limit: UInt64 = usualLimit) {
        isOff = count > limit
        words = [UInt64](repeating: 0, count: isOff ? 0 : Int(count / 64 + 1))
    }

    /// Answers false if it was there.
    mutating func insert(_ index: UInt64) -> Bool {
        guard !isOff, index / 64 < UInt64(words.count) else { return true }
        let bit: UInt64 = 1 << (index % 64)
        defer { words[Int(index / 64)] |= bit }
        return words[Int(index / 64)] & bit == 0
    }
}

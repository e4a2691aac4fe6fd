internal import DiskImage
internal import DiskStorage

/// Goes through everything that points to clusters of an image's file, counts it, and looks at what is pointed to.
struct QCOW2TableWalk {
    let image: QCOW2Image
    let allocator: QCOW2Allocator
    let file: String
    /// Whether entries that cannot be right are put right.
    let isRepairing: Bool
    /// Whether what is wrong is noted: in the first of several walks.
    var isReporting: Bool
    var report = CheckReport()
    var counts: QCOW2ReferenceCounts
    /// The indexes of refcount blocks that cannot be where the refcount table says.
    var badBlocks: [UInt64] = []
    /// Whether there was so much wrong that not all was looked at.
    var isIncomplete = false
    private var seen: QCOW2SeenTables
    /// Tables that are looked through at most.
    let tableLimit: UInt64

    /// After so many losses the rest of a table is not looked at.
    static let lossLimit = 10_000
    /// Indexes kept of refcount blocks that are wrong.
    static let badBlockLimit = 65_536

    init(
        _ image: QCOW2Image, _ allocator: QCOW2Allocator, file: String, isRepairing: Bool, isReporting: Bool,
        counts: QCOW2ReferenceCounts
    ) throws(DiskError) {
        self.image = image
        self.allocator = allocator
        self.file = file
        self.isRepairing = isRepairing
        self.isReporting = isReporting
        self.counts = counts
        seen = QCOW2SeenTables(clusterCount: image.end.value / image.header.clusterSize + 1)
        // However well a file system compresses tables, they take some space.
        tableLimit = try image.storages[0].storage.allocatedBytes() / image.header.clusterSize * 64 + 4096
    }

    var header: QCOW2Header { image.header }
    var map: QCOW2Map { image.map }
    private var clusterBits: UInt64 { map.clusterBits }
    private var entrySize: UInt64 { 1 << map.entryShift }

    // MARK: - Notes

    /// Notes something that is wrong.
    mutating func note(_ severity: CheckReport.Severity, _ message: String, isRepaired: Bool = false) {
        guard isReporting else { return }
        report.add(.init(severity, file: file, message, isRepaired: isRepaired))
    }

    /// Counts what a range of the file touches; false: it lies outside.
    @discardableResult
    mutating func count(_ offset: UInt64, _ size: UInt64) -> Bool {
        guard size > 0 else { return true }
        let (end, overflow) = offset.addingReportingOverflow(size)
        guard !overflow, end <= image.end.value else { return false }
        for cluster in offset >> clusterBits...(end - 1) >> clusterBits { counts.add(cluster) }
        return true
    }

    // MARK: - All of it

    mutating func run() throws(DiskError) {
        count(0, header.clusterSize)
        try walk(l1Offset: header.l1TableOffset, l1Size: UInt64(header.l1Size), owner: nil)
        try walkSnapshots()
        try walkBitmaps()
        try walkRefcountTable()
    }

    private mutating func walkSnapshots() throws(DiskError) {
        guard header.snapshotCount > 0 else { return }
        let table = QCOW2SnapshotTable(header, image.storages[0].storage)
        var ranges: [(range: Range<UInt64>, name: String)] = [
            (header.l1TableOffset..<header.l1TableOffset + UInt64(header.l1Size) * 8, "the image")
        ]
        var failure: DiskError?
        var size: UInt64 = 0
        do throws(DiskError) {
            size = try table.visit { (snapshot) throws(DiskError) in
                let count = UInt64(snapshot.l1Size) * 8
                let (end, overflow) = snapshot.l1TableOffset.addingReportingOverflow(count)
                let isPossible =
                    !overflow && end <= image.end.value && count <= QCOW2Header.l1ByteLimit
                    && snapshot.l1TableOffset & (header.clusterSize - 1) == 0
                guard isPossible else {
                    note(
                        .loss, "the L1 table of snapshot '\(snapshot.name)' cannot be at byte \(snapshot.l1TableOffset)"
                    )
                    return true
                }
                let range = snapshot.l1TableOffset..<end
                if let other = ranges.first(where: { $0.range.overlaps(range) }) {
                    note(.loss, "snapshot '\(snapshot.name)' has its L1 table in common with \(other.name)")
                    return true
                }
                ranges.append((range, "snapshot '\(snapshot.name)'"))
                try walk(l1Offset: range.lowerBound, l1Size: UInt64(snapshot.l1Size), owner: snapshot.name)
                return true
            }
        } catch {
            guard error.kind == .invalidImage else { throw error }
            failure = error
        }
        if let failure { note(.loss, "the snapshot table is damaged: \(failure.message)") }
        if !count(header.snapshotsOffset, size) { note(.loss, "the snapshot table lies outside the file") }
    }

    // MARK: - L1 and L2 tables

    private mutating func walk(l1Offset: UInt64, l1Size: UInt64, owner: String?) throws(DiskError) {
        count(l1Offset, l1Size * 8)
        seen.beginTable()
        let end = l1Offset + l1Size * 8
        var place = l1Offset
        var tables: UInt64 = 0
        while place < end {
            let entry = try image.table.bigEndian64(at: place)
            if entry == 0 {
                place = max(place + 8, try image.table.endOfRun(of: 0, in: place..<end) & ~7)
                continue
            }
            if let l2Offset = try checkL1Entry(entry, at: place, index: (place - l1Offset) / 8, owner) {
                tables += 1
                guard tables <= tableLimit, report.remaining(.loss) <= Self.lossLimit else {
                    isIncomplete = true
                    note(
                        .loss,
                        "too much is wrong: from L1 entry \((place - l1Offset) / 8)\(of(owner)) on nothing is checked")
                    break
                }
                counts.add(l2Offset >> clusterBits)
                if seen.insert(l2Offset >> clusterBits, entryCount: map.l2EntryCount) {
                    try walkL2(l2Offset, first: ((place - l1Offset) / 8) << (map.coverageShift - clusterBits), owner)
                }
            }
            place += 8
        }
        try forget(l1Offset, place)
    }

    /// Forgets the tables of one L1 table.
    private mutating func forget(_ l1Offset: UInt64, _ end: UInt64) throws(DiskError) {
        var place = l1Offset
        while place < end {
            let entry = try image.table.bigEndian64(at: place)
            if entry == 0 {
                place = max(place + 8, try image.table.endOfRun(of: 0, in: place..<end) & ~7)
                continue
            }
            seen.remove((entry & QCOW2Entry.offsetMask) >> clusterBits)
            place += 8
        }
    }

    /// Where the L2 table lies; nil if it cannot.
    private mutating func checkL1Entry(
        _ entry: UInt64, at place: UInt64, index: UInt64, _ owner: String?
    ) throws(DiskError) -> UInt64? {
        let offset = entry & QCOW2Entry.offsetMask
        if entry & QCOW2Entry.l1Reserved != 0 {
            note(.repairable, "L1 entry \(index)\(of(owner)) has reserved bits set", isRepaired: isRepairing)
            if isRepairing { try store(entry & ~QCOW2Entry.l1Reserved, at: place) }
        }
        guard offset != 0 else { return nil }
        guard offset & (header.clusterSize - 1) == 0, offset + header.clusterSize <= image.end.value else {
            note(
                .loss, "L1 entry \(index)\(of(owner)) puts its L2 table at byte \(offset), where none can be",
                isRepaired: isRepairing)
            if isRepairing { try store(0, at: place) }
            return nil
        }
        return offset
    }

    private func of(_ owner: String?) -> String { owner.map { " of snapshot '\($0)'" } ?? "" }

    func store(_ entry: UInt64, at place: UInt64) throws(DiskError) {
        try allocator.store(entry.byteSwapped, at: place, .entry)
    }

    private mutating func walkL2(_ l2Offset: UInt64, first: UInt64, _ owner: String?) throws(DiskError) {
        let end = l2Offset + header.clusterSize
        var place = l2Offset
        while place < end {
            var entry = try image.table.bigEndian64(at: place)
            var bitmap = QCOW2SubclusterBitmap.none
            if map.hasSubclusters { bitmap = .init(rawValue: try image.table.bigEndian64(at: place + 8)) }
            if entry == 0, bitmap == .none {
                let run = try image.table.endOfRun(of: 0, in: place..<end)
                place = max(place + entrySize, run & ~(entrySize - 1))
                continue
            }
            let cluster = first + (place - l2Offset) >> map.entryShift
            (entry, bitmap) = try checkL2Entry(entry, bitmap, at: place, cluster, owner)
            if entry & QCOW2Entry.compressed != 0 {
                let stored = QCOW2CompressedCluster(entry, clusterBits: clusterBits)
                for host in stored.hostClusters(clusterBits) where host << clusterBits < image.end.value {
                    counts.add(host)
                }
            } else if entry & QCOW2Entry.offsetMask != 0, !header.hasDataFile {
                counts.add((entry & QCOW2Entry.offsetMask) >> clusterBits)
            }
            if isReporting, owner == nil,
                entry & (QCOW2Entry.compressed | QCOW2Entry.offsetMask | QCOW2Entry.copied) != 0
            {
                report.allocatedBlocks += 1
            }
            place += entrySize
        }
    }
}

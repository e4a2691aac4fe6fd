internal import DiskImage
internal import DiskStorage

/// Checks an image: every entry must lead somewhere, every refcount must be the number of entries that lead to its
/// cluster, and those that may be written where they are must be marked so. And puts right what is not.
///
/// What the tables say counts; refcounts and marks are made to agree with it. The memory that it takes is bounded: a
/// large image is walked several times, and each time part of its clusters are counted.
struct QCOW2Repair {
    /// What may be changed.
    enum Kind {
        case nothing
        /// Refcounts and marks, and only if nothing else is wrong.
        case refcounts
        case everything
    }

    private let image: QCOW2Image
    private let allocator: QCOW2Allocator
    private let file: String
    private let pageLimit: Int
    private var report = CheckReport()
    /// Whether there was so much wrong that not all was looked at.
    private var isIncomplete = false

    /// `pageLimit`: of counts that are kept at once.
    init(
        _ image: QCOW2Image, file: String, pageLimit: Int = QCOW2ReferenceCounts.usualPageLimit
    ) throws(DiskError) {
        self.image = image
        self.pageLimit = pageLimit
        self.file = file
        if let allocator = image.allocator {
            self.allocator = allocator
        } else {
            allocator = try QCOW2Allocator(
                image.header, handles: image.storages, tables: image.tables, table: image.table, end: image.end)
        }
    }

    func run(_ kind: Kind) throws(DiskError) -> CheckReport {
        var copy = self
        return try copy.check(kind)
    }

    private var header: QCOW2Header { image.header }
    private var clusterBits: UInt64 { image.map.clusterBits }

    private mutating func check(_ kind: Kind) throws(DiskError) -> CheckReport {
        var badBlocks = try pass(isRepairing: kind == .everything, changesCounts: false)
        report.totalBlocks = image.virtualSize.dividedRoundingUp(by: header.clusterSize)
        let isChanging = !isIncomplete && (kind == .everything || kind == .refcounts && report.remaining(.loss) == 0)
        if isChanging {
            try allocator.writeOut()
            try removeBlocks(badBlocks)
            badBlocks = try pass(isRepairing: false, changesCounts: true)
            try allocator.writeOut()
        }
        try checkMarks(isRepairing: isChanging)
        noteHeader(isRepairing: isChanging)
        if isChanging {
            report.markRepaired([.leak, .repairable])
            try allocator.flushAll()
            if kind == .everything || report.remaining(.repairable) + report.remaining(.loss) == 0 { try clearHeader() }
        }
        return report
    }

    // MARK: - Refcounts

    /// Walks the image as often as it takes, and compares; answers which refcount blocks cannot stay.
    private mutating func pass(isRepairing: Bool, changesCounts: Bool) throws(DiskError) -> [UInt64] {
        var first: UInt64 = 0
        var badBlocks: [UInt64] = []
        let end = image.end.value >> clusterBits
        repeat {
            var walk = try QCOW2TableWalk(
                image, allocator, file: file, isRepairing: isRepairing, isReporting: first == 0 && !changesCounts,
                counts: QCOW2ReferenceCounts(from: first, pageLimit: pageLimit))
            try walk.run()
            let window = walk.counts.window
            isIncomplete = isIncomplete || walk.isIncomplete
            if !isIncomplete {
                try checkBlocks(&walk, isReporting: !changesCounts)
                try compare(walk.counts, window.lowerBound..<min(window.upperBound, end), changes: changesCounts)
            }
            report.merge(walk.report)
            badBlocks += walk.badBlocks
            guard window.upperBound > first, !isIncomplete else { break }
            first = window.upperBound
        } while first < end
        return badBlocks
    }

    /// A refcount block must be used for nothing else.
    private func checkBlocks(_ walk: inout QCOW2TableWalk, isReporting: Bool) throws(DiskError) {
        guard isReporting else { return }
        walk.isReporting = true
        let (offset, entries) = allocator.state.withLock { ($0.refcountTableOffset, $0.refcountTableEntries) }
        var index: UInt64 = 0
        while index < entries {
            let place = offset + index * 8
            let block = try image.table.bigEndian64(at: place) & QCOW2Entry.refcountBlockMask
            if block == 0 {
                let stop = try image.table.endOfRun(of: 0, in: place..<offset + entries * 8)
                index = max(index + 1, (stop - offset) / 8)
                continue
            }
            if walk.isPossibleBlock(block), walk.counts.window.contains(block >> clusterBits) {
                let count = walk.counts[block >> clusterBits]
                if count != 1 {
                    walk.note(
                        .repairable, "refcount block \(index), at byte \(block), is used by \(count - 1) other entries",
                        isRepaired: false)
                    walk.addBadBlock(index)
                }
            }
            index += 1
        }
    }

    /// Compares what was counted in a window with the refcounts, and changes these.
    private mutating func compare(
        _ counts: QCOW2ReferenceCounts, _ window: Range<UInt64>, changes: Bool
    ) throws(DiskError) {
        let perBlock = allocator.perBlockBits
        let perWord = allocator.layout.perWordBits
        let pages = counts.occupiedPages
        var nextPage = 0
        var cluster = window.lowerBound
        while cluster < window.upperBound {
            while nextPage < pages.count, pages[nextPage] <= cluster { nextPage += 1 }
            let isVacant = counts.isVacant(cluster)
            /// Where something is pointed to again.
            let vacancyEnd = min(nextPage < pages.count ? pages[nextPage] : .max, window.upperBound)
            let blockEnd = min(window.upperBound, (cluster >> perBlock + 1) << perBlock)
            guard let block = try usableBlock(cluster >> perBlock) else {
                // All that a block would count has refcount 0.
                if isVacant {
                    cluster = min(try endOfAbsentBlocks(cluster, blockEnd, window.upperBound), vacancyEnd)
                } else {
                    try settle(cluster, stored: 0, counted: counts[cluster], changes)
                    cluster += 1
                }
                continue
            }
            let words = (min(blockEnd, vacancyEnd) - cluster) >> perWord
            if isVacant, cluster & (1 << perWord - 1) == 0, words > 0 {
                // Long runs of free clusters to which nothing points.
                let place = block + (cluster & (1 << perBlock - 1)) >> perWord * 8
                let free = (try image.table.endOfRun(of: 0, in: place..<place + words * 8) - place) / 8
                if free > 0 {
                    cluster += free << perWord
                    continue
                }
            }
            try settle(cluster, stored: allocator.refcount(of: cluster, in: block), counted: counts[cluster], changes)
            cluster += 1
        }
    }

    /// Past refcount blocks that are not there, where nothing points either.
    private func endOfAbsentBlocks(_ cluster: UInt64, _ blockEnd: UInt64, _ end: UInt64) throws(DiskError) -> UInt64 {
        let (offset, entries) = allocator.state.withLock { ($0.refcountTableOffset, $0.refcountTableEntries) }
        let index = cluster >> allocator.perBlockBits
        guard index < entries else { return end }
        let place = offset + index * 8
        let stop = try image.table.endOfRun(of: 0, in: place..<offset + entries * 8)
        let blocks = (stop - place) / 8
        guard blocks > 1 else { return blockEnd }
        if stop == offset + entries * 8 { return end }
        return (index + blocks) << allocator.perBlockBits
    }

    private func usableBlock(_ index: UInt64) throws(DiskError) -> UInt64? {
        let (offset, entries) = allocator.state.withLock { ($0.refcountTableOffset, $0.refcountTableEntries) }
        guard index < entries else { return nil }
        let block = try image.table.bigEndian64(at: offset + index * 8) & QCOW2Entry.refcountBlockMask
        return block != 0 && block & (header.clusterSize - 1) == 0 && block < image.end.value ? block : nil
    }

    private mutating func settle(
        _ cluster: UInt64, stored: UInt64, counted: UInt32, _ changes: Bool
    ) throws(DiskError) {
        guard stored != UInt64(counted) else { return }
        if changes {
            guard UInt64(counted) <= allocator.layout.maximum else { return }
            return try allocator.state.withLock { (state) throws(DiskError) in
                try allocator.setRefcount(UInt64(counted), of: cluster, &state)
            }
        }
        let isTooLarge = UInt64(counted) > allocator.layout.maximum
        // Of very many, those that are not kept need no words.
        let isKept = report.findings.count < CheckReport.limit
        report.add(
            .init(
                isTooLarge ? .loss : stored > UInt64(counted) ? .leak : .repairable, file: file,
                isKept ? "host cluster \(cluster) has refcount \(stored), and is used \(counted) times" : ""))
    }

    /// Takes refcount blocks out of the table: what they count gets new ones.
    private func removeBlocks(_ indexes: [UInt64]) throws(DiskError) {
        guard !indexes.isEmpty else { return }
        let offset = allocator.state.withLock { $0.refcountTableOffset }
        for index in indexes { try allocator.store(0, at: offset + index * 8, .allocationDirectory) }
        try allocator.writeOut()
    }

    // MARK: - Marks

    /// Active entries are marked as ones that may be written where they are if, and only if, their refcount is 1.
    private mutating func checkMarks(isRepairing: Bool) throws(DiskError) {
        var visits = try image.storages[0].storage.allocatedBytes() / header.clusterSize * 64 + 4096
        var seen = QCOW2SeenTables(clusterCount: image.end.value / header.clusterSize + 1)
        var place = header.l1TableOffset
        let end = place + UInt64(header.l1Size) * 8
        while place < end, visits > 0 {
            let entry = try image.table.bigEndian64(at: place)
            if entry == 0 {
                place = max(place + 8, try image.table.endOfRun(of: 0, in: place..<end) & ~7)
                continue
            }
            let l2Offset = entry & QCOW2Entry.offsetMask
            if l2Offset != 0, l2Offset & (header.clusterSize - 1) == 0, l2Offset + header.clusterSize <= image.end.value
            {
                let index = (place - header.l1TableOffset) / 8
                try checkMark(entry, at: place, "the L2 table of L1 entry \(index)", isRepairing)
                visits -= 1
                if seen.insert(l2Offset >> clusterBits, entryCount: image.map.l2EntryCount) {
                    try checkMarks(inTable: l2Offset, index << (image.map.coverageShift - clusterBits), isRepairing)
                }
            }
            place += 8
        }
    }

    private mutating func checkMarks(inTable l2Offset: UInt64, _ first: UInt64, _ isRepairing: Bool) throws(DiskError) {
        // In a file of their own all clusters are.
        guard !header.hasDataFile else { return }
        let entrySize: UInt64 = 1 << image.map.entryShift
        let end = l2Offset + header.clusterSize
        var place = l2Offset
        while place < end {
            let entry = try image.table.bigEndian64(at: place)
            if entry == 0 {
                let stop = try image.table.endOfRun(of: 0, in: place..<end) & ~(entrySize - 1)
                place = max(place + entrySize, stop)
                continue
            }
            let host = entry & QCOW2Entry.offsetMask
            if entry & QCOW2Entry.compressed == 0, host != 0, host & (header.clusterSize - 1) == 0,
                host < image.end.value
            {
                let cluster = first + (place - l2Offset) >> image.map.entryShift
                try checkMark(entry, at: place, "cluster \(cluster)", isRepairing)
            }
            place += entrySize
        }
    }

    private mutating func checkMark(
        _ entry: UInt64, at place: UInt64, _ what: @autoclosure () -> String, _ isRepairing: Bool
    ) throws(DiskError) {
        let cluster = (entry & QCOW2Entry.offsetMask) >> clusterBits
        guard let block = try usableBlock(cluster >> allocator.perBlockBits) else { return }
        let isOnlyOne = try allocator.refcount(of: cluster, in: block) == 1
        guard isOnlyOne != (entry & QCOW2Entry.copied != 0) else { return }
        if isRepairing { try allocator.store((entry ^ QCOW2Entry.copied).byteSwapped, at: place, .entry) }
        report.add(
            .init(
                .repairable, file: file,
                "\(what()) is \(isOnlyOne ? "not " : "")marked as one with refcount 1", isRepaired: isRepairing))
    }

    // MARK: - The header

    private mutating func noteHeader(isRepairing: Bool) {
        if header.incompatible.contains(.corrupt) {
            report.add(.init(.note, file: file, "is marked as corrupt", isRepaired: isRepairing))
        }
        if header.incompatible.contains(.dirty) {
            report.add(
                .init(
                    .note, file: file, "was not closed by its last writer: refcounts may be wrong",
                    isRepaired: isRepairing))
        }
    }

    /// Clears the marks that say that something is wrong.
    private func clearHeader() throws(DiskError) {
        guard !header.incompatible.isDisjoint(with: [.dirty, .corrupt]) else { return }
        var field = FieldWriter(count: 8)
        field.bigEndian(header.incompatible.subtracting([.dirty, .corrupt]).rawValue, at: 0)
        try image.storages[0].storage.write(field.bytes, at: QCOW2Header.incompatibleOffset, for: .header)
        try image.storages[0].storage.flush()
    }
}

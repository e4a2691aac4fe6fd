internal import DiskImage
internal import DiskStorage

/// Looks at every entry of every table: it must lead to a place inside the file that no other entry leads to
/// ("QED Image File Format Specification", Consistency checking).
///
/// Which clusters are in use is noted a bit each, for a *window* of the file at a time; where the file is longer, the
/// tables are gone through once for each window that something lies in. Tables are noted before data, so that of a
/// table and a cluster of data in the same place it is the data that is wrong; else the first on the disk stays.
struct QEDCheck {
    /// Clusters whose use is noted at once: 16 MiB of bits.
    static let windowLimit: UInt64 = 1 << 27
    /// Windows that are looked at: 32 TiB of the smallest clusters, 512 TiB of the usual ones.
    private static let passLimit = 64
    /// Entries that are kept to be passed over, where they may not be cleared.
    private static let droppedLimit = 65_536

    private let header: QEDHeader
    private let storage: any Storage
    private let file: String
    /// Where the file's last whole cluster ends.
    private let end: UInt64
    private let isRepairing: Bool
    private let scanner: QEDTableScanner
    private let windowSize: UInt64

    private(set) var report = CheckReport()
    /// Where those entries stand that lead to places of others; none, if they were cleared.
    private(set) var dropped: Set<UInt64> = []

    /// The first cluster of the window, the bits of those that follow, and the next one in use behind it.
    private var windowStart: UInt64 = 0
    private var used: [UInt64]
    private var nextInUse: UInt64?

    init(
        _ header: QEDHeader, _ storage: any Storage, file: String, length: UInt64, isRepairing: Bool,
        windowLimit: UInt64 = Self.windowLimit
    ) {
        self.header = header
        self.storage = storage
        self.file = file
        self.isRepairing = isRepairing
        end = length & ~(header.clusterSize - 1)
        scanner = QEDTableScanner(storage: storage, tableBytes: header.tableBytes)
        windowSize = min(windowLimit, end >> header.clusterShift)
        used = [UInt64](repeating: 0, count: Int(windowSize / 64 + 1))
    }

    /// Goes through everything. What is repaired is durable when it returns; the header's bit is left as it is.
    mutating func run() throws(DiskError) {
        report.totalBlocks = header.clusterCount
        // First all tables alone, so that none is gone through twice: what that takes is bounded by the file.
        var isFirst = true
        try forEachWindow { (check) throws(DiskError) in
            try check.noteTables(reportsOutside: isFirst)
            isFirst = false
        }
        isFirst = true
        var usedCount: UInt64 = 0
        try forEachWindow { (check) throws(DiskError) in
            try check.noteTables(reportsOutside: false)
            try check.noteClusters(reportsOutside: isFirst)
            usedCount += check.used.reduce(UInt64(0)) { $0 + UInt64($1.nonzeroBitCount) }
            isFirst = false
        }
        if isRepairing, !report.counts.isEmpty { try storage.flush() }
        addLeaks(usedCount)
    }

    // MARK: - Going through

    /// Calls `body` for each window of the file that something lies in, from the first on.
    private mutating func forEachWindow(_ body: (inout QEDCheck) throws(DiskError) -> Void) throws(DiskError) {
        var passes = 0
        var next: UInt64? = header.headerSize
        while let start = next {
            guard passes < Self.passLimit else {
                throw DiskError(
                    .unsupported, "the file is too long for its cluster size to look for clusters that are used twice",
                    image: file)
            }
            passes += 1
            windowStart = start
            nextInUse = nil
            for index in used.indices { used[index] = 0 }
            try body(&self)
            next = nextInUse
        }
    }

    /// The L1 table and all L2 tables.
    private mutating func noteTables(reportsOutside: Bool) throws(DiskError) {
        claim(header.l1TableOffset, header.tableSize)
        let scanner = scanner
        try scanner.forEachEntry(of: header.l1TableOffset) { (place, offset) throws(DiskError) in
            if dropped.contains(place) { return }
            guard isTable(offset) else {
                if reportsOutside { try drop(place, offset, .table(l1Index(place)), isTwice: false) }
                return
            }
            if !claim(offset, header.tableSize) { try drop(place, offset, .table(l1Index(place)), isTwice: true) }
        }
    }

    /// The clusters that all L2 tables lead to.
    private mutating func noteClusters(reportsOutside: Bool) throws(DiskError) {
        let scanner = scanner
        try scanner.forEachEntry(of: header.l1TableOffset) { (l1Place, table) throws(DiskError) in
            guard !dropped.contains(l1Place), isTable(table) else { return }
            let first = l1Index(l1Place) << header.tableShift
            try scanner.forEachEntry(of: table, skipping: QEDTables.zeroCluster) { (place, offset) throws(DiskError) in
                if dropped.contains(place) { return }
                let number = first + (place - table) / 8
                guard isCluster(offset) else {
                    if reportsOutside { try drop(place, offset, .cluster(number), isTwice: false) }
                    return
                }
                if reportsOutside { report.allocatedBlocks += 1 }
                if !claim(offset, 1) { try drop(place, offset, .cluster(number), isTwice: true) }
            }
        }
    }

    private func l1Index(_ place: UInt64) -> UInt64 { (place - header.l1TableOffset) / 8 }

    private func isTable(_ offset: UInt64) -> Bool { header.isTable(offset, end: min(end, TableSet.offsetLimit)) }

    private func isCluster(_ offset: UInt64) -> Bool {
        offset & (header.clusterSize - 1) == 0 && offset >= header.firstClusterOffset && offset < end
    }

    // MARK: - Noting

    /// Notes clusters as used, as far as they lie in the window; false, and nothing is noted, if one of them was.
    @discardableResult
    private mutating func claim(_ offset: UInt64, _ count: UInt64) -> Bool {
        let first = offset >> header.clusterShift
        let windowEnd = windowStart + windowSize
        if first + count > windowEnd {
            let behind = max(first, windowEnd)
            nextInUse = min(nextInUse ?? behind, behind)
        }
        let range = max(first, windowStart)..<max(first, windowStart, min(first + count, windowEnd))
        for cluster in range where isUsed(cluster - windowStart) { return false }
        for cluster in range {
            let index = cluster - windowStart
            used[Int(index / 64)] |= 1 << (index % 64)
        }
        return true
    }

    private func isUsed(_ index: UInt64) -> Bool { used[Int(index / 64)] >> (index % 64) & 1 != 0 }

    /// What an entry leads to.
    private enum Subject {
        case table(UInt64)
        case cluster(UInt64)

        var description: String {
            switch self {
            case .table(let index): "the L2 table for entry \(index) of the L1 table"
            case .cluster(let number): "cluster \(number) of the disk"
            }
        }
    }

    /// An entry that cannot be right: what it stood for shows the backing file, or zeros.
    ///
    /// In an image that was not closed, one that leads out of the file is a write that was not finished when its writer
    /// ended. Anything else is a loss.
    private mutating func drop(
        _ place: UInt64, _ offset: UInt64, _ subject: Subject, isTwice: Bool
    ) throws(DiskError) {
        let isUnfinished = !isTwice && header.features.contains(.needCheck)
        // Text is made for those that are shown.
        var message = ""
        if report.findings.count < CheckReport.limit {
            message =
                "\(subject.description) is said to lie at byte \(offset), "
                + (isTwice ? "where something else lies" : "where none can be inside the file")
                + (isUnfinished ? ": a write that was not finished" : "")
        }
        report.add(.init(isUnfinished ? .repairable : .loss, file: file, message, isRepaired: isRepairing))
        if case .cluster = subject, isTwice { report.allocatedBlocks -= 1 }
        if isRepairing {
            try storage.write([UInt8](repeating: 0, count: 8), at: place, for: .table)
        } else if isTwice {
            guard dropped.count < Self.droppedLimit else {
                throw DiskError(
                    .needsRepair,
                    "more than \(Self.droppedLimit) entries lead to places that others use: "
                        + "run 'vdimg check --repair' first", image: file)
            }
            dropped.insert(place)
        }
    }

    /// Clusters that nothing leads to.
    private mutating func addLeaks(_ usedCount: UInt64) {
        let count = end >> header.clusterShift - min(end >> header.clusterShift, header.headerSize)
        guard usedCount < count else { return }
        report.add(
            .init(
                .leak, file: file,
                "\(count - usedCount) clusters of the file are used by nothing; 'vdimg compact --copy' gives them back")
        )
    }
}

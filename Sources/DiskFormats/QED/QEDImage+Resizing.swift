internal import DiskImage
internal import DiskStorage

/// Another size of the disk: a field of the header. The L1 table reaches as far as it was made for.
///
/// QED has no list of free clusters, so that what a smaller disk gave up inside the file would be lost to it. Clusters
/// behind the disk's end therefore keep their places, as those do that are discarded, and become holes; only what lies
/// at the file's end is cut off. A larger disk finds zeros in them. All that tables lead to is in use, wherever the
/// disk ends: QEMU's check goes through whole tables (block/qed-check.c).
extension QEDImage {
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        try checkResizable(storages[0].storage)
        let limit = QEDHeader.imageSizeLimit(clusterSize: header.clusterSize, tableSize: header.tableSize)
        guard size > 0, size % 512 == 0, size <= limit else {
            throw DiskError(
                .unsupported,
                "a disk of \(size) bytes cannot be: with its tables this image's has a multiple of 512 up to \(limit)")
        }
        let old = header.imageSize
        guard size != old else { return }
        var new = header
        new.imageSize = size
        new.autoclearFeatures = 0
        try flush()
        if size > old {
            try showZeros(behind: old)
            try hideParent(from: header.clusterCount, to: min(size, parentEnd).dividedRoundingUp(by: blockSize))
            try flush()
            try writableFile.writeHeader(new)
        } else {
            let end = try endOfKept(behind: new.clusterCount)
            try writableFile.writeHeader(new)
            try giveUp(behind: new.clusterCount, end)
        }
        header = new
        isResized = true
    }

    // MARK: - Larger

    /// What lies behind the end is seen now.
    private func showZeros(behind size: UInt64) throws(DiskError) {
        let storage = storages[0].storage
        let first = header.clusterCount
        try forEachTable(behind: first) { (table) throws(DiskError) in
            try forEachCluster(of: table, behind: first) { (place, cluster) throws(DiskError) in
                // One that is not zeros was left by a crash, or by another program, and is nobody's.
                if try !isZero(cluster..<cluster + blockSize) { try store(0, at: place, .entry) }
            }
        }
        guard size % blockSize != 0 else { return }
        var batch = ExtentBatch()
        try tables.map(offset: size - 1, length: 1, into: &batch)
        guard batch[0].kind == .data else { return }
        let start = batch[0].fileOffset + 1
        try storage.writeZeros(start..<start + (blockSize - size % blockSize), for: .guestData)
        storages[0].noteWrite()
    }

    private func isZero(_ range: Range<UInt64>) throws(DiskError) -> Bool {
        let storage = storages[0].storage
        guard let data = try storage.nextData(from: range.lowerBound), data.lowerBound < range.upperBound else {
            return true
        }
        var position = range.lowerBound
        while position < range.upperBound {
            let count = Int(min(64 << 10, range.upperBound - position))
            let bytes = try storage.availableBytes(at: position, count: count, for: .guestData)
            guard bytes.allSatisfy({ $0 == 0 }) else { return false }
            position += UInt64(count)
        }
        return true
    }

    /// Makes zeros of clusters that a parent would show; those that have places hold zeros.
    private func hideParent(from first: UInt64, to end: UInt64) throws(DiskError) {
        guard first < end else { return }
        try writableFile.markNeedCheck()
        for cluster in first..<end {
            guard try entry(at: cluster * blockSize) == 0 else { continue }
            if tableSet.needsFlush { try flush() }
            try setEntry(QEDTables.zeroCluster, at: cluster * blockSize)
        }
    }

    // MARK: - Smaller

    /// Passes over the tables in which it is found out what stays; after these all does.
    private static let passLimit = 8

    /// Where the part of the file ends that stays when the disk ends before cluster `first`: behind all clusters of the
    /// disk, all tables that lead to something before that end, and those tables that lie before it.
    private func endOfKept(behind first: UInt64) throws(DiskError) -> UInt64 {
        let scanner = scanner
        var end = max(header.firstClusterOffset, header.l1TableOffset + header.tableBytes)
        for _ in 0..<Self.passLimit {
            let before = end
            try scanner.forEachEntry(of: header.l1TableOffset) { (place, table) throws(DiskError) in
                try expectTable(table, at: place)
                let start = (place - header.l1TableOffset) / 8 << header.tableShift
                var isKept = start < first || table < end
                try scanner.forEachEntry(of: table, skipping: QEDTables.zeroCluster) {
                    (place, cluster) throws(DiskError) in
                    try expectCluster(cluster, at: place)
                    if start + (place - table) / 8 < first { end = max(end, cluster + blockSize) }
                    if cluster < end { isKept = true }
                }
                if isKept { end = max(end, table + header.tableBytes) }
            }
            if end == before { return end }
        }
        return try storages[0].storage.length()
    }

    /// Gives up clusters from `first` of the disk on: what lies behind `end` in the file is cut off, the rest becomes
    /// holes.
    private func giveUp(behind first: UInt64, _ end: UInt64) throws(DiskError) {
        let storage = storages[0].storage
        var holes = FreeBlocks(blockSize: blockSize)
        try forEachTable(behind: first) { (table) throws(DiskError) in
            if table.offset >= end, table.firstCluster >= first { return try store(0, at: table.place, .directory) }
            try forEachCluster(of: table, behind: first) { (place, cluster) throws(DiskError) in
                if cluster >= end { return try store(0, at: place, .entry) }
                holes.add(cluster, isZero: false)
            }
        }
        try flush()
        while let run = holes.take(.max) {
            try storage.discard(run.offset..<run.offset + run.count * blockSize, mustZero: true, for: .guestData)
        }
        if end < (try storage.length()) { try storage.setLength(end) }
        try storage.flush()
    }

    // MARK: - What is behind the end

    private var scanner: QEDTableScanner {
        QEDTableScanner(storage: storages[0].storage, tableBytes: header.tableBytes)
    }

    /// An L2 table.
    struct FoundTable {
        /// Where its entry in the L1 table stands.
        let place: UInt64
        let offset: UInt64
        /// The number of the disk's cluster that its first entry is for.
        let firstCluster: UInt64
    }

    /// Calls `body` with each L2 table that has entries for clusters from `first` of the disk on. All is flushed.
    func forEachTable(
        behind first: UInt64, _ body: (FoundTable) throws(DiskError) -> Void
    ) throws(DiskError) {
        try scanner.forEachEntry(of: header.l1TableOffset) { (place, offset) throws(DiskError) in
            let index = (place - header.l1TableOffset) / 8
            guard (index + 1) << header.tableShift > first else { return }
            try expectTable(offset, at: place)
            try body(FoundTable(place: place, offset: offset, firstCluster: index << header.tableShift))
        }
    }

    /// Calls `body` with the place of each entry for a cluster from `first` of the disk on, and where that lies.
    func forEachCluster(
        of table: FoundTable, behind first: UInt64, _ body: (UInt64, UInt64) throws(DiskError) -> Void
    ) throws(DiskError) {
        try scanner.forEachEntry(of: table.offset, skipping: QEDTables.zeroCluster) {
            (place, cluster) throws(DiskError) in
            guard table.firstCluster + (place - table.offset) / 8 >= first else { return }
            try expectCluster(cluster, at: place)
            try body(place, cluster)
        }
    }

    private func expectTable(_ offset: UInt64, at place: UInt64) throws(DiskError) {
        guard tables.isTable(offset) else { throw damaged("L2 table", offset, at: place) }
    }

    private func expectCluster(_ offset: UInt64, at place: UInt64) throws(DiskError) {
        guard tables.isCluster(offset) else { throw damaged("cluster", offset, at: place) }
    }

    private func damaged(_ what: StaticString, _ offset: UInt64, at place: UInt64) -> DiskError {
        DiskError(
            .needsRepair,
            "an entry puts its \(what) at byte \(offset), where none can be: run 'vdimg check --repair' first",
            image: files[0], offset: place)
    }
}

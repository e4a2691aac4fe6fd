internal import DiskImage
internal import DiskStorage

/// The two-level mapping of an image or of one of its snapshots: an L1 table of L2 tables of clusters. A plain value,
/// so that translation touches no reference count.
@safe
struct QCOW2Map {
    /// The file with the tables.
    let table: Table
    /// Where the L1 table lies, in bytes, and how many entries it has.
    var l1Offset: UInt64
    var l1Size: UInt64
    /// log2 of a cluster's bytes.
    let clusterBits: UInt64
    /// log2 of the bytes of an L2 entry: 3, or 4 with subclusters.
    let entryShift: UInt64
    /// Version 2 knows no zero clusters.
    let knowsZeroClusters: Bool
    /// Guest clusters lie in a file of their own, at the place that they have in the disk.
    let hasDataFile: Bool
    /// Whether clusters that others use too must be told from those that may be written where they are.
    let tellsSharedClusters: Bool
    /// Where the file ends, so far, rounded up to clusters: no entry points beyond.
    let end: FileEnd

    init(
        _ header: QCOW2Header, table: Table, l1Offset: UInt64, l1Size: UInt64, tellsSharedClusters: Bool, end: FileEnd
    ) {
        self.table = table
        self.l1Offset = l1Offset
        self.l1Size = l1Size
        clusterBits = UInt64(header.clusterBits)
        entryShift = header.l2EntryShift
        knowsZeroClusters = header.version >= 3
        hasDataFile = header.hasDataFile
        self.tellsSharedClusters = tellsSharedClusters
        self.end = end
    }

    var clusterSize: UInt64 { 1 << clusterBits }
    var hasSubclusters: Bool { entryShift == 4 }
    /// log2 of the bytes of the disk that one L2 table covers.
    var coverageShift: UInt64 { clusterBits &+ clusterBits &- entryShift }
    /// Entries of an L2 table.
    var l2EntryCount: UInt64 { 1 << (clusterBits &- entryShift) }

    // MARK: - Translation

    @inline(__always)
    func map(_ offset: UInt64, _ length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let inTable = position & (1 << coverageShift &- 1)
            var part = min(length &- done, 1 << coverageShift &- inTable)
            let l1Entry = try table.bigEndian64(at: l1Offset &+ (position >> coverageShift) &* 8)
            let l2Offset = l1Entry & QCOW2Entry.offsetMask
            if l2Offset == 0 {
                if length &- done > 64 << coverageShift { part = try absentTables(position, offset &+ length) }
                guard batch.append(Extent(.absent, length: part)) else { return }
                done &+= part
                continue
            }
            try checkTable(l2Offset, position)
            let isShared = tellsSharedClusters && l1Entry & QCOW2Entry.copied == 0
            let covered =
                hasSubclusters
                ? try mapSubclusters(l2Offset, position, part, isShared, into: &batch)
                : try mapClusters(l2Offset, position, part, isShared, into: &batch)
            done &+= covered
            if covered < part { return }
        }
    }

    /// Maps a range inside one L2 table; answers how many bytes it got through before the batch was full.
    @inline(__always)
    private func mapClusters(
        _ l2Offset: UInt64, _ offset: UInt64, _ length: UInt64, _ isShared: Bool, into batch: inout ExtentBatch
    ) throws(DiskError) -> UInt64 {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let inCluster = position & (clusterSize &- 1)
            var run = min(length &- done, clusterSize &- inCluster)
            let place = l2Offset &+ (position >> clusterBits & (l2EntryCount &- 1)) &* 8
            let entry = try table.bigEndian64(at: place)
            let extent: Extent
            if entry == 0 {
                if length &- done > 256 << clusterBits { run = try absentClusters(place, position, offset &+ length) }
                extent = Extent(.absent, length: run)
            } else if entry & (QCOW2Entry.compressed | QCOW2Entry.zero) == 0 {
                let host = entry & QCOW2Entry.offsetMask
                if host == 0, !hasDataFile || entry & QCOW2Entry.copied == 0 {
                    extent = Extent(.absent, length: run)
                } else {
                    try checkCluster(host, position, place)
                    extent = Extent(
                        isShared || tellsSharedClusters && entry & QCOW2Entry.copied == 0 ? .frozen : .data,
                        length: run, storage: hasDataFile ? 1 : 0, fileOffset: host &+ inCluster)
                }
            } else {
                extent = try unusual(entry, inCluster, run, place)
            }
            guard batch.append(extent) else { return done }
            done &+= run
        }
        return done
    }

    /// Clusters of zeros, and compressed ones.
    @inline(never)
    private func unusual(
        _ entry: UInt64, _ inCluster: UInt64, _ length: UInt64, _ place: UInt64
    ) throws(DiskError) -> Extent {
        if entry & QCOW2Entry.compressed != 0 {
            try checkCompressed(entry, place)
            return Extent(
                .encoded, length: length, fileOffset: entry & (QCOW2Entry.compressed - 1),
                skip: UInt32(truncatingIfNeeded: inCluster))
        }
        guard knowsZeroClusters else {
            throw DiskError(
                .invalidImage, "an L2 entry marks a cluster of zeros, which version 2 does not have", offset: place)
        }
        return Extent(.zero, length: length)
    }

    // MARK: - Long runs

    /// How many bytes from `position` on, up to `end`, have no L2 tables.
    private func absentTables(_ position: UInt64, _ end: UInt64) throws(DiskError) -> UInt64 {
        let first = l1Offset + (position >> coverageShift) * 8
        let last = l1Offset + end.dividedRoundingUp(by: 1 << coverageShift) * 8
        let stop = try table.endOfRun(of: 0, in: first..<last)
        // (Of an entry that is not 0, the first half may be.)
        let tables = max(1, (stop - first) / 8)
        return min(end, (position >> coverageShift + tables) << coverageShift) - position
    }

    /// How many bytes from `position` on, up to `end`, have the L2 entry 0; `place` is where the first entry lies.
    private func absentClusters(
        _ place: UInt64, _ position: UInt64, _ end: UInt64
    ) throws(DiskError) -> UInt64 {
        let first = position >> clusterBits
        let count = end.dividedRoundingUp(by: clusterSize) - first
        let stop = try table.endOfRun(of: 0, in: place..<place + count << entryShift)
        let clusters = max(1, (stop - place) >> entryShift)
        return min(end, (first + clusters) << clusterBits) - position
    }

    // MARK: - What may be in the tables

    @inline(__always)
    func checkTable(_ offset: UInt64, _ position: UInt64) throws(DiskError) {
        guard offset & (clusterSize &- 1) == 0, offset &+ clusterSize <= end.value else {
            throw outside("L2 table", offset, l1Offset &+ (position >> coverageShift) &* 8)
        }
    }

    /// A data cluster must begin at a cluster, inside the file; in a file of its own, at its place in the disk.
    @inline(__always)
    func checkCluster(_ host: UInt64, _ position: UInt64, _ place: UInt64) throws(DiskError) {
        if hasDataFile {
            guard host == position & ~(clusterSize &- 1) else { throw outside("data cluster", host, place) }
        } else {
            guard host & (clusterSize &- 1) == 0, host &+ clusterSize <= end.value else {
                throw outside("data cluster", host, place)
            }
        }
    }

    func checkCompressed(_ entry: UInt64, _ place: UInt64) throws(DiskError) {
        let cluster = QCOW2CompressedCluster(entry, clusterBits: clusterBits)
        guard !hasDataFile, cluster.offset < end.value else {
            throw outside("compressed cluster", cluster.offset, place)
        }
    }

    @inline(never)
    func outside(_ what: StaticString, _ offset: UInt64, _ place: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "an entry puts a \(what) at byte \(offset), where none can be: the file is damaged or cut short, "
                + "'vdimg check' shows more", offset: place)
    }
}

extension Table {
    /// The big-endian 64-bit entry at `offset` (a multiple of 8).
    @inline(__always)
    func bigEndian64(at offset: UInt64) throws(DiskError) -> UInt64 { try entry64(at: offset).byteSwapped }
}

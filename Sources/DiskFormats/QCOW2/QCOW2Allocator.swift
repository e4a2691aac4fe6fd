internal import DiskImage
internal import DiskStorage

/// Takes host clusters of an image that is open for writing, and gives them back, by their refcounts.
///
/// Clusters for data come from those that were given up, then from those with refcount 0 that a bounded search finds,
/// then from the file's end. Tables are made at the end alone, where the file reads as zeros; so no cluster is ever a
/// table after it was data, and what the table cache knows of a place stays true.
///
/// What is written when: a refcount rises before the entry that points to the cluster is written, and sinks after the
/// flush that removed it; a refcount block is written before the refcount table's entry for it. So whatever a power cut
/// leaves, no cluster that is in use has too low a refcount; at worst one that is not has too high a one.
final class QCOW2Allocator: Sendable {
    let handle: StorageHandle
    /// The files that hold guest data.
    private let dataHandles: [StorageHandle]
    let tables: TableSet
    let table: Table
    let clusterBits: UInt64
    let layout: QCOW2RefcountLayout
    /// Where the next cluster at the file's end may begin.
    let end: FileEndCell
    let state: Locked<State>
    /// The length that the file was last told to have. Held where ``end`` moves, so that setting the length cuts
    /// nothing off. A flush takes this lock, never ``state``.
    private let length: Locked<UInt64>
    /// Files read as zeros behind their end, devices do not.
    let hasFixedLength: Bool
    /// Where nothing may go although its refcount be 0: header, L1 table, snapshot table.
    private let metadata: [Range<UInt64>]

    struct State {
        /// Clusters that hold nothing, with refcount 0.
        var free: FreeBlocks
        /// Clusters that entries have ceased to point to since the last flush began.
        var givenUp: [FreeBlocks.Run] = []
        /// The search for clusters with refcount 0: the next cluster to look at, and where to end.
        var searched: UInt64 = 0
        let searchEnd: UInt64
        var refcountTableOffset: UInt64
        var refcountTableEntries: UInt64
    }

    /// Clusters that one allocation looks at in its search.
    private static let searchStep: UInt64 = 4096
    /// Runs of clusters that wait for a flush at most.
    static let givenUpLimit = 32_768

    init(
        _ header: QCOW2Header, handles: [StorageHandle], tables: TableSet, table: Table, end: FileEndCell
    ) throws(DiskError) {
        handle = handles[0]
        dataHandles = handles
        self.tables = tables
        self.table = table
        self.end = end
        clusterBits = UInt64(header.clusterBits)
        layout = QCOW2RefcountLayout(order: header.refcountOrder)
        hasFixedLength = handles[0].storage.traits.hasFixedLength
        // A last cluster that the file holds in part stays as it is until there is a reason to make the file longer.
        length = Locked(hasFixedLength ? try handles[0].storage.length() : end.value)
        metadata = [
            0..<header.clusterSize, header.l1TableOffset..<header.l1TableOffset + UInt64(header.l1Size) * 8,
            header.snapshotsOffset..<header.snapshotsOffset + (header.snapshotCount > 0 ? header.clusterSize : 0),
        ]
        state = Locked(
            State(
                free: FreeBlocks(blockSize: header.clusterSize), searchEnd: end.value >> UInt64(header.clusterBits),
                refcountTableOffset: header.refcountTableOffset,
                refcountTableEntries: header.refcountTableByteCount / 8))
    }

    var clusterSize: UInt64 { 1 << clusterBits }
    /// log2 of the clusters that a refcount block counts.
    var perBlockBits: UInt64 { layout.perBlockBits(clusterBits) }

    // MARK: - Taking

    /// Takes up to `count` clusters for data, in one piece.
    func take(_ count: UInt64) throws(DiskError) -> FreeBlocks.Run {
        try state.withLock { (state) throws(DiskError) in
            if state.free.isEmpty { try search(&state) }
            guard let run = state.free.take(count) else { return try takeAtEnd(count, &state) }
            do throws(DiskError) {
                for number in 0..<run.count { try setRefcount(1, of: run.offset >> clusterBits + number, &state) }
            } catch {
                for number in 0..<run.count { state.free.add(run.offset + number << clusterBits, isZero: false) }
                throw error
            }
            return run
        }
    }

    /// Takes a cluster for a table; it reads as zeros.
    func takeTable() throws(DiskError) -> UInt64 {
        let run = try state.withLock { (state) throws(DiskError) in try takeAtEnd(1, &state) }
        try clear(run)
        return run.offset
    }

    /// Makes a cluster for a table zeros if it may not be.
    func clear(_ run: FreeBlocks.Run) throws(DiskError) {
        guard !run.isZero else { return }
        try handle.storage.writeZeros(run.offset..<run.offset + clusterSize, for: .table)
        handle.noteWrite()
        // A page that holds several clusters may be in the cache already.
        guard clusterSize < 4096 else { return }
        for offset in stride(from: 0, to: clusterSize, by: 8) {
            try store(0, at: run.offset + offset, .allocation)
        }
    }

    /// Takes clusters behind all that the file has.
    func takeAtEnd(_ count: UInt64, _ state: inout State) throws(DiskError) -> FreeBlocks.Run {
        while true {
            let first = end.value >> clusterBits
            let index = first >> perBlockBits
            guard let block = try refcountBlock(index, state) else {
                try addRefcountBlock(index, &state)
                continue
            }
            let limit = min(first + count, (index + 1) << perBlockBits)
            try checkRoom(first, 1)
            var next = first
            while next < limit, hasRoom(next + 1), try refcount(of: next, in: block) == 0 { next += 1 }
            guard next > first else {
                // In use although the file ends before it.
                moveEnd(to: (first + 1) << clusterBits)
                continue
            }
            // Before the first change: what fails from here on is no longer taken to be zeros.
            moveEnd(to: next << clusterBits)
            for cluster in first..<next { try setRefcount(1, of: cluster, &state) }
            return FreeBlocks.Run(offset: first << clusterBits, count: next - first, isZero: !hasFixedLength)
        }
    }

    /// Cuts the file off behind all that has a refcount; everything is durable, and nothing is taken any more.
    func cut(at newEnd: UInt64) throws(DiskError) {
        state.withLock { $0.free = FreeBlocks(blockSize: clusterSize) }
        try length.withLock { (length) throws(DiskError) in
            guard newEnd < end.value, !hasFixedLength else { return }
            end.value = newEnd
            length = newEnd
            try handle.storage.setLength(newEnd)
            try handle.storage.flush()
        }
    }

    func moveEnd(to value: UInt64) { length.withLock { _ in end.value = value } }

    private func hasRoom(_ clusters: UInt64) -> Bool {
        let limit = hasFixedLength ? length.withLock { $0 } : QCOW2Entry.offsetMask
        return clusters <= limit >> clusterBits
    }

    func checkRoom(_ first: UInt64, _ count: UInt64) throws(DiskError) {
        guard hasRoom(first + count) else {
            throw DiskError(.system, "the image is full", image: handle.storage.name, errno: 28)  // ENOSPC
        }
    }

    /// Looks for clusters with refcount 0 in the next part of the file as it was found.
    private func search(_ state: inout State) throws(DiskError) {
        let stop = min(state.searchEnd, state.searched + Self.searchStep)
        while state.searched < stop {
            let cluster = state.searched
            let block = try refcountBlock(cluster >> perBlockBits, state)
            let blockEnd = min(stop, (cluster >> perBlockBits + 1) << perBlockBits)
            for candidate in cluster..<blockEnd {
                let isFree = if let block { try refcount(of: candidate, in: block) == 0 } else { true }
                if isFree, !isMetadata(candidate, state) {
                    state.free.add(candidate << clusterBits, isZero: false)
                }
            }
            state.searched = blockEnd
        }
    }

    private func isMetadata(_ cluster: UInt64, _ state: State) -> Bool {
        let place = cluster << clusterBits..<(cluster + 1) << clusterBits
        let table = state.refcountTableOffset..<state.refcountTableOffset + state.refcountTableEntries * 8
        return place.overlaps(table) || metadata.contains { place.overlaps($0) }
    }

    // MARK: - Giving back

    /// Gives back clusters that were taken and to which nothing has pointed.
    func putBack(_ offset: UInt64, _ count: UInt64) {
        state.withLock { state in
            for cluster in offset >> clusterBits..<offset >> clusterBits + count {
                do throws(DiskError) {
                    try setRefcount(0, of: cluster, &state)
                    state.free.add(cluster << clusterBits, isZero: false)
                } catch {
                    // It stays taken: space is lost until the next check.
                    continue
                }
            }
        }
    }

    /// Takes note that one entry less points to each of these clusters. `isZero`: nothing else points there, and their
    /// space was given back to the file system.
    func giveUp(_ offset: UInt64, count: UInt64 = 1, isZero: Bool = false) {
        state.withLock { state in
            if let last = state.givenUp.last, last.isZero == isZero, last.offset + last.count << clusterBits == offset {
                state.givenUp[state.givenUp.count - 1].count += count
            } else {
                state.givenUp.append(FreeBlocks.Run(offset: offset, count: count, isZero: isZero))
            }
        }
    }

    /// Whether so much was given up that a flush should come first.
    var needsFlush: Bool { tables.needsFlush || state.withLock { $0.givenUp.count >= Self.givenUpLimit } }

    // MARK: - Flushing

    /// Makes data and tables durable, and then what was given up before the call free.
    func flush() throws(DiskError) {
        let givenUp = state.withLock { state in
            defer { state.givenUp = [] }
            return state.givenUp
        }
        do throws(DiskError) {
            try writeOut()
        } catch {
            state.withLock { $0.givenUp = givenUp + $0.givenUp }
            throw error
        }
        try release(givenUp)
    }

    /// The same, until nothing waits any more.
    func flushAll() throws(DiskError) {
        repeat { try flush() } while tables.isDirty
    }

    /// Makes data and tables durable. May be called under the lock of ``state``.
    func writeOut() throws(DiskError) {
        try tables.flush { () throws(DiskError) in
            try growFile()
            for handle in dataHandles { try handle.flushIfWritten() }
        }
    }

    /// Makes the file long enough for all that was taken, before anything points there.
    private func growFile() throws(DiskError) {
        guard !hasFixedLength else { return }
        try length.withLock { (length) throws(DiskError) in
            let wanted = end.value
            guard length < wanted else { return }
            if try handle.storage.length() < wanted { try handle.storage.setLength(wanted) }
            length = wanted
            handle.noteWrite()
        }
    }

    /// Lowers refcounts: no entry on the disk points there any more.
    private func release(_ givenUp: [FreeBlocks.Run]) throws(DiskError) {
        for (number, run) in givenUp.enumerated() {
            let first = run.offset >> clusterBits
            for cluster in first..<first + run.count {
                do throws(DiskError) {
                    try release(cluster, isZero: run.isZero)
                } catch {
                    let rest = FreeBlocks.Run(
                        offset: cluster << clusterBits, count: first + run.count - cluster, isZero: run.isZero)
                    state.withLock { $0.givenUp = [rest] + givenUp[(number + 1)...] + $0.givenUp }
                    throw error
                }
            }
        }
    }

    private func release(_ cluster: UInt64, isZero: Bool) throws(DiskError) {
        var isZero = isZero
        if !isZero {
            // Its space goes back while its refcount keeps others away.
            let isLast = try state.withLock { (state) throws(DiskError) in try refcount(of: cluster, state) == 1 }
            if isLast {
                let place = cluster << clusterBits
                try handle.discard(place..<min(place + clusterSize, end.value), for: .guestData)
                isZero = true
            }
        }
        try state.withLock { (state) throws(DiskError) in
            let count = try refcount(of: cluster, state)
            guard count > 0 else { return }
            try setRefcount(count - 1, of: cluster, &state)
            // What the search has still to come to it will find itself.
            if count == 1, !(state.searched..<max(state.searched, state.searchEnd)).contains(cluster) {
                state.free.add(cluster << clusterBits, isZero: isZero)
            }
        }
    }
}

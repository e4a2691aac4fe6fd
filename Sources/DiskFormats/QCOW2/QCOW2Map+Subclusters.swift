internal import DiskImage
internal import DiskStorage

/// An extended L2 entry: where the cluster is, and what its 32 subclusters are.
struct QCOW2ExtendedEntry: Equatable, Sendable {
    var entry: UInt64
    var bitmap: QCOW2SubclusterBitmap
}

extension QCOW2Map {
    /// log2 of the bytes of a subcluster.
    var subclusterBits: UInt64 { clusterBits &- 5 }

    /// The extended entry at `place`. Its halves are loaded one by one; a change in between is noticed.
    func extendedEntry(at place: UInt64) throws(DiskError) -> QCOW2ExtendedEntry {
        var first = try table.bigEndian64(at: place)
        while true {
            let bitmap = try table.bigEndian64(at: place &+ 8)
            let again = try table.bigEndian64(at: place)
            if again == first { return QCOW2ExtendedEntry(entry: first, bitmap: .init(rawValue: bitmap)) }
            first = again
        }
    }

    /// Maps a range inside one L2 table of extended entries; answers how many bytes it got through before the batch was
    /// full.
    func mapSubclusters(
        _ l2Offset: UInt64, _ offset: UInt64, _ length: UInt64, _ isShared: Bool, into batch: inout ExtentBatch
    ) throws(DiskError) -> UInt64 {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let place = l2Offset &+ (position >> clusterBits & (l2EntryCount &- 1)) &* 16
            let pair = try extendedEntry(at: place)
            let inCluster = position & (clusterSize &- 1)
            var run = min(length &- done, clusterSize &- inCluster)
            let extent: Extent
            if pair.entry & QCOW2Entry.compressed != 0 {
                try checkCompressed(pair.entry, place)
                extent = Extent(
                    .encoded, length: run, fileOffset: pair.entry & (QCOW2Entry.compressed - 1),
                    skip: UInt32(truncatingIfNeeded: inCluster))
            } else {
                let first = inCluster >> subclusterBits
                run = min(run, (first &+ pair.bitmap.runLength(first)) << subclusterBits &- inCluster)
                extent = try subclusters(pair, position, run, isShared, place)
            }
            guard batch.append(extent) else { return done }
            done &+= run
        }
        return done
    }

    /// The extent of a range of subclusters in one state.
    private func subclusters(
        _ pair: QCOW2ExtendedEntry, _ position: UInt64, _ length: UInt64, _ isShared: Bool, _ place: UInt64
    ) throws(DiskError) -> Extent {
        let inCluster = position & (clusterSize &- 1)
        switch pair.bitmap.state(inCluster >> subclusterBits) {
        case .unallocated: return Extent(.absent, length: length)
        case .zero: return Extent(.zero, length: length)
        case .allocated:
            let host = pair.entry & QCOW2Entry.offsetMask
            let isCopied = pair.entry & QCOW2Entry.copied != 0
            guard host != 0 || hasDataFile && isCopied else { throw outside("subcluster", host, place) }
            try checkCluster(host, position, place)
            return Extent(
                isShared || tellsSharedClusters && !isCopied ? .frozen : .data, length: length,
                storage: hasDataFile ? 1 : 0, fileOffset: host &+ inCluster)
        case .invalid:
            throw DiskError(
                .invalidImage, "an extended L2 entry says that a subcluster is stored and that it is zeros",
                offset: place)
        }
    }
}

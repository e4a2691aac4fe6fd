internal import DiskImage
internal import DiskStorage

/// Clusters of data at the file's end move to clusters that nothing uses; tables, compressed clusters and what internal
/// snapshots hold stay.
extension QCOW2Image {
    var released: [ReleasedPlaces] { [releasedPlaces] }
    /// What is read without this image must stay.
    var givesUpBlocks: Bool { !keepsRawData }
    /// An entry may mark a cluster as zeros, and keep its place.
    var zeroBlocksMayHavePlaces: Bool { true }

    func planShrinking() throws(DiskError) -> Bool {
        try openAllocator.flushAll()
        guard var places = try usedPlaces() else { return false }
        if !header.hasDataFile { try noteMovable(&places) }
        let plan = places.plan()
        mover.begin([0: plan])
        return min(plan.end, places.end) < end.value
    }

    func stopShrinking() { mover.end() }

    func finishShrinking() throws(DiskError) {
        try openAllocator.flushAll()
        guard let places = try usedPlaces() else { return }
        try openAllocator.cut(at: places.end)
    }

    /// All clusters with a refcount: they stay.
    private func usedPlaces() throws(DiskError) -> FilePlaces? {
        let allocator = openAllocator
        guard !allocator.hasFixedLength, var places = FilePlaces(unit: header.clusterSize, length: end.value) else {
            return nil
        }
        try allocator.forEachUsedCluster { cluster in
            places.keep(cluster << map.clusterBits..<(cluster + 1) << map.clusterBits)
        }
        return places
    }

    /// Clusters of data that nothing else uses can move.
    private func noteMovable(_ places: inout FilePlaces) throws(DiskError) {
        var batch = ExtentBatch()
        var position: UInt64 = 0
        while position < virtualSize {
            batch.removeAll()
            try map(offset: position, length: virtualSize - position, into: &batch)
            for number in 0..<batch.count {
                let extent = batch[number]
                guard extent.kind == .data else { continue }
                // (Of a cluster that is stored in parts, the rest of it may be in use too.)
                var offset = (extent.fileOffset + header.clusterSize - 1) & ~(header.clusterSize - 1)
                while offset + header.clusterSize <= extent.fileOffset + extent.length {
                    places.release(offset)
                    offset += header.clusterSize
                }
            }
            position += batch.coveredLength
        }
    }

    // MARK: - Moving

    func allowRelocation() {}
    var needsRelocation: Bool { mover.isMoving }
    func nextRelocation() throws(DiskError) -> Relocation? { try mover.next(in: self) }

    func commit(_ relocation: Relocation) throws(DiskError) {
        if openAllocator.needsFlush { try flush() }
        try openAllocator.takePlace(relocation.target)
        do throws(DiskError) {
            try enter(
                relocation.target, relocation.offset >> map.clusterBits,
                relocation.offset..<relocation.offset + relocation.length)
        } catch {
            openAllocator.putBack(relocation.target, 1)
            throw error
        }
    }

    func abandon(_ relocation: Relocation) {}
}

extension QCOW2Allocator {
    /// Calls `body` with the numbers of all clusters before the file's end that have a refcount.
    func forEachUsedCluster(_ body: (UInt64) -> Void) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            let count = end.value >> clusterBits
            var cluster: UInt64 = 0
            while cluster < count {
                let blockEnd = min(count, (cluster >> perBlockBits + 1) << perBlockBits)
                if let block = try refcountBlock(cluster >> perBlockBits, state) {
                    for candidate in cluster..<blockEnd where try refcount(of: candidate, in: block) > 0 {
                        body(candidate)
                    }
                }
                cluster = blockEnd
            }
        }
    }

    /// Takes a cluster that has no refcount.
    func takePlace(_ offset: UInt64) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            guard try refcount(of: offset >> clusterBits, state) == 0 else {
                throw DiskError(
                    .invalidImage, "the cluster at byte \(offset) is in use although it was free",
                    image: handle.storage.name)
            }
            try setRefcount(1, of: offset >> clusterBits, &state)
        }
    }
}

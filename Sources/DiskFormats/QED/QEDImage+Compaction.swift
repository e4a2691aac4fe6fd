internal import DiskImage
internal import DiskStorage

/// Clusters at the file's end move to places that nothing leads to; tables stay. QED has no list of free clusters, so
/// that what is in use is what the tables lead to.
extension QEDImage {
    var released: [ReleasedPlaces] { [releasedPlaces] }

    func planShrinking() throws(DiskError) -> Bool {
        try dropBehindEnd()
        guard let places = try places() else { return false }
        let plan = places.plan()
        mover.begin([0: plan])
        return min(plan.end, places.end) < end.value
    }

    func stopShrinking() { mover.end() }

    func finishShrinking() throws(DiskError) {
        guard let places = try places(), places.end < end.value else { return }
        try writableFile.markNeedCheck()
        try writableFile.cut(at: places.end)
    }

    /// What a larger disk has left behind the end is of no use.
    private func dropBehindEnd() throws(DiskError) {
        let first = header.clusterCount
        var hasBegun = false
        func clear(_ place: UInt64, _ order: WriteOrder) throws(DiskError) {
            if !hasBegun { try beginWriting() }
            hasBegun = true
            try writableFile.markNeedCheck()
            try store(0, at: place, order)
        }
        try forEachTable(behind: first) { (table) throws(DiskError) in
            if table.firstCluster >= first { return try clear(table.place, .directory) }
            try forEachCluster(of: table, behind: first) { (place, _) throws(DiskError) in try clear(place, .entry) }
        }
        try flush()
    }

    private func places() throws(DiskError) -> FilePlaces? {
        guard var places = FilePlaces(unit: blockSize, length: end.value) else { return nil }
        places.keep(0..<tables.firstClusterOffset)
        places.keep(tables.l1TableOffset..<tables.l1TableOffset + tables.tableBytes)
        var position: UInt64 = 0
        while position < virtualSize {
            let l2 = try tables.table.entry64(at: tables.l1Place(position))
            let next = position + tables.tableCoverage - position % tables.tableCoverage
            if l2 != 0 {
                places.keep(l2..<l2 + tables.tableBytes)
                try note(from: position, to: min(next, virtualSize), &places)
            }
            position = next
        }
        let first = header.clusterCount
        try forEachTable(behind: first) { (table) throws(DiskError) in
            places.keep(table.offset..<table.offset + tables.tableBytes)
            try forEachCluster(of: table, behind: first) { (_, cluster) throws(DiskError) in
                places.keep(cluster..<cluster + blockSize)
            }
        }
        return places
    }

    private func note(from start: UInt64, to stop: UInt64, _ places: inout FilePlaces) throws(DiskError) {
        var batch = ExtentBatch()
        var position = start
        while position < stop {
            batch.removeAll()
            try map(offset: position, length: stop - position, into: &batch)
            for number in 0..<batch.count where batch[number].kind == .data {
                let extent = batch[number]
                for offset in stride(
                    from: extent.fileOffset, to: extent.fileOffset + extent.length, by: Int(blockSize))
                {
                    places.addBlock(at: offset)
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
        try writableFile.markNeedCheck()
        try setEntry(relocation.target, at: relocation.offset)
        _ = releasedPlaces.add(relocation.source..<relocation.source + blockSize, in: storages[0])
    }

    func abandon(_ relocation: Relocation) {}
}

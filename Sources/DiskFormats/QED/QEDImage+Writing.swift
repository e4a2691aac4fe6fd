internal import DiskImage
internal import DiskStorage

extension QEDImage {
    var writableFile: QEDFile {
        guard let file else { preconditionFailure("a change of an image that was opened read-only") }
        return file
    }

    /// Bits of features that would no longer be true go before the first change.
    func beginWriting() throws(DiskError) {
        if header.autoclearFeatures != 0 { try writableFile.clearAutoclearFeatures() }
    }

    // MARK: - Allocation

    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        if tableSet.needsFlush { try flush() }
        let file = writableFile
        try file.markNeedCheck()
        let first = offset & ~(blockSize - 1)
        let wanted = (min(offset + length, virtualSize) - first).dividedRoundingUp(by: blockSize)
        let run = try file.takeClusters(wanted)
        return Reservation(
            offset: first, length: min(run.count * blockSize, virtualSize - first), storage: 0,
            fileOffset: run.offset, isZero: run.isZero)
    }

    func commit(_ reservation: consuming Reservation) throws(DiskError) {
        for number in 0..<reservation.length.dividedRoundingUp(by: blockSize) {
            let distance = number * blockSize
            try setEntry(reservation.fileOffset + distance, at: reservation.offset + distance)
        }
    }

    func abandon(_ reservation: consuming Reservation) {
        writableFile.putBack(
            reservation.fileOffset, count: reservation.length.dividedRoundingUp(by: blockSize))
    }

    /// Sets the entry of the cluster at `position` of the disk, making its L2 table first if there is none.
    func setEntry(_ entry: UInt64, at position: UInt64) throws(DiskError) {
        var l2 = try tables.table.entry64(at: tables.l1Place(position))
        if l2 == 0 { l2 = try addTable(at: tables.l1Place(position)) }
        guard tables.isTable(l2) else {
            throw DiskError(
                .needsRepair,
                "an entry of the L1 table puts an L2 table at byte \(l2), where none can be: "
                    + "run 'vdimg check --repair' first", image: files[0], offset: tables.l1Place(position))
        }
        let index = position % tables.tableCoverage / blockSize
        try store(entry, at: l2 + index * 8, .entry)
    }

    /// Makes an L2 table and enters it in the L1 table, unless another thread has just done so.
    private func addTable(at place: UInt64) throws(DiskError) -> UInt64 {
        try addingTable.withLock { (_) throws(DiskError) in
            let existing = try tables.table.entry64(at: place)
            if existing != 0 { return existing }
            let offset = try writableFile.takeTable(tables.tableBytes)
            try store(offset, at: place, .directory)
            return offset
        }
    }

    /// Stores an entry; if no page is free for it, after a flush.
    func store(_ entry: UInt64, at offset: UInt64, _ order: WriteOrder) throws(DiskError) {
        while try !tables.table.store64(entry, at: offset, order) { try flush() }
    }

    // MARK: - Discarding

    /// Unallocated clusters become zero clusters. Allocated ones keep their place, which the disk makes a hole: the
    /// format has no list of free clusters, and one that nothing points to would be lost to all but a compaction (which
    /// gives them up, as it is there to find another use for their places).
    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        var batch = ExtentBatch()
        var position = offset
        while position < offset + length {
            batch.removeAll()
            try tables.map(offset: position, length: offset + length - position, into: &batch)
            for number in 0..<batch.count where batch[number].kind == .data && !releasedPlaces.isActive { return false }
            position += batch.coveredLength
        }
        let wanted = kind == .zero ? QEDTables.zeroCluster : 0
        for cluster in offset / blockSize..<(offset + length).dividedRoundingUp(by: blockSize) {
            let old = try entry(at: cluster * blockSize)
            guard old != wanted else { continue }
            if tableSet.needsFlush { try flush() }
            try writableFile.markNeedCheck()
            try setEntry(wanted, at: cluster * blockSize)
            if old > QEDTables.zeroCluster {
                // A compaction fills the place with another cluster, or cuts it off.
                _ = releasedPlaces.add(old..<old + blockSize, in: storages[0])
            }
        }
        return true
    }

    /// The entry of the cluster at `position` of the disk; 0 where there is no table.
    func entry(at position: UInt64) throws(DiskError) -> UInt64 {
        let l2 = try tables.table.entry64(at: tables.l1Place(position))
        guard l2 != 0, tables.isTable(l2) else { return 0 }
        return try tables.table.entry64(at: l2 + position % tables.tableCoverage / blockSize * 8)
    }

    // MARK: - Durability

    func flush() throws(DiskError) {
        guard let file else { return }
        try tableSet.flush { () throws(DiskError) in try file.flushData() }
    }

    /// The bit that says that the image needs a check is cleared last. What was found set when it was opened was
    /// checked then.
    func close() throws(DiskError) {
        guard let file else { return }
        if !isResized { try flush() }
        try file.clearNeedCheck()
    }
}

internal import DiskImage
internal import DiskStorage

extension VMDKImage {
    /// The content gets a new identity at the first change after an open: VMware's CID, VirtualBox's modification UUID.
    func beginWriting() throws(DiskError) {
        try checkDiskIsWritable()
        if keepsIdentity { return }
        try descriptor.withLock { (file) throws(DiskError) in
            var text = file.text
            text.renewContentIdentity()
            try file.replace(with: text)
        }
    }

    // MARK: - Allocation

    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        let index = extentIndex(of: offset)
        let extent = extents[index]
        guard let file = extent.writer, let grains = extent.map.grains else {
            throw DiskError(
                .readOnly, "this part of the disk cannot be written: it is not a writable sparse extent",
                image: files.first)
        }
        if tables.needsFlush { try flush() }
        try file.markUnclean()
        let inExtent = offset - extent.map.start
        let first = inExtent & ~(grains.grainSize - 1)
        let last = min(inExtent + length, extent.map.length)
        let wanted = (last - first).dividedRoundingUp(by: grains.grainSize)
        let space = try file.takeGrains(wanted)
        return Reservation(
            offset: extent.map.start + first,
            length: min(space.count * grains.grainSize, extent.map.length - first),
            storage: extent.map.storage, fileOffset: space.offset, isZero: space.isZero)
    }

    func commit(_ reservation: consuming Reservation) throws(DiskError) {
        let extent = extents[extentIndex(of: reservation.offset)]
        guard let file = extent.writer, let grains = extent.map.grains else {
            preconditionFailure("a reservation in an extent that has no space")
        }
        let first = (reservation.offset - extent.map.start) >> grains.grainShift
        for number in 0..<reservation.length.dividedRoundingUp(by: grains.grainSize) {
            let sector = UInt32(truncatingIfNeeded: (reservation.fileOffset + number * grains.grainSize) / 512)
            try setEntry(sector, grain: first + number, grains, file)
        }
    }

    func abandon(_ reservation: consuming Reservation) {
        let extent = extents[extentIndex(of: reservation.offset)]
        guard let file = extent.writer, let grains = extent.map.grains else { return }
        for number in 0..<reservation.length.dividedRoundingUp(by: grains.grainSize) {
            file.grains.putBack(reservation.fileOffset + number * grains.grainSize)
        }
    }

    /// Sets the entry of a grain in its table and in the table's copy, making the tables first if there are none.
    func setEntry(
        _ sector: UInt32, grain: UInt64, _ grains: VMDKGrainTables, _ file: VMDKSparseFile
    ) throws(DiskError) {
        for directory in [grains.directoryOffset, grains.redundantDirectoryOffset] where directory != 0 {
            let place = directory + (grain >> grains.tableShift) * 4
            var tableSector = try grains.table.entry32(at: place)
            if tableSector == 0 { tableSector = try addTable(at: place, grains, file) }
            guard UInt64(tableSector) * 512 + 4 << grains.tableShift <= file.end.value else {
                throw DiskError(
                    .needsRepair,
                    "a directory entry puts a grain table at sector \(tableSector), outside the file: "
                        + "run 'vdimg check --repair' first", image: file.handle.storage.name, offset: place)
            }
            let inTable = grain & (1 << grains.tableShift - 1)
            try store(sector, at: UInt64(tableSector) * 512 + inTable * 4, .entry, grains.table)
        }
    }

    /// Makes a grain table and enters it in a directory, unless another thread has just done so.
    private func addTable(
        at place: UInt64, _ grains: VMDKGrainTables, _ file: VMDKSparseFile
    ) throws(DiskError) -> UInt32 {
        try addingTable.withLock { (_) throws(DiskError) in
            let existing = try grains.table.entry32(at: place)
            if existing != 0 { return existing }
            let sector = UInt32(truncatingIfNeeded: try file.takeTable(4 << grains.tableShift) / 512)
            try store(sector, at: place, .directory, grains.table)
            return sector
        }
    }

    /// Stores an entry; if no page is free for it, after a flush.
    private func store(_ value: UInt32, at offset: UInt64, _ order: WriteOrder, _ table: Table) throws(DiskError) {
        while try !table.store32(value, at: offset, order) { try flush() }
    }

    // MARK: - Discarding

    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        let range = extentIndex(of: offset)...extentIndex(of: offset + length - 1)
        for index in range {
            guard extents[index].writer != nil, let grains = extents[index].map.grains else { return false }
            if kind == .zero, !grains.hasZeroGrains { return false }
        }
        for index in range {
            let map = extents[index].map
            let start = max(offset, map.start) - map.start
            let end = min(offset + length, map.start + map.length) - map.start
            try drop(start..<end, in: extents[index], entry: kind == .zero ? 1 : 0)
        }
        return true
    }

    private func drop(_ range: Range<UInt64>, in extent: VMDKOpenExtent, entry: UInt32) throws(DiskError) {
        guard let file = extent.writer, let grains = extent.map.grains else { return }
        try file.markUnclean()
        for grain in range.lowerBound >> grains.grainShift..<range.upperBound.dividedRoundingUp(by: grains.grainSize) {
            if tables.needsFlush { try flush() }
            let tableSector = try grains.table.entry32(at: grains.directoryOffset + (grain >> grains.tableShift) * 4)
            var old: UInt32 = 0
            if tableSector != 0 {
                let inTable = grain & (1 << grains.tableShift - 1)
                old = try grains.table.entry32(at: UInt64(tableSector) * 512 + inTable * 4)
            }
            guard old != entry else { continue }
            try setEntry(entry, grain: grain, grains, file)
            if old > 1 || old == 1 && !grains.hasZeroGrains { try file.giveUp(UInt64(old) * 512) }
        }
    }

    // MARK: - Durability

    func flush() throws(DiskError) {
        let givenUp = extents.map { $0.writer?.grains.beginFlush() }
        do throws(DiskError) {
            try tables.flush { () throws(DiskError) in
                for extent in extents { try extent.writer?.flushData() }
                for handle in storages { try handle.flushIfWritten() }
            }
        } catch {
            endFlush(givenUp, succeeded: false)
            throw error
        }
        endFlush(givenUp, succeeded: true)
    }

    private func endFlush(_ givenUp: [FreeBlocks?], succeeded: Bool) {
        for (extent, grains) in zip(extents, givenUp) {
            if let grains { extent.writer?.grains.endFlush(grains, succeeded: succeeded) }
        }
    }

    func close() throws(DiskError) {
        guard isWritable else { return }
        try flush()
        for extent in extents { try extent.writer?.markClean(wasUnclean: extent.wasUnclean) }
    }
}

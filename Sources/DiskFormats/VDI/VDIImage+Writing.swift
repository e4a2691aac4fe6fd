internal import DiskImage
internal import DiskStorage

extension VDIImage {
    /// The modification UUID changes, durably, before the first change after an open: children see by it that their
    /// parent is not what it was.
    func beginWriting() throws(DiskError) {
        if keepsIdentity { return space.allowShrinking() }
        let uuid = DiskUUID.random()
        let words = FieldReader(uuid.mixedEndian)
        for offset in stride(from: 0, to: 16, by: 4) {
            let word: UInt32 = try words.littleEndian(at: offset)
            while try !table.store32(word, at: header.modificationUUIDOffset + UInt64(offset), .header) {
                try tables.flush {}
            }
        }
        try tables.flush {}
        stored.withLock { $0.modificationUUID = uuid }
        space.allowShrinking()
    }

    // MARK: - Allocation

    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        if tables.needsFlush { try flush() }
        let first = offset & ~(blockSize - 1)
        let run = try take((min(offset + length, virtualSize) - first).dividedRoundingUp(by: blockSize))
        let fileOffset = space.offset(of: run.offset)
        var isZero = run.isZero
        if isZeroExpanding {
            do throws(DiskError) {
                try storages[0].storage.writeZeros(
                    fileOffset..<fileOffset + (run.count - 1) * header.stride + blockSize, for: .guestData)
            } catch {
                for number in 0..<run.count {
                    space.addFree(.init(offset: run.offset + number, count: 1, isZero: false))
                }
                throw error
            }
            storages[0].noteWrite()
            isZero = true
        }
        return Reservation(
            offset: first, length: min(run.count * blockSize, virtualSize - first), storage: 0, fileOffset: fileOffset,
            isZero: isZero)
    }

    /// Whether the space of a new block is taken as a whole, by writing zeros.
    private var isZeroExpanding: Bool { header.flags & VDIHeader.zeroExpand != 0 }

    private func take(_ count: UInt64) throws(DiskError) -> FreeBlocks.Run {
        while true {
            switch space.take(count) {
            case .places(let run): return run
            case .noneYet: try flush()
            case .none:
                throw DiskError(
                    .system,
                    "the file has no place for another block, although blocks of it are used by nothing: "
                        + "run 'vdimg check --repair'", image: files[0], errno: 28)  // ENOSPC
            }
        }
    }

    func commit(_ reservation: consuming Reservation) throws(DiskError) {
        let first = reservation.offset / blockSize
        let place = space.place(at: reservation.fileOffset)
        let count = reservation.length.dividedRoundingUp(by: blockSize)
        while try !space.cover(place + count) { try flush() }
        for number in 0..<count {
            try store(UInt32(truncatingIfNeeded: place + number), block: first + number)
        }
    }

    func abandon(_ reservation: consuming Reservation) {
        let count = reservation.length.dividedRoundingUp(by: blockSize)
        space.addFree(.init(offset: space.place(at: reservation.fileOffset), count: count, isZero: false))
    }

    /// Stores an entry; if no page is free for it, after a flush.
    func store(_ entry: UInt32, block: UInt64) throws(DiskError) {
        while try !table.store32(entry, at: entryOffset(block), .entry) { try flush() }
    }

    // MARK: - Discarding

    /// A fixed image keeps all its blocks.
    var dropsZeroBlocks: Bool { header.type != .fixed && !isZeroExpanding }

    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        guard header.type != .fixed else { return false }
        let wanted = kind == .zero ? VDIEntry.zero : VDIEntry.free
        var position = offset
        while position < offset + length {
            let block = position / blockSize
            let entry = try table.entry32(at: entryOffset(block))
            if entry == wanted {
                position = try endOfRun(of: wanted, position, offset + length)
                continue
            }
            if tables.needsFlush { try flush() }
            try store(wanted, block: block)
            if entry < VDIEntry.zero { try giveUp(UInt64(entry)) }
            position = (block + 1) * blockSize
        }
        return true
    }

    /// Gives up the place of a block whose entry was just removed: its space goes back to the file system, and to us
    /// after a flush.
    private func giveUp(_ place: UInt64) throws(DiskError) {
        let start = space.offset(of: place)
        guard start + blockSize <= end.value else { return }
        // Space that was taken on purpose stays with the file.
        guard !isZeroExpanding else { return space.giveUp(place, isZero: false) }
        if releasedPlaces.add(start..<start + blockSize, in: storages[0]) {
            return space.giveUp(place, isZero: false)
        }
        do throws(DiskError) {
            try storages[0].discard(start..<start + blockSize, for: .guestData)
        } catch {
            space.giveUp(place, isZero: false)
            throw error
        }
        space.giveUp(place, isZero: true)
    }

    // MARK: - Durability

    func flush() throws(DiskError) {
        if isResized.withLock({ $0 }) { return }
        let givenUp = space.beginFlush()
        do throws(DiskError) {
            try tables.flush { () throws(DiskError) in
                try space.growFile()
                try storages[0].flushIfWritten()
            }
        } catch {
            space.endFlush(givenUp, succeeded: false)
            throw error
        }
        space.endFlush(givenUp, succeeded: true)
        if try space.shrinkFile() { try flushTables() }
    }

    private func flushTables() throws(DiskError) {
        try tables.flush { () throws(DiskError) in
            try space.growFile()
            try storages[0].flushIfWritten()
        }
    }

    func close() throws(DiskError) {
        guard isWritable, space.hasChanges, !isResized.withLock({ $0 }) else { return }
        try flush()
        if try space.settleCount() { try flushTables() }
    }
}

internal import DiskImage
internal import DiskStorage

extension VHDXImage {
    typealias State = VHDXEntry.PayloadState

    var writer: VHDXFile {
        guard let file else { preconditionFailure("an image that is open for reading is written to") }
        return file
    }

    func prepareForUse() throws(DiskError) { try file?.replayLog() }

    func beginWriting() throws(DiskError) { try writer.begin() }

    func entry(of block: UInt64) throws(DiskError) -> VHDXEntry {
        VHDXEntry(rawValue: try table.entry64(at: entries.place(ofBlock: block)))
    }

    /// Stores an entry; if no page is free for it, after a flush.
    func store(_ entry: VHDXEntry, at place: UInt64) throws(DiskError) {
        while try !table.store64(entry.rawValue, at: place, .directory) { try flush() }
    }

    private func store(_ bits: UInt32, _ number: UInt64, _ start: UInt64) throws(DiskError) {
        while try !bitmap.store(bits, number, start, .entry) { try flush() }
    }

    /// The bytes of the disk that a block is for.
    private func range(of block: UInt64) -> Range<UInt64> {
        let start = block << entries.blockShift
        return start..<min(start + blockSize, virtualSize)
    }

    // MARK: - Allocation

    /// A whole block; but in a differencing image, where the parent has the block or a part of it, the sectors alone
    /// that are to be written, in a new block or in the one that is there.
    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        if tables.needsFlush { try flush() }
        let block = offset >> entries.blockShift
        let blockRange = range(of: block)
        let entry = try entry(of: block)
        var part = blockRange
        if isDifferencing, entry.isInFile || entry.state == State.notPresent {
            let unit = UInt64(sectorSize)
            let end = offset + min(length, blockRange.upperBound - offset)
            part = offset & ~(unit - 1)..<min(blockRange.upperBound, (end + unit - 1) & ~(unit - 1))
            // What is written as a whole needs no bitmap.
            if part != blockRange { try makeBitmap(for: block) }
        }
        let start = try entry.isInFile ? entry.offset : writer.takeBlock()
        return Reservation(
            offset: part.lowerBound, length: part.upperBound - part.lowerBound, storage: 0,
            fileOffset: start + (part.lowerBound - blockRange.lowerBound), isZero: !entry.isInFile)
    }

    func commit(_ reservation: consuming Reservation) throws(DiskError) {
        let block = reservation.offset >> entries.blockShift
        let blockRange = range(of: block)
        let inBlock = reservation.offset - blockRange.lowerBound
        let start = reservation.fileOffset - inBlock
        let isWhole = reservation.length == blockRange.upperBound - blockRange.lowerBound
        let old = try entry(of: block)
        do throws(DiskError) {
            if isWhole { return try store(VHDXEntry(State.fullyPresent, at: start), at: entries.place(ofBlock: block)) }
            let shift = entries.sectorShift
            let sectors = inBlock >> shift..<(inBlock + reservation.length + (1 << shift - 1)) >> shift
            try setBits(sectors, block, isNew: !old.isInFile)
            let bits = try bitmapStart(block)
            let count = (blockRange.upperBound - blockRange.lowerBound) >> shift
            if try bitmap.isFull(count, bits) {
                try store(VHDXEntry(State.fullyPresent, at: start), at: entries.place(ofBlock: block))
            } else if !old.isInFile {
                try store(VHDXEntry(State.partiallyPresent, at: start), at: entries.place(ofBlock: block))
            }
        } catch {
            if !old.isInFile { writer.blocks.putBack(start) }
            throw error
        }
    }

    func abandon(_ reservation: consuming Reservation) {
        let block = reservation.offset >> entries.blockShift
        // (An entry that cannot be read now was read for the reservation: at worst a block is forgotten.)
        guard let entry = try? entry(of: block), !entry.isInFile else { return }
        writer.blocks.putBack(reservation.fileOffset - (reservation.offset - block << entries.blockShift))
    }

    /// Sets the bits of sectors of a block; those of the others are cleared in one that is new here.
    func setBits(_ sectors: Range<UInt64>, _ block: UInt64, isNew: Bool) throws(DiskError) {
        let start = try bitmapStart(block)
        let words = blockSize >> entries.sectorShift / 32
        let range =
            isNew ? 0..<words : sectors.lowerBound / 32..<sectors.upperBound.dividedRoundingUp(by: 32)
        for number in range {
            let old = try bitmap.word(number, start)
            let mask = SectorBitmap.mask(sectors, number)
            let new = isNew ? mask : old | mask
            if new != old { try store(new, number, start) }
        }
    }

    /// Makes sure that there is a sector bitmap for a block. A new one, which serves 2^23 sectors, is durable before
    /// anything relies on it.
    private func makeBitmap(for block: UInt64) throws(DiskError) {
        let place = entries.place(ofBitmapFor: block)
        func isThere() throws(DiskError) -> Bool {
            VHDXEntry(rawValue: try table.entry64(at: place)).state == VHDXEntry.BitmapState.present
        }
        if try isThere() { return }
        try addingBitmap.withLock { (_) throws(DiskError) in
            if try isThere() { return }
            let start = try writer.takeBitmapBlock()
            try store(VHDXEntry(VHDXEntry.BitmapState.present, at: start), at: place)
            try flush()
        }
    }

    // MARK: - Discarding

    /// What the image must hold no longer is unmapped; zeros that hide the parent's are zero blocks.
    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        if structure.metadata.leavesBlocksAllocated { return false }
        let last = (offset + length - 1) >> entries.blockShift
        var block = offset >> entries.blockShift
        while block <= last {
            if tables.needsFlush { try flush() }
            let entry = try entry(of: block)
            let place = entries.place(ofBlock: block)
            switch kind {
            case .absent where !entry.isInFile && entry.state == State.notPresent:
                let stop = try table.endOfRun(of: 0, in: place..<entries.place(ofBlock: last) + 8)
                block = max(block + 1, entries.block(at: entries.offset + (stop - entries.offset) & ~7))
                continue
            // In a child, unmapped would be zeros, whatever the parent has.
            case .absent where entry.isInFile:
                try store(VHDXEntry(isDifferencing ? State.notPresent : State.unmapped), at: place)
            case .absent: break
            case .zero: try store(VHDXEntry(State.zero), at: place)
            }
            if entry.isInFile { try writer.giveUp(entry.offset) }
            block += 1
        }
        return true
    }

    // MARK: - Durability

    func flush() throws(DiskError) {
        let file = writer
        try file.blocks.release { () throws(DiskError) in
            try tables.flush { () throws(DiskError) in try file.flushData() }
        }
    }

    func close() throws(DiskError) {
        guard let file else { return }
        try flush()
        // What the log said is in its place, durably, before the log goes.
        try storages[0].flushIfWritten()
        var usedEnd = end.value
        if file.hasGivenUp {
            let storage = storages[0].storage
            usedEnd = try VHDXTableScan(structure, storage, fileLength: usedEnd, findsPlaces: false).end
        }
        try file.close(usedEnd: usedEnd)
    }
}

internal import DiskImage
internal import DiskStorage

extension VHDImage {
    /// Footers that are damaged or missing are written again, from the one that is whole.
    func beginWriting() throws(DiskError) { try writer.begin(restoring: structure.damages) }

    var writer: VHDFile {
        guard let file else { preconditionFailure("an image that is open for reading is written to") }
        return file
    }

    func entry(of block: UInt64) throws(DiskError) -> UInt32 {
        try table.entry32(at: tableOffset + block * 4).byteSwapped
    }

    /// Stores a big-endian word; if no page is free for it, after a flush.
    private func store(_ word: UInt32, at offset: UInt64, _ order: WriteOrder) throws(DiskError) {
        while try !table.store32(word.byteSwapped, at: offset, order) { try flush() }
    }

    /// Stores bits of a sector bitmap; if no page is free for them, after a flush.
    private func store(_ bits: UInt32, _ number: UInt64, _ start: UInt64) throws(DiskError) {
        while try !bitmap.store(bits, number, start, .entry) { try flush() }
    }

    // MARK: - Allocation

    /// In a dynamic image, a whole block. In a differencing one the sectors alone that are to be written, in a new
    /// block or in the one that is there: the others stay the parent's.
    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        if tables.needsFlush { try flush() }
        let block = offset >> shift
        let blockOffset = block << shift
        let blockEnd = min(blockOffset + blockSize, virtualSize)
        let entry = try entry(of: block)
        let isNew = entry == .max
        let place = isNew ? try writer.takeBlock() : (start: UInt64(entry) * 512, isZero: false)
        var range = blockOffset..<blockEnd
        if isDifferencing || !isNew {
            range = offset & ~511..<min(blockEnd, (offset + length + 511) & ~511)
        }
        return Reservation(
            offset: range.lowerBound, length: range.upperBound - range.lowerBound, storage: 0,
            fileOffset: place.start + bitmapSize + (range.lowerBound - blockOffset), isZero: place.isZero)
    }

    func commit(_ reservation: consuming Reservation) throws(DiskError) {
        let block = reservation.offset >> shift
        let inBlock = reservation.offset - block << shift
        let start = reservation.fileOffset - inBlock - bitmapSize
        let sectors = inBlock / 512..<(inBlock + reservation.length) / 512
        guard try entry(of: block) == .max else {
            return try setBits(isDifferencing ? sectors : 0..<sectorsPerBlock, block, start)
        }
        try enter(block, start, sectors)
    }

    func abandon(_ reservation: consuming Reservation) {
        let block = reservation.offset >> shift
        // (An entry that cannot be read now was read for the reservation, and is kept by what else is known of it: at
        // worst a block is forgotten.)
        guard let entry = try? entry(of: block), entry == .max else { return }
        writer.blocks.putBack(reservation.fileOffset - (reservation.offset - block << shift) - bitmapSize)
    }

    /// Enters a new block: its bitmap, of which `sectors` are set, and then its place in the table.
    func enter(_ block: UInt64, _ start: UInt64, _ sectors: Range<UInt64>) throws(DiskError) {
        do throws(DiskError) {
            let isFull = try writeBitmap(sectors, block, start)
            marks?[block] = isFull ? VHDBitmapState.full : VHDBitmapState.partial
            try store(UInt32(truncatingIfNeeded: start / 512), at: tableOffset + block * 4, .directory)
        } catch {
            marks?[block] = VHDBitmapState.unknown
            writer.blocks.putBack(start)
            throw error
        }
    }

    /// Writes the bitmap of a new block; answers whether all of it is set.
    private func writeBitmap(
        _ sectors: Range<UInt64>, _ block: UInt64, _ start: UInt64
    ) throws(DiskError) -> Bool {
        guard isDifferencing else {
            // Nobody here looks at it, so that it need not go through the table cache.
            let ones = [UInt8](repeating: 0xff, count: Int(bitmapSize))
            try ones.withIOBytes { (bytes) throws(DiskError) in
                try storages[0].write(bytes, at: start, for: .allocation)
            }
            return true
        }
        // Whatever the cache holds of that place is from something else that was there.
        for number in 0..<bitmapSize / 4 {
            try store(SectorBitmap.mask(sectors, number), number, start)
        }
        return sectors == 0..<sectorsPerBlock
    }

    /// Sets bits of a block that is there already; their data is written, and durable before them.
    func setBits(_ sectors: Range<UInt64>, _ block: UInt64, _ start: UInt64) throws(DiskError) {
        for number in sectors.lowerBound / 32..<sectors.upperBound.dividedRoundingUp(by: 32) {
            let old = try bitmap.word(number, start)
            let new = old | SectorBitmap.mask(sectors, number)
            if new != old { try store(new, number, start) }
        }
        guard let marks else { return }
        marks[block] = VHDBitmapState.unknown
        // Looking through a short bitmap costs less than writing the next sectors as if they were not here.
        if bitmapSize > 1024, sectors != 0..<sectorsPerBlock { marks[block] = VHDBitmapState.partial }
    }

    // MARK: - Discarding

    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        if kind == .zero ? !isDifferencing : keepsBlocks { return false }
        var position = offset
        while position < offset + length {
            let block = position >> shift
            let entry = try entry(of: block)
            if tables.needsFlush { try flush() }
            switch kind {
            case .zero: try makeZero(block, entry)
            case .absent where entry == .max:
                let stop = try table.endOfRun(
                    of: .max, in: tableOffset + block * 4..<tableOffset + (offset + length - 1) >> shift * 4 + 4)
                position = ((stop - tableOffset) / 4) << shift
                continue
            case .absent:
                try store(.max, at: tableOffset + block * 4, .directory)
                marks?[block] = VHDBitmapState.unknown
                try writer.giveUp(UInt64(entry) * 512)
            }
            position = (block + 1) << shift
        }
        return true
    }

    /// A block of zeros, which hides what the parent has: VHD has no mark for that, so that all its sectors are here.
    private func makeZero(_ block: UInt64, _ entry: UInt32) throws(DiskError) {
        guard entry == .max else {
            let start = UInt64(entry) * 512
            try writer.zero(start)
            return try setBits(0..<sectorsPerBlock, block, start)
        }
        let place = try writer.takeBlock()
        do throws(DiskError) {
            if !place.isZero { try writer.zero(place.start) }
        } catch {
            writer.blocks.putBack(place.start)
            throw error
        }
        try enter(block, place.start, 0..<sectorsPerBlock)
    }

    // MARK: - Durability

    func flush() throws(DiskError) {
        let file = writer
        try file.blocks.release { () throws(DiskError) in
            try tables.flush { () throws(DiskError) in try storages[0].flushIfWritten() }
        }
    }

    func close() throws(DiskError) {
        guard let file, !isResized else { return }
        try flush()
        let storage = storages[0].storage
        let usedEnd = file.hasGivenUp ? try VHDTableScan(structure, storage, limit: end.value).end : end.value
        try file.close(usedEnd: usedEnd)
    }
}

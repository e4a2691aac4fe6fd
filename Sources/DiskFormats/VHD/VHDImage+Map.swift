internal import DiskImage
internal import DiskStorage

/// What is known of a block's sector bitmap.
enum VHDBitmapState {
    static let unknown: UInt8 = 0
    /// All bits are set.
    static let full: UInt8 = 1
    /// Some are not.
    static let partial: UInt8 = 2
}

extension VHDImage {
    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let block = position >> shift
            let inBlock = position & (blockSize &- 1)
            var run = min(length &- done, blockSize &- inBlock)
            let place = tableOffset &+ block &* 4
            // (All ones are the same in either byte order.)
            let entry = try table.entry32(at: place)
            if entry == .max {
                if length &- done > 64 << shift {
                    run = try endOfAbsentRun(position, offset &+ length) &- position
                }
                guard batch.append(Extent(.absent, length: run)) else { return }
                done &+= run
                continue
            }
            let start = UInt64(entry.byteSwapped) &* 512
            guard places.isInside(start, block: block, end: fileEnd.value) else { throw outside(start, block, place) }
            let data = start &+ bitmapSize &+ inBlock
            if try isFull(block, start) {
                guard batch.append(Extent(.data, length: run, fileOffset: data)) else { return }
            } else if isDifferencing {
                let covered = try bitmap.map(start, inBlock, run, at: data, into: &batch)
                if covered < run { return }
            } else {
                // What is written there must be marked in the bitmap, for programs that look at it.
                guard batch.append(Extent(.frozen, length: run, fileOffset: data)) else { return }
            }
            done &+= run
        }
    }

    /// Where the run of absent blocks ends in which `position` lies, up to `end`.
    private func endOfAbsentRun(_ position: UInt64, _ end: UInt64) throws(DiskError) -> UInt64 {
        let first = tableOffset + (position >> shift) * 4
        let last = tableOffset + end.dividedRoundingUp(by: blockSize) * 4
        let stop = try table.endOfRun(of: .max, in: first..<last)
        return min(end, ((stop - tableOffset) / 4) << shift)
    }

    @inline(never)
    private func outside(_ start: UInt64, _ block: UInt64, _ place: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "block \(block) is said to lie at byte \(start), where no block can be: 'vdimg check' shows how many are",
            offset: place)
    }

    // MARK: - Sector bitmaps

    /// Whether all sectors of a block are held here. Of a dynamic image that is only read the bitmaps mean nothing.
    @inline(__always)
    func isFull(_ block: UInt64, _ start: UInt64) throws(DiskError) -> Bool {
        guard let marks else { return !isDifferencing }
        let mark = marks[block]
        return try mark == VHDBitmapState.unknown ? findState(block, start) : mark == VHDBitmapState.full
    }

    /// Looks at a whole bitmap, and remembers what it is.
    @inline(never)
    func findState(_ block: UInt64, _ start: UInt64) throws(DiskError) -> Bool {
        let isFull = try bitmap.isFull(sectorsPerBlock, start)
        marks?[block] = isFull ? VHDBitmapState.full : VHDBitmapState.partial
        return isFull
    }
}

internal import DiskImage
internal import DiskStorage

/// A block that lies behind a hole.
struct VDIMover {
    let block: UInt64
    /// Which block of the file it is.
    let place: UInt64
}

/// What was discarded leaves holes; the last blocks of the file move there, so that it gets shorter and lies without
/// gaps, as VirtualBox keeps its images. There are as many blocks to move as there are holes in front of them; which
/// ones, a walk through the map tells, of a thousand at once.
extension VDIImage {
    /// How many blocks are looked for at once.
    private static let moverLimit: UInt64 = 1024

    func allowRelocation() { space.allowShrinking() }

    var needsRelocation: Bool { space.hasHoles }

    func nextRelocation() throws(DiskError) -> Relocation? {
        guard space.hasHoles else { return nil }
        return try movers.withLock { (movers) throws(DiskError) in
            if let move = try next(of: &movers) { return move }
            movers = try findMovers()
            return try next(of: &movers)
        }
    }

    private func next(of movers: inout [VDIMover]) throws(DiskError) -> Relocation? {
        while let mover = movers.popLast() {
            // It may have been discarded since it was found; the disk makes sure once it has the block's lock. What
            // lies beyond the disk's end is nowhere to be read, and stays.
            let offset = mover.block * blockSize
            let entry = try table.entry32(at: entryOffset(mover.block))
            guard UInt64(entry) == mover.place, offset < virtualSize else { continue }
            guard let hole = space.takeHole(before: mover.place) else {
                movers = []
                return nil
            }
            return Relocation(
                offset: offset, length: min(blockSize, virtualSize - offset), storage: 0,
                source: space.offset(of: mover.place), target: space.offset(of: hole))
        }
        return nil
    }

    /// The blocks that lie furthest back, as many as there are holes for, in the order in which they lie.
    private func findMovers() throws(DiskError) -> [VDIMover] {
        let (end, holes) = space.extent
        let first = end - min(end, min(holes, Self.moverLimit))
        var found: [VDIMover] = []
        try VDIMapScan.forEachEntry(header, table) { (blocks, entry) in
            // Never more than there are places; a map that is being changed may show one twice.
            guard UInt64(entry) >= first, found.count < Self.moverLimit else { return }
            found.append(VDIMover(block: blocks.lowerBound, place: UInt64(entry)))
        }
        return found.sorted { $0.place < $1.place }
    }

    func commit(_ relocation: Relocation) throws(DiskError) {
        let place = space.place(at: relocation.target)
        while try !space.cover(place + 1) { try flush() }
        try store(UInt32(truncatingIfNeeded: place), block: relocation.offset / blockSize)
        // Its bytes stay: the entry on the disk leads there until the next flush.
        space.endMove(freeing: space.place(at: relocation.source), isDone: true)
    }

    func abandon(_ relocation: Relocation) {
        space.endMove(freeing: space.place(at: relocation.target), isDone: false)
    }
}

internal import DiskImage
internal import DiskStorage

/// The last blocks go to places that nothing leads to; closing the image then puts the footer behind what is in use.
extension VHDImage {
    var released: [ReleasedPlaces] { file.map { [$0.released] } ?? [] }
    var givesUpBlocks: Bool { !keepsBlocks }

    func planShrinking() throws(DiskError) -> Bool {
        guard let file else { return false }
        let storage = storages[0].storage
        let scan = try VHDTableScan(structure, storage, limit: end.value)
        let canMove = !keepsBlocks && scan.allocatedBlocks <= UInt64(BlockSlots.limit)
        let slots = canMove ? try findSlots(storage) : BlockSlots()
        mover.withLock { $0 = slots }
        return slots.isMoving || file.hasSpare(behind: scan.end)
    }

    func stopShrinking() { mover.withLock { $0.stop() } }

    func finishShrinking() throws(DiskError) {
        file?.noteSpare()
    }

    /// All blocks in the order in which they lie, and the holes between them that one fits into.
    private func findSlots(_ storage: any Storage) throws(DiskError) -> BlockSlots {
        var blocks: [BlockSlots.Block] = []
        try VHDTableScan.forEachEntry(structure, storage) { (entry, block) throws(DiskError) in
            blocks.append(.init(number: block, place: UInt64(entry) * 512))
        }
        blocks.sort { $0.place < $1.place }
        let slot = bitmapSize + blockSize
        var holes: [Range<UInt64>] = []
        // What lies before the first block, between headers, table and paths, is left alone.
        var position = blocks.first.map { $0.place + slot } ?? 0
        for block in blocks.dropFirst() {
            if block.place > position, fit(position..<block.place) != nil { holes.append(position..<block.place) }
            position = max(position, block.place + slot)
        }
        return BlockSlots(blocks: blocks, holes: holes.filter { hole in isFree(hole) })
    }

    /// Parents' paths and tables may lie between blocks.
    private func isFree(_ hole: Range<UInt64>) -> Bool {
        let paths = (structure.header?.locators ?? []).filter(\.isUsed).map { locator in
            locator.dataOffset..<max(locator.dataOffset, locator.spaceEnd)
        }
        let others = [structure.headerRange, structure.tableRange, 0..<1536] + paths
        return !others.contains { $0.overlaps(hole) }
    }

    /// Where a block goes in a hole: its data at a page of the file if it has room there. (Other programs put blocks
    /// side by side, so that a hole has room for one at its beginning alone.)
    private func fit(_ hole: Range<UInt64>) -> Range<UInt64>? {
        let start = hole.lowerBound
        guard start % 512 == 0, start + bitmapSize + blockSize <= hole.upperBound else { return nil }
        guard let data = (start + bitmapSize).alignedUp(to: VHDFile.alignment), data + blockSize <= hole.upperBound
        else { return start..<start + bitmapSize + blockSize }
        return data - bitmapSize..<data + blockSize
    }

    // MARK: - Moving

    func allowRelocation() {}
    var needsRelocation: Bool { mover.withLock { $0.isMoving } }

    func nextRelocation() throws(DiskError) -> Relocation? {
        try mover.withLock { (slots) throws(DiskError) in
            guard let last = slots.last else { return nil }
            let offset = last.number << shift
            // A block that is here in parts stays, and nothing before it makes the file shorter.
            guard offset < virtualSize, try isFull(last.number, last.place), let found = slots.next(fit) else {
                slots.stop()
                return nil
            }
            return Relocation(
                offset: offset, length: min(blockSize, virtualSize - offset), storage: 0,
                source: found.block.place + bitmapSize, target: found.target + bitmapSize)
        }
    }

    func commit(_ relocation: Relocation) throws(DiskError) {
        if tables.needsFlush { try flush() }
        try enter(relocation.offset >> shift, relocation.target - bitmapSize, 0..<sectorsPerBlock)
        try file?.giveUp(relocation.source - bitmapSize)
    }

    func abandon(_ relocation: Relocation) {}
}

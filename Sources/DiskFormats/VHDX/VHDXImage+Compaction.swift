internal import DiskImage
internal import DiskStorage

/// The last blocks go to places that nothing leads to; closing the image then cuts the file off behind what is in use.
extension VHDXImage {
    var released: [ReleasedPlaces] { file.map { [$0.released] } ?? [] }
    var givesUpBlocks: Bool { !structure.metadata.leavesBlocksAllocated }

    func planShrinking() throws(DiskError) -> Bool {
        guard let file, !structure.metadata.leavesBlocksAllocated else { return false }
        let storage = storages[0].storage
        let scan = try VHDXTableScan(structure, storage, fileLength: end.value, findsPlaces: true)
        var slots = BlockSlots()
        if scan.allocatedBlocks <= UInt64(BlockSlots.limit) {
            var holes: [Range<UInt64>] = []
            scan.places?.forEachGap(before: scan.end) { [blockSize] hole in
                if hole.upperBound - hole.lowerBound >= blockSize { holes.append(hole) }
            }
            var blocks: [BlockSlots.Block] = []
            try VHDXTableScan.forEachEntry(structure, storage) { (entry, item) throws(DiskError) in
                guard item.isPayload, entry.isInFile else { return }
                blocks.append(.init(number: item.number, place: entry.offset))
            }
            slots = BlockSlots(blocks: blocks, holes: holes)
        }
        mover.withLock { $0 = slots }
        return slots.isMoving || file.hasSpare(behind: scan.end)
    }

    func stopShrinking() { mover.withLock { $0.stop() } }

    func finishShrinking() throws(DiskError) {
        file?.noteGivenUp()
    }

    // MARK: - Moving

    func allowRelocation() {}
    var needsRelocation: Bool { mover.withLock { $0.isMoving } }

    func nextRelocation() throws(DiskError) -> Relocation? {
        try mover.withLock { (slots) throws(DiskError) in
            guard let last = slots.last else { return nil }
            let offset = last.number << entries.blockShift
            let entry = VHDXEntry(rawValue: try table.entry64(at: entries.place(ofBlock: last.number)))
            // A block that is here in parts stays, and nothing before it makes the file shorter.
            guard offset < virtualSize, entry.state == VHDXEntry.PayloadState.fullyPresent,
                let found = slots.next({ [blockSize] hole in
                    hole.upperBound - hole.lowerBound >= blockSize
                        ? hole.lowerBound..<hole.lowerBound + blockSize : nil
                })
            else {
                slots.stop()
                return nil
            }
            return Relocation(
                offset: offset, length: min(blockSize, virtualSize - offset), storage: 0, source: found.block.place,
                target: found.target)
        }
    }

    func commit(_ relocation: Relocation) throws(DiskError) {
        if tables.needsFlush { try flush() }
        let place = entries.place(ofBlock: relocation.offset >> entries.blockShift)
        try store(VHDXEntry(VHDXEntry.PayloadState.fullyPresent, at: relocation.target), at: place)
        try file?.giveUp(relocation.source)
    }

    func abandon(_ relocation: Relocation) {}
}

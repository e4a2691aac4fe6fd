internal import DiskImage
internal import DiskStorage

/// Another size of the disk: the metadata item Virtual Disk Size, and a table that is long enough for it. Region table
/// and metadata are changed through the log.
extension VHDXImage {
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        try checkResizable(storages[0].storage)
        guard size > 0, size % UInt64(sectorSize) == 0, size <= VHDXMetadata.sizeLimit else {
            throw DiskError(
                .unsupported,
                "a disk of \(size) bytes cannot be: a VHDX's has a multiple of \(sectorSize), up to 64 TiB")
        }
        let old = structure.metadata.virtualDiskSize
        guard size != old else { return }
        try flush()
        try writer.begin()
        if size > old {
            try grow(from: old, to: size, hidingUpTo: min(size, parentEnd))
        } else {
            let entryCount = entries.entryCount
            try commitSize(size)
            try removeBlocks(to: entryCount)
            writer.allowShortening()
        }
    }

    private func commitSize(_ size: UInt64) throws(DiskError) {
        var region = try VHDXMetadataRegion(storages[0].storage, structure.metadataRange)
        try region.setVirtualDiskSize(size)
        try commit(region.changedPages)
    }

    // MARK: - Larger

    private func grow(from old: UInt64, to size: UInt64, hidingUpTo hidden: UInt64) throws(DiskError) {
        var metadata = structure.metadata
        metadata.virtualDiskSize = size
        let table = VHDXBlockAllocationTable(metadata, offset: entries.offset)
        if table.byteCount > tableRoom { try moveTable(to: table.byteCount) }
        let first = entries.blockCount
        try clearEntries(from: entries.index(ofBlock: first), to: table.entryCount)
        try clearLastBlock(old)
        if metadata.leavesBlocksAllocated {
            try allocateBlocks(first..<table.blockCount)
        } else if hidden > old {
            for block in first..<max(first, hidden.dividedRoundingUp(by: blockSize)) {
                if tables.needsFlush { try flush() }
                try store(VHDXEntry(State.zero), at: entries.place(ofBlock: block))
            }
        }
        try flush()
        try commitSize(size)
    }

    /// Bytes that the table can have where it is.
    var tableRoom: UInt64 {
        let region = structure.regionTable.regions.first { $0.guid == VHDXRegionTable.blockAllocationTable }
        return region.map { $0.range.upperBound - $0.range.lowerBound } ?? 0
    }

    /// Copies the table to a larger region at the file's end.
    func moveTable(to byteCount: UInt64) throws(DiskError) {
        let storage = storages[0].storage
        guard let length = byteCount.alignedUp(to: UInt64(VHDXRegion.alignment)) else { return }
        try flush()
        let start = try writer.takeRegion(length)
        guard start + length <= TableSet.offsetLimit else {
            throw DiskError(.unsupported, "the file is too long for its table to become any longer")
        }
        let step: UInt64 = 1 << 20
        var done: UInt64 = 0
        while done < entries.byteCount {
            let count = min(step, entries.byteCount - done)
            try storage.write(
                storage.bytes(
                    at: entries.offset + done, count: Int(count), for: .table, "the block allocation table"),
                at: start + done, for: .table)
            done += count
        }
        storages[0].noteWrite()
        let regions = structure.regionTable.regions.map { region in
            region.guid == VHDXRegionTable.blockAllocationTable
                ? VHDXRegion(guid: region.guid, range: start..<start + length, isRequired: region.isRequired) : region
        }
        let new = VHDXRegionTable(regions: regions).bytes
        var pages: [TablePage] = []
        for offset in VHDXRegionTable.offsets {
            let old = try storage.bytes(
                at: offset, count: VHDXRegionTable.byteCount, for: .header, "the region table")
            pages += TablePage.changed(from: old, to: new, at: offset)
        }
        try commit(pages)
    }

    /// Clears entries that the disk has not yet and will have. Nothing should be there.
    func clearEntries(from first: UInt64, to end: UInt64) throws(DiskError) {
        let limit = entries.offset + min(end * VHDXBlockAllocationTable.entrySize, tableRoom)
        var place = entries.offset + first * VHDXBlockAllocationTable.entrySize
        while place < limit {
            place = max(place, try table.endOfRun(of: 0, in: place..<limit) & ~7)
            guard place < limit else { return }
            let index = (place - entries.offset) / VHDXBlockAllocationTable.entrySize
            let isKept = isDifferencing && entries.isBitmap(index) && index < entries.entryCount
            if !isKept {
                if tables.needsFlush { try flush() }
                try store(VHDXEntry(State.notPresent), at: place)
            }
            place += VHDXBlockAllocationTable.entrySize
        }
    }

    /// Makes what the last block holds behind the disk's end zeros.
    private func clearLastBlock(_ size: UInt64) throws(DiskError) {
        let inBlock = size & (blockSize - 1)
        guard inBlock != 0 else { return }
        let block = size >> entries.blockShift
        let entry = try entry(of: block)
        guard entry.isInFile else { return }
        let storage = storages[0].storage
        let range = entry.offset + inBlock..<entry.offset + blockSize
        let length = try storage.length()
        if length < range.upperBound { try storage.setLength(range.upperBound) }
        if range.lowerBound < length {
            try storages[0].discard(range.lowerBound..<min(length, range.upperBound), for: .guestData)
        }
        storages[0].noteWrite()
        guard entry.state == State.partiallyPresent else { return }
        try setBits(inBlock >> entries.sectorShift..<blockSize >> entries.sectorShift, block, isNew: false)
    }

    /// The blocks of a fixed image are all there.
    private func allocateBlocks(_ blocks: Range<UInt64>) throws(DiskError) {
        let storage = storages[0].storage
        let length = try storage.length()
        let isPreallocated = try storage.allocatedBytes() >= length - length / 8
        for block in blocks {
            if tables.needsFlush { try flush() }
            try store(VHDXEntry(State.fullyPresent, at: writer.takeBlock()), at: entries.place(ofBlock: block))
        }
        if isPreallocated { try storage.allocate(end.value) }
        storages[0].noteWrite()
    }

    // MARK: - Smaller

    /// Gives up what entries of a smaller disk led to that had `count` entries.
    private func removeBlocks(to count: UInt64) throws(DiskError) {
        let limit = entries.offset + count * VHDXBlockAllocationTable.entrySize
        var place = entries.offset + entries.index(ofBlock: entries.blockCount) * VHDXBlockAllocationTable.entrySize
        while place < limit {
            place = max(place, try table.endOfRun(of: 0, in: place..<limit) & ~7)
            guard place < limit else { break }
            if tables.needsFlush { try flush() }
            let index = (place - entries.offset) / VHDXBlockAllocationTable.entrySize
            let isBitmap = entries.isBitmap(index)
            if !isBitmap || !isDifferencing || index >= entries.entryCount {
                let entry = VHDXEntry(rawValue: try table.entry64(at: place))
                try store(VHDXEntry(State.notPresent), at: place)
                if entry.isInFile, !isBitmap { try writer.giveUp(entry.offset) }
                writer.noteGivenUp()
            }
            place += VHDXBlockAllocationTable.entrySize
        }
        try flush()
    }
}

internal import DiskImage
internal import DiskStorage

/// Another size of the disk: the footer's current size and geometry, and a block allocation table that is long enough.
/// A table that has no room to grow is copied to the file's end, and the dynamic header names that place.
extension VHDImage {
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        try checkResizable(storages[0].storage)
        var footer = structure.footer
        try footer.setSize(size, askedRule)
        guard size.dividedRoundingUp(by: blockSize) <= VHDDynamicHeader.entryLimit else {
            throw DiskError(
                .unsupported,
                "with blocks of \(blockSize) bytes the disk has "
                    + "\(VHDDynamicHeader.entryLimit * blockSize) bytes at most"
            )
        }
        guard size != virtualSize else { return }
        let place = try settle()
        try settlingAfterFailure { () throws(DiskError) in
            if size > virtualSize {
                try grow(footer, footerAt: place, hidingUpTo: isDifferencing ? min(size, parentEnd) : 0)
            } else {
                try shrink(footer, footerAt: place)
            }
        }
        isResized = true
    }

    // MARK: - Larger

    private func grow(
        _ footer: VHDFooter, footerAt place: UInt64, hidingUpTo hidden: UInt64
    ) throws(DiskError) {
        guard var header = structure.header else { return }
        try clearLastBlock()
        let storage = storages[0].storage
        let count = footer.currentSize.dividedRoundingUp(by: blockSize)
        let old = structure.blockCount
        var end = place + UInt64(VHDFooter.byteCount)
        let firstNew: UInt64
        if try header.tableOffset + count * 4 <= tableRoomEnd(footerAt: place) {
            firstNew = tableOffset + old * 4
            if count > old { try writeOnes(firstNew..<tableOffset + count * 4) }
        } else {
            (header.tableOffset, end) = try moveTable(to: end, count: count)
            firstNew = header.tableOffset + old * 4
        }
        header.maxTableEntries = max(header.maxTableEntries, UInt32(count))
        if hidden > virtualSize {
            let blocks = old..<max(old, hidden.dividedRoundingUp(by: blockSize))
            end = try addZeroBlocks(blocks, entriesAt: firstNew, from: end)
        }
        try storage.flush()
        if header == structure.header, end == place + UInt64(VHDFooter.byteCount) {
            try writer.write(footer.encode(over: structure.footerBytes), at: place)
        } else {
            try replace(header, footer, footerAt: place, newEnd: end)
        }
    }

    /// Where the table meets the next thing in the file if it gets longer.
    private func tableRoomEnd(footerAt place: UInt64) throws(DiskError) -> UInt64 {
        let storage = storages[0].storage
        let start = tableOffset + structure.blockCount * 4
        var limit = place
        func note(_ other: UInt64) { if other >= start { limit = min(limit, other) } }
        note(structure.headerRange.lowerBound)
        for locator in structure.header?.locators ?? [] where locator.isUsed { note(locator.dataOffset) }
        try VHDTableScan.forEachEntry(structure, storage) { (entry, _) in note(UInt64(entry) * 512) }
        // A batmap lies where the table ends, in whole sectors: then only the last one's rest is room.
        guard let batmap = try VHDBatmap(structure, storage) else { return limit }
        return min(limit, batmap.headerOffset)
    }

    private func writeOnes(_ range: Range<UInt64>) throws(DiskError) {
        let ones = [UInt8](repeating: 0xff, count: Int(min(1 << 20, range.upperBound - range.lowerBound)))
        var position = range.lowerBound
        while position < range.upperBound {
            let part = ones.prefix(Int(min(UInt64(ones.count), range.upperBound - position)))
            try storages[0].storage.write(Array(part), at: position, for: .table)
            position += UInt64(part.count)
        }
    }

    /// Copies the table, with room for `count` entries, to `start`, and a batmap behind it if there is one; answers
    /// where both begin and end.
    private func moveTable(to start: UInt64, count: UInt64) throws(DiskError) -> (table: UInt64, end: UInt64) {
        let storage = storages[0].storage
        let old = structure.tableRange
        guard let end = (start + count * 4).alignedUp(to: 512), end <= TableSet.offsetLimit else {
            throw DiskError(.unsupported, "the file is too long for its table to become any longer")
        }
        let step: UInt64 = 1 << 20
        var done: UInt64 = 0
        while done < old.upperBound - old.lowerBound {
            let part = min(step, old.upperBound - old.lowerBound - done)
            let bytes = try storage.bytes(
                at: old.lowerBound + done, count: Int(part), for: .table, "the block allocation table")
            try storage.write(bytes, at: start + done, for: .table)
            done += part
        }
        try writeOnes(start + done..<end)
        guard let batmap = try VHDBatmap(structure, storage), !batmap.map.isEmpty else { return (start, end) }
        let bytes = try batmap.moved(to: end, count: count, storage)
        try storage.write(bytes, at: end, for: .table)
        return (start, end + UInt64(bytes.count))
    }

    /// Makes what the block in which the disk ends holds behind its end zeros, which are here.
    private func clearLastBlock() throws(DiskError) {
        let inBlock = virtualSize & (blockSize - 1)
        guard inBlock != 0 else { return }
        let block = virtualSize >> shift
        let entry = try entry(of: block)
        guard entry != .max else { return }
        let start = UInt64(entry) * 512
        let range = start + bitmapSize + inBlock..<start + bitmapSize + blockSize
        try storages[0].discard(
            range.lowerBound..<max(range.lowerBound, min(range.upperBound, end.value)), for: .guestData)
        if isDifferencing { try setBits(inBlock / 512..<sectorsPerBlock, block, start) }
        try flush()
        try storages[0].storage.flush()
    }

    /// Enters blocks of zeros, which lie from `start` on, in a table whose first new entry lies at `place`; answers
    /// where they end.
    private func addZeroBlocks(
        _ blocks: Range<UInt64>, entriesAt place: UInt64, from start: UInt64
    ) throws(DiskError) -> UInt64 {
        let storage = storages[0].storage
        let ones = [UInt8](repeating: 0xff, count: Int(bitmapSize))
        var end = start
        for block in blocks {
            guard let data = (end + bitmapSize).alignedUp(to: VHDFile.alignment),
                (data - bitmapSize) / 512 < UInt64(UInt32.max)
            else {
                throw DiskError(
                    .system, "the image is full: its table's sector numbers reach no further than 2 TiB",
                    image: storage.name, errno: 28)  // ENOSPC
            }
            try storage.write(ones, at: data - bitmapSize, for: .allocation)
            var entry = FieldWriter(count: 4)
            entry.bigEndian(UInt32(truncatingIfNeeded: (data - bitmapSize) / 512), at: 0)
            try storage.write(entry.bytes, at: place + (block - blocks.lowerBound) * 4, for: .table)
            end = data + blockSize
        }
        return end
    }

    // MARK: - Smaller

    private func shrink(_ footer: VHDFooter, footerAt place: UInt64) throws(DiskError) {
        guard var header = structure.header else { return }
        let storage = storages[0].storage
        let before = structure
        let count = footer.currentSize.dividedRoundingUp(by: blockSize)
        // A batmap is looked for where the table ends.
        if try VHDBatmap(structure, storage) == nil { header.maxTableEntries = UInt32(count) }
        if header == structure.header {
            try writer.write(footer.encode(over: structure.footerBytes), at: place)
        } else {
            try replace(header, footer, footerAt: place, newEnd: place + UInt64(VHDFooter.byteCount))
        }
        try adoptFile()
        // What entries led to that the disk does not need any more.
        let limit = end.value
        try VHDTableScan.forEachEntry(before, storage) { (entry, block) throws(DiskError) in
            guard block >= count else { return }
            let range = UInt64(entry) * 512..<min(limit, UInt64(entry) * 512 + bitmapSize + blockSize)
            if !range.isEmpty { try storage.discard(range, mustZero: false, for: .guestData) }
        }
        if count < before.blockCount {
            try writeOnes(tableOffset + count * 4..<tableOffset + before.blockCount * 4)
        }
        try storage.flush()
        writer.noteGivenUp()
        _ = try writer.settle(usedEnd: VHDTableScan(structure, storage, limit: limit).end)
    }
}

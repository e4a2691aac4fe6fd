internal import DiskImage
internal import DiskStorage

extension VHDXImage {
    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let block = position >> entries.blockShift
            let inBlock = position & (blockSize &- 1)
            var run = min(length &- done, blockSize &- inBlock)
            let entry = VHDXEntry(rawValue: try table.entry64(at: entries.place(ofBlock: block)))
            if entry.isInFile {
                guard places.isInside(entry.offset, block: block, end: fileEnd.value) else {
                    throw outside(entry, block)
                }
                let data = entry.offset &+ inBlock
                if entry.state == VHDXEntry.PayloadState.fullyPresent {
                    guard batch.append(Extent(.data, length: run, fileOffset: data)) else { return }
                } else {
                    let bits = try bitmapStart(block)
                    if try bitmap.map(bits, inBlock, run, at: data, into: &batch) < run { return }
                }
            } else if entry.state == VHDXEntry.PayloadState.notPresent {
                if length &- done > 64 &<< entries.blockShift {
                    run = try endOfAbsentRun(position, offset &+ length) &- position
                }
                guard batch.append(Extent(.absent, length: run)) else { return }
            } else {
                // Undefined, zero or unmapped: zeros, and no parent is asked. [MS-VHDX] 2.5.1.1.
                guard entry.state <= VHDXEntry.PayloadState.unmapped else { throw unknownState(entry, block) }
                guard batch.append(Extent(.zero, length: run)) else { return }
            }
            done &+= run
        }
    }

    /// Where the run of absent blocks ends in which `position` lies, up to `end`. (An entry of a bitmap block ends it
    /// too.)
    private func endOfAbsentRun(_ position: UInt64, _ end: UInt64) throws(DiskError) -> UInt64 {
        let number = position >> entries.blockShift
        let first = entries.place(ofBlock: number)
        let last = entries.place(ofBlock: (end - 1) >> entries.blockShift) + VHDXBlockAllocationTable.entrySize
        let stop = try table.endOfRun(of: 0, in: first..<last)
        // An entry that is not 0 may begin with a word that is.
        let block = entries.block(at: entries.offset + (stop - entries.offset) & ~7)
        return min(end, stop == last ? end : max(block, number + 1) << entries.blockShift)
    }

    /// Where the bits of a block's sectors begin in the file.
    @inline(__always)
    func bitmapStart(_ block: UInt64) throws(DiskError) -> UInt64 {
        let entry = VHDXEntry(rawValue: try table.entry64(at: entries.place(ofBitmapFor: block)))
        guard isDifferencing, entry.state == VHDXEntry.BitmapState.present,
            places.isInside(entry.offset, length: VHDXBlockAllocationTable.bitmapBlockSize, end: fileEnd.value)
        else { throw noBitmap(entry, block) }
        return entry.offset &+ entries.bitmapOffset(ofBlock: block)
    }

    @inline(never)
    private func outside(_ entry: VHDXEntry, _ block: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "block \(block) is said to lie at byte \(entry.offset), where no block can be: "
                + "'vdimg check' shows how many are", offset: entries.place(ofBlock: block))
    }

    @inline(never)
    private func unknownState(_ entry: VHDXEntry, _ block: UInt64) -> DiskError {
        DiskError(
            .invalidImage, "block \(block) is in the state \(entry.state), which there is not",
            offset: entries.place(ofBlock: block))
    }

    @inline(never)
    private func noBitmap(_ entry: VHDXEntry, _ block: UInt64) -> DiskError {
        guard isDifferencing else {
            return DiskError(
                .invalidImage, "block \(block) is said to be here in parts, in an image without a parent",
                offset: entries.place(ofBlock: block))
        }
        return DiskError(
            .invalidImage,
            "block \(block) is here in parts, and the sector bitmap that says which is missing "
                + "(state \(entry.state), byte \(entry.offset))", offset: entries.place(ofBitmapFor: block))
    }
}

internal import DiskImage
internal import DiskStorage

/// The file of a dynamic or differencing image that is open for writing: takes space for blocks, and keeps a footer at
/// the file's end at every instant.
///
/// Blocks go where the footer is. So before one does, a footer is written further on and made durable: far enough that
/// it need not be done again soon. Until the image is closed the file is longer (with a hole) than what it holds; then
/// the footer is written right behind the last block, and the file cut off behind it.
final class VHDFile: Sendable {
    let handle: StorageHandle
    /// Where the next block may begin.
    let end: FileEndCell
    private let blockSize: UInt64
    private let bitmapSize: UInt64
    private let space: Locked<Space>
    /// Blocks that nothing points to, by where their bitmaps lie.
    let blocks: ReusableBlocks
    /// What is dropped while the image is compacted.
    let released = ReleasedPlaces()

    private struct Space {
        /// The footer's bytes.
        var footer: [UInt8]
        /// Where the last footer of the file lies: blocks lie before it.
        var footerOffset: UInt64
        /// Blocks that the disk has and the image not, at most.
        var missingBlocks: UInt64
        /// Whether the footer is not where it belongs when the image is closed.
        var isFooterAhead: Bool
        var hasGivenUp = false
        /// Whether anything was changed.
        var hasBegun = false
    }

    /// Blocks' data lies at multiples of this, as XenServer lays them out: a file system's page.
    static let alignment: UInt64 = 4096
    /// Sectors that the table can number: all ones is none.
    private static let sectorLimit: UInt64 = 0xffff_ffff
    /// How far the footer is put ahead: a little at first and, where that took no space, far. Who writes waits while
    /// the footer is made durable; and a file system without holes in files writes zeros up to it.
    private static let ahead: (near: UInt64, far: UInt64) = (256 << 20, 16 << 30)

    /// The last footer lies at `footerOffset`; the file is in use up to `end`, and from there on reads as zeros.
    init(
        handle: StorageHandle, structure: VHDStructure, end: FileEndCell, footerOffset: UInt64, allocatedBlocks: UInt64,
        isFooterAhead: Bool
    ) {
        self.handle = handle
        self.end = end
        blockSize = structure.blockSize
        bitmapSize = structure.bitmapSize
        blocks = ReusableBlocks(blockSize: Self.slotSize(structure))
        space = Locked(
            Space(
                footer: structure.footerBytes, footerOffset: footerOffset,
                missingBlocks: structure.blockCount - min(structure.blockCount, allocatedBlocks),
                isFooterAhead: isFooterAhead))
    }

    /// The bytes from one block to the next, where blocks follow each other.
    static func slotSize(_ structure: VHDStructure) -> UInt64 {
        (structure.bitmapSize + alignment - 1) / alignment * alignment + structure.blockSize
    }

    private var slotSize: UInt64 { (bitmapSize + Self.alignment - 1) / Self.alignment * Self.alignment + blockSize }
    private var isDevice: Bool { handle.storage.traits.hasFixedLength }

    // MARK: - Footers

    /// Writes a footer where it is missing or damaged, before the first change.
    func begin(restoring damages: [VHDDamage]) throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            guard !space.hasBegun else { return }
            for damage in damages {
                switch damage.part {
                case .endFooter: try handle.storage.write(space.footer, at: space.footerOffset, for: .footer)
                case .footerCopy: try handle.storage.write(space.footer, at: 0, for: .header)
                case .dynamicHeader: continue
                }
            }
            if !damages.isEmpty { try handle.storage.flush() }
            space.hasBegun = true
        }
    }

    /// Puts a footer further on, so that blocks may lie up to `needed`.
    private func moveFooter(_ space: inout Space, behind needed: UInt64) throws(DiskError) {
        guard !isDevice else { throw full("the device is full") }
        // More than the blocks that are missing the file never needs.
        let all = needed + (max(1, space.missingBlocks) - 1) * slotSize
        let (near, far) = (min(all, needed + Self.ahead.near) & ~511, min(all, needed + Self.ahead.far) & ~511)
        let before = try handle.storage.allocatedBytes()
        do throws(DiskError) {
            try placeFooter(&space, at: max(needed, near))
        } catch {
            // A file system without holes in files, or a limit on their length: then no further than it must. (If it is
            // less than a megabyte that is too much, so is everything.)
            guard near > needed, near - needed >= 1 << 20, Self.isLack(error) else { throw error }
            return try placeFooter(&space, at: needed)
        }
        guard far > near, try handle.storage.allocatedBytes() < before + Self.ahead.near / 2 else { return }
        do throws(DiskError) {
            try placeFooter(&space, at: far)
        } catch {
            // It is far enough as it is.
            if !Self.isLack(error) { throw error }
        }
    }

    /// Whether it is room that is missing.
    private static func isLack(_ error: DiskError) -> Bool {
        [27, 28, 122].contains(error.errno)  // EFBIG, ENOSPC, EDQUOT
    }

    private func placeFooter(_ space: inout Space, at offset: UInt64) throws(DiskError) {
        let storage = handle.storage
        let length = try storage.length()
        // A former attempt that failed half-way may have left a footer that is further on.
        let leftover =
            length > space.footerOffset + UInt64(space.footer.count) ? length - UInt64(space.footer.count) : nil
        var target = offset
        if let leftover, leftover % 512 == 0, leftover > offset { target = leftover }
        do throws(DiskError) {
            try storage.write(space.footer, at: target, for: .footer)
            try storage.flush()
        } catch {
            if let now = try? storage.length(), now > length { try? storage.setLength(length) }
            throw error
        }
        // Only now nobody needs the old one: what blocks are put over reads as zeros.
        for old in [space.footerOffset, leftover ?? target] where old < target {
            let zeros = [UInt8](repeating: 0, count: Int(min(UInt64(space.footer.count), target - old)))
            try storage.write(zeros, at: old, for: .footer)
        }
        handle.noteWrite()
        space.footerOffset = target
        space.isFooterAhead = true
    }

    /// Cuts the file off behind what is in use, `usedEnd`, with the footer there; everything else is durable.
    func close(usedEnd: UInt64) throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            guard !isDevice, space.hasBegun, space.isFooterAhead || space.hasGivenUp,
                let place = usedEnd.alignedUp(to: 512)
            else {
                return
            }
            if place < space.footerOffset {
                guard place + UInt64(space.footer.count) <= space.footerOffset else { return }
                do throws(DiskError) {
                    try handle.storage.write(space.footer, at: place, for: .footer)
                } catch {
                    // On a full file system the file stays as long as it is, with the footer that it has.
                    if [28, 122].contains(error.errno) { return }  // ENOSPC, EDQUOT
                    throw error
                }
                try handle.storage.flush()
                space.footerOffset = place
            }
            try handle.storage.setLength(space.footerOffset + UInt64(space.footer.count))
            try handle.storage.flush()
            space.isFooterAhead = false
        }
    }

    // MARK: - Other headers

    /// Puts the footer at `usedEnd`, where the file then ends; answers where that is. Everything else is durable.
    func settle(usedEnd: UInt64) throws(DiskError) -> UInt64 {
        try close(usedEnd: usedEnd)
        return try space.withLock { (space) throws(DiskError) in
            guard let place = space.footerOffset.alignedUp(to: 512), !isDevice else {
                throw DiskError(.unsupported, "it lies on a device, where its headers are not changed")
            }
            let storage = handle.storage
            let end = place + UInt64(space.footer.count)
            let present = try storage.availableBytes(at: place, count: space.footer.count, for: .footer)
            let length = try storage.length()
            if present != space.footer || length != end {
                try storage.write(space.footer, at: place, for: .footer)
                try storage.flush()
                try storage.setLength(end)
                try storage.flush()
            }
            space.footerOffset = place
            space.isFooterAhead = false
            return place
        }
    }

    /// Writes another footer, durably: first the one at the file's end, which counts where both are whole. `place` is
    /// where that lies.
    func write(_ footer: [UInt8], at place: UInt64) throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            try handle.storage.write(footer, at: place, for: .footer)
            try handle.storage.flush()
            (space.footer, space.footerOffset) = (footer, place)
            try handle.storage.write(footer, at: 0, for: .header)
            try handle.storage.flush()
        }
    }

    /// The file is in use up to `usedEnd` now.
    func setEnd(_ usedEnd: UInt64) { end.value = usedEnd }

    /// Something that is no block was given up.
    func noteGivenUp() { space.withLock { $0.hasGivenUp = true } }

    /// Whether blocks were given up, so that the last one of the file may be another than the last one taken.
    var hasGivenUp: Bool { space.withLock { $0.hasGivenUp } }

    /// Whether the file is longer than what is in use up to `usedEnd`, and the footer.
    func hasSpare(behind usedEnd: UInt64) -> Bool {
        space.withLock { space in !isDevice && (usedEnd.alignedUp(to: 512) ?? .max) < space.footerOffset }
    }

    /// The footer may lie further on than it must, and is put right behind the last block when the image is closed.
    func noteSpare() { space.withLock { $0.hasGivenUp = true } }

    // MARK: - Space

    /// Space for a block: where its bitmap begins, and whether its data reads as zeros.
    func takeBlock() throws(DiskError) -> (start: UInt64, isZero: Bool) {
        try space.withLock { (space) throws(DiskError) in
            if let run = blocks.take(1) { return (run.offset, run.isZero) }
            guard let data = (end.value + bitmapSize).alignedUp(to: Self.alignment),
                (data - bitmapSize) / 512 < Self.sectorLimit
            else { throw full("the image is full: its table's sector numbers reach no further than 2 TiB") }
            if data + blockSize > space.footerOffset { try moveFooter(&space, behind: data + blockSize) }
            end.value = data + blockSize
            if space.missingBlocks > 0 { space.missingBlocks -= 1 }
            return (data - bitmapSize, !isDevice)
        }
    }

    private func full(_ message: String) -> DiskError {
        DiskError(.system, message, image: handle.storage.name, errno: 28)  // ENOSPC
    }

    /// Gives up a block whose entry was just removed: its space goes back to the file system, and to us after a flush.
    func giveUp(_ start: UInt64) throws(DiskError) {
        let data = start + bitmapSize
        let isKept = released.add(data..<max(data, min(data + blockSize, end.value)), in: handle)
        if !isKept { try zero(start) }
        blocks.giveUp(start, isZero: !isKept)
        space.withLock { $0.hasGivenUp = true }
    }

    /// Makes the data of a block zeros, and gives its space back.
    func zero(_ start: UInt64) throws(DiskError) {
        let data = start + bitmapSize
        // (A file that is cut short by a part of its last block does not grow by this.)
        try handle.discard(data..<max(data, min(data + blockSize, end.value)), for: .guestData)
    }
}

internal import DiskImage
internal import DiskStorage

/// The places for blocks in a VDI that is open for writing, by their numbers, and the file's length.
///
/// Other programs put the next block where the header's count of allocated blocks says, and take every place in front
/// of it for used. So that they never write over a block, the count is durable before an entry that leads to a place
/// which it does not cover, and it becomes smaller only after the entries behind it are gone. The blocks of an image
/// that is closed lie without gaps, so that the count is also what its name says.
final class VDISpace: Sendable {
    private struct State {
        /// Places that hold nothing, usable now.
        var free: FreeBlocks
        /// Places that were given up since the last flush began: entries on the disk may still lead there.
        var givenUp: FreeBlocks
        /// Flushes under way that hold places which were given up.
        var flushes = 0
        /// Blocks that are being moved, and have two places meanwhile.
        var moves = 0
        /// How many places there are: those from here on are beyond the file's end.
        var end: UInt64
        /// The length that the file was last told to have.
        var length: UInt64
        /// The count of allocated blocks in the header, as stored.
        var count: UInt64
        /// Whether the file may be made shorter.
        var mayShrink = false
    }

    private let header: VDIHeader
    private let handle: StorageHandle
    private let table: Table
    /// Where the file ends, or will end after the next flush.
    private let fileEnd: FileEndCell
    /// How many places there can be.
    private let limit: UInt64
    private let state: Locked<State>

    /// All places are used at first, but for those that ``addFree(_:)`` is told of.
    init(_ header: VDIHeader, handle: StorageHandle, table: Table, fileEnd: FileEndCell, places: UInt64) {
        self.header = header
        self.handle = handle
        self.table = table
        self.fileEnd = fileEnd
        // More than the disk's blocks are never needed, and other programs refuse them.
        let most = max(places, min(header.blockCount, VDIEntry.limit))
        limit = handle.storage.traits.hasFixedLength ? places : most
        let none = FreeBlocks(blockSize: 1)
        state = Locked(
            State(
                free: none, givenUp: none, end: places, length: fileEnd.value, count: UInt64(header.allocatedBlocks)))
    }

    /// Where a place's data lies in the file.
    func offset(of place: UInt64) -> UInt64 { header.blocksOffset + header.blockExtra + place * header.stride }

    /// The place whose data lies there.
    func place(at offset: UInt64) -> UInt64 { (offset - header.blocksOffset - header.blockExtra) / header.stride }

    /// Where the file ends if it has that many places.
    private func length(_ places: UInt64) -> UInt64 { header.blocksOffset + places * header.stride }

    // MARK: - Taking

    /// What ``take(_:)`` found.
    enum Found {
        case places(FreeBlocks.Run)
        /// There may be some after a flush, or when blocks have been moved.
        case noneYet
        /// All are in use.
        case none
    }

    /// Takes up to `count` places in one piece.
    func take(_ count: UInt64) -> Found {
        // What lies before each block's data keeps blocks apart.
        let wanted = header.blockExtra == 0 ? count : 1
        return state.withLock { state in
            if let run = state.free.take(wanted) { return .places(run) }
            guard state.end < limit else {
                // Said under the same lock: a moment later a place that is free now may be one that a block moves to.
                return !state.givenUp.isEmpty || state.flushes > 0 || state.moves > 0 ? .noneYet : .none
            }
            let run = FreeBlocks.Run(offset: state.end, count: min(wanted, limit - state.end), isZero: true)
            state.end += run.count
            fileEnd.value = max(fileEnd.value, length(state.end))
            return .places(run)
        }
    }

    /// Takes a free place in front of another one, to move a block there; nil if there is none.
    func takeHole(before place: UInt64) -> UInt64? {
        state.withLock { state in
            guard let run = state.free.take(1) else { return nil }
            guard run.offset < place else {
                state.free.add(run)
                return nil
            }
            state.moves += 1
            return run.offset
        }
    }

    /// A block was moved, and the place where it was is given up, though not its bytes; or it was not, and the place
    /// that was taken for it is free again.
    func endMove(freeing place: UInt64, isDone: Bool) {
        state.withLock { state in
            state.moves -= 1
            if isDone { state.givenUp.add(place, isZero: false) } else { state.free.add(place, isZero: false) }
        }
    }

    /// How many places there are, and how many of them are free.
    var extent: (end: UInt64, free: UInt64) { state.withLock { ($0.end, $0.free.count) } }

    /// Whether anything was changed since the image was opened.
    var hasChanges: Bool { state.withLock { $0.mayShrink } }

    /// Whether there are free places between used ones, as far as is known.
    var hasHoles: Bool { state.withLock { $0.mayShrink && !$0.free.isEmpty } }

    /// Notes the header's count for blocks up to `end`, to be written before the entries that lead there. False: flush,
    /// then try again.
    func cover(_ end: UInt64) throws(DiskError) -> Bool {
        try state.withLock { (state) throws(DiskError) in
            guard state.count < end else { return true }
            guard try storeCount(end, .allocation) else { return false }
            state.count = end
            return true
        }
    }

    private func storeCount(_ count: UInt64, _ order: WriteOrder) throws(DiskError) -> Bool {
        try table.store32(UInt32(truncatingIfNeeded: count), at: header.allocatedBlocksOffset, order)
    }

    // MARK: - Giving

    /// Adds places that nothing leads to, on the disk either.
    func addFree(_ run: FreeBlocks.Run) { state.withLock { $0.free.add(run) } }

    /// Gives up a place that an entry on the disk may still lead to.
    func giveUp(_ place: UInt64, isZero: Bool) {
        state.withLock { state in
            guard place < state.end else { return }
            state.givenUp.add(place, isZero: isZero)
        }
    }

    // MARK: - Flushing

    /// Changes have begun: what is free at the file's end may be cut off.
    func allowShrinking() { state.withLock { $0.mayShrink = true } }

    /// The places that were given up before a flush begins.
    func beginFlush() -> FreeBlocks {
        state.withLock { state in
            defer { state.givenUp = FreeBlocks(blockSize: 1) }
            state.flushes += 1
            return state.givenUp
        }
    }

    /// After the flush: nothing on the disk leads to those places any more (or, if it failed, perhaps still).
    func endFlush(_ givenUp: FreeBlocks, succeeded: Bool) {
        state.withLock { state in
            state.flushes -= 1
            if succeeded { state.free.add(givenUp) } else { state.givenUp.add(givenUp) }
        }
    }

    /// Makes the file long enough for all that was taken, before entries point there. Under the lock under which places
    /// are taken, so that nobody can have written behind the new length.
    func growFile() throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            let wanted = length(state.end)
            guard state.length < wanted else { return }
            if try handle.storage.length() < wanted { try handle.storage.setLength(wanted) }
            state.length = wanted
            handle.noteWrite()
        }
    }

    /// Cuts off the free places at the file's end; answers whether there is a new count to be written.
    ///
    /// No entry on the disk leads to a free place, and nobody writes to it, so that the moment does not matter.
    func shrinkFile() throws(DiskError) -> Bool {
        try state.withLock { (state) throws(DiskError) in
            guard state.mayShrink else { return false }
            var end = state.end
            var cut: [FreeBlocks.Run] = []
            while let run = state.free.takeLast(endingAt: end) {
                cut.append(run)
                end = run.offset
            }
            guard end < state.end else { return false }
            if !handle.storage.traits.hasFixedLength {
                do throws(DiskError) {
                    try handle.storage.setLength(length(end))
                } catch {
                    for run in cut { state.free.add(run) }
                    throw error
                }
                state.length = length(end)
                fileEnd.value = state.length
                handle.noteWrite()
            }
            state.end = end
            return try lowerCount(&state)
        }
    }

    /// Makes the header's count that of the places; answers whether there is anything to be written.
    func settleCount() throws(DiskError) -> Bool {
        try state.withLock { (state) throws(DiskError) in try lowerCount(&state) }
    }

    private func lowerCount(_ state: inout State) throws(DiskError) -> Bool {
        guard state.count != state.end, try storeCount(state.end, .header) else { return false }
        state.count = state.end
        return true
    }
}

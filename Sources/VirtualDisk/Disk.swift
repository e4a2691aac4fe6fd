internal import CLinux
internal import DiskImage
public import DiskStorage
internal import Dispatch
internal import Glibc

/// A chain of images as one disk of bytes: read, written, flushed and discarded at any offset and length, from any
/// number of threads at once.
///
/// All data moves here and nowhere else: formats only say where. Writes go to the top image; a block that it does not
/// hold yet is completed from below (copy-on-write) at the top image's block size.
public final class Disk: Sendable {
    /// The images as they are now.
    let current: CurrentChain
    /// The size in bytes.
    public let size: UInt64
    /// Whether writes are possible.
    public let isWritable: Bool
    let locks: RegionLocks
    let cache: TableCache
    private let relocation = Locked(RelocationState())
    private let lazyFlush: LazyFlush?
    private let isClosed = Locked(false)
    /// The way to its images' files, for changes of the chain; nil: the disk was made of images that were open.
    let opener: ChainOpener?
    /// Held by who changes the chain, all the time that it takes.
    let changing = Locked(())
    /// Whether the chain was changed since the disk was opened.
    let hasChangedChain = Locked(false)
    /// Whether an image may name another parent than the one that it lies over: a change of it failed half way.
    let hasUncertainLink = Locked(false)

    /// The files that are locked and belong to no image: a block cache's.
    private let lockedFiles: [FileStorage]

    init(
        chain: Chain, cache: TableCache, opener: ChainOpener? = nil, lockedFiles: [FileStorage] = [], isWritable: Bool,
        lazyFlushInterval: Int
    ) {
        self.lockedFiles = lockedFiles
        current = CurrentChain(chain)
        self.cache = cache
        self.opener = opener
        self.isWritable = isWritable
        size = chain.size
        // A region is never smaller than a block of whichever image may be written to.
        locks = RegionLocks(blockSize: chain.layers.map(\.backend.blockSize).max() ?? 0)
        lazyFlush = isWritable && lazyFlushInterval > 0 ? LazyFlush(interval: lazyFlushInterval) : nil
        lazyFlush?.start { [weak self] in self?.flushIfChanged() }
    }

    /// The allocation unit of the top image in bytes; 0 if everything is always allocated.
    public var blockSize: UInt64 { current.chain.blockSize }

    /// The images as they are now, for whoever knows that they are not being changed: a copy of a disk of its own.
    var chain: Chain { current.chain }

    // MARK: - Reading

    /// Fills `buffer` from `offset` on. The range must lie inside the disk.
    public func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        try checkRange(offset, buffer.count)
        var done = 0
        while done < buffer.count {
            let position = offset + UInt64(done)
            let part = partLength(position, buffer.count - done)
            locks.lockShared(position, UInt64(part))
            defer { locks.unlockShared(position, UInt64(part)) }
            try current.withHeld { (chain) throws(DiskError) in
                try chain.read(into: buffer.slice(done, part), at: position)
            }
            done += part
        }
    }

    /// Reads `count` bytes from `offset` on.
    public func read(at offset: UInt64, count: Int) throws(DiskError) -> [UInt8] {
        try checkRange(offset, count)
        var bytes = [UInt8](repeating: 0, count: count)
        try bytes.withIOBuffer { (buffer) throws(DiskError) in try read(into: buffer, at: offset) }
        return bytes
    }

    /// Fills several buffers, one after the other, with what follows from `offset` on.
    public func read(into buffers: [IOBuffer], at offset: UInt64) throws(DiskError) {
        try checkRange(offset, total(buffers.map(\.count)))
        var position = offset
        for buffer in buffers {
            try read(into: buffer, at: position)
            position += UInt64(buffer.count)
        }
    }

    // MARK: - Writing

    /// Writes several pieces of memory, one behind the other. On an error part of it may be written.
    public func write(_ pieces: [IOBytes], at offset: UInt64) throws(DiskError) {
        try checkRange(offset, total(pieces.map(\.count)))
        var position = offset
        for piece in pieces {
            try write(piece, at: position)
            position += UInt64(piece.count)
        }
    }

    /// The sum of lengths; more than any disk has, if that is too large for a number.
    private func total(_ counts: [Int]) -> Int {
        counts.reduce(0) { sum, count in
            let (result, overflow) = sum.addingReportingOverflow(count)
            return overflow ? .max : result
        }
    }

    /// Writes all of `bytes` at `offset`. The range must lie inside the disk.
    ///
    /// When it returns, later reads see the bytes; they are on stable storage after the next ``flush()``. On an error
    /// part of the range may be written.
    public func write(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) {
        try checkRange(offset, bytes.count)
        try checkWritable()
        var done = 0
        while done < bytes.count {
            let part = partLength(offset + UInt64(done), bytes.count - done)
            let range = bytes.slice(done, part)
            if try !overwrite(range, at: offset + UInt64(done)) {
                try writeAllocating(range, at: offset + UInt64(done))
            }
            done += part
        }
    }

    /// Writes an array.
    public func write(_ bytes: [UInt8], at offset: UInt64) throws(DiskError) {
        try bytes.withIOBytes { (memory) throws(DiskError) in try write(memory, at: offset) }
    }

    /// Writes in place if the top image holds the whole range already; otherwise answers false and has written nothing.
    private func overwrite(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) -> Bool {
        locks.lockShared(offset, UInt64(bytes.count))
        defer { locks.unlockShared(offset, UInt64(bytes.count)) }
        var isDone = false
        try current.withHeld { (chain) throws(DiskError) in
            try chain.beginWriting()
            chain.dirty?.note(offset, UInt64(bytes.count))
            isDone = try chain.overwrite(bytes, at: offset)
        }
        return isDone
    }

    /// Writes a range of which the top image does not hold everything.
    private func writeAllocating(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) {
        locks.lockExclusive(offset, UInt64(bytes.count))
        defer { locks.unlockExclusive(offset, UInt64(bytes.count)) }
        try current.withHeld { (chain) throws(DiskError) in
            try chain.beginWriting()
            chain.dirty?.note(offset, UInt64(bytes.count))
            try chain.writeLocked(bytes, at: offset)
        }
    }

    /// Makes a range read as zeros and gives its space back as far as the top image can.
    public func discard(offset: UInt64, length: UInt64) throws(DiskError) {
        guard offset <= size, length <= size - offset else {
            throw DiskError(.invalidArgument, "\(length) bytes reach beyond the disk's end at \(size)", offset: offset)
        }
        try checkWritable()
        var position = offset
        let end = offset + length
        while position < end {
            // Up to the end of the region, so that each part is under one lock.
            let regionEnd = ((position / locks.regionSize) + 1).multipliedReportingOverflow(by: locks.regionSize)
            let part = min(end, regionEnd.overflow ? end : regionEnd.partialValue) - position
            try discardRegion(position, part)
            position += part
        }
    }

    /// Discards a range of one region.
    private func discardRegion(_ offset: UInt64, _ length: UInt64) throws(DiskError) {
        locks.lockExclusive(offset, length)
        defer { locks.unlockExclusive(offset, length) }
        try current.withHeld { (chain) throws(DiskError) in
            try chain.beginWriting()
            chain.dirty?.note(offset, length)
            try chain.discardLocked(offset, length)
        }
    }

    // MARK: - Durability

    /// When it returns, everything written before the call is on stable storage, and so is the way to it.
    public func flush() throws(DiskError) {
        guard isWritable else { return }
        try current.use { (chain) throws(DiskError) in
            guard chain.writing.hasBegun else { return }
            try chain.flush()
            do throws(DiskError) {
                try relocate(in: chain)
            } catch {
                chain.writing.noteChange()
                throw error
            }
        }
    }

    /// Closes the disk and removes the files of its top image: what was written since that was made is gone.
    public func closeDeletingTop() throws(DiskError) {
        let layers = current.chain.layers
        let files = try ImageFiles(of: layers.prefix(1), but: layers.dropFirst())
        try close()
        try files.remove()
    }

    /// Flushes and closes all images: unclean marks are cleared, locks given back. No other call may follow or be under
    /// way. A second call does nothing.
    public func close() throws(DiskError) { try close(movingBlocks: true) }

    /// The same; without `movingBlocks` holes in the top image's file stay, for who has changed the image itself.
    func close(movingBlocks: Bool) throws(DiskError) {
        guard
            isClosed.withLock({ closed in
                defer { closed = true }
                return !closed
            })
        else { return }
        lazyFlush?.stop()
        var failure: DiskError?
        // A flush in the background may be moving blocks; it stops after the one at hand.
        relocation.withLock { $0.isClosing = true }
        while relocation.withLock({ $0.isBusy }) { usleep(1000) }
        let chain = current.chain
        chain.earlyWriteback?.wait()
        do throws(DiskError) { if movingBlocks { try finishRelocating(in: chain) } } catch { failure = error }
        for layer in chain.layers {
            do throws(DiskError) { try layer.backend.close() } catch { failure = failure ?? error.about(layer.path) }
        }
        closeCache(of: chain)
        for layer in chain.layers { layer.unlock() }
        for file in lockedFiles { file.unlockImage() }
        if let failure { throw failure }
    }

    @inline(__always)
    private func checkWritable() throws(DiskError) {
        guard isWritable else { throw DiskError(.readOnly, "the disk is mounted read-only") }
    }

    /// Tells the top image that changes are coming, for who writes to it past ``write(_:at:)``.
    func beginWriting() throws(DiskError) {
        try checkWritable()
        try current.chain.beginWriting()
    }

    /// Flushes what was written since the last flush, if anything was: for who calls it every few seconds instead of
    /// ``DiskOptions/lazyFlushInterval``. A failure shows at the next flush that somebody asks for.
    public func flushIfChanged() {
        let chain = current.chain
        guard chain.writing.isChanged || chain.relocating?.needsRelocation == true else { return }
        try? flush()  // whoever needs to know asks for a flush; the next one reports the same failure
    }

    /// Fills the holes that are left in the top image's file.
    func finishRelocating(in chain: Chain, isClosing: Bool = true) throws(DiskError) {
        guard let relocating = chain.relocating, relocating.needsRelocation || chain.writing.isChanged else { return }
        // What was discarded last is a hole after a flush.
        do throws(DiskError) { try relocating.flush() } catch { throw error.about(chain.layers[0].path) }
        while try relocate(in: chain, atMost: .max, isClosing: isClosing) {}
    }

    /// Whether blocks are being moved, which one thread does at a time, and whether the disk is being closed, which
    /// then moves them alone.
    private struct RelocationState {
        var isBusy = false
        var isClosing = false
    }

    /// Answers whether the caller may move blocks.
    func beginRelocating(isClosing: Bool) -> Bool {
        relocation.withLock { state in
            guard !state.isBusy, state.isClosing == isClosing else { return false }
            state.isBusy = true
            return true
        }
    }

    /// Whether it may go on.
    func mayRelocate(isClosing: Bool) -> Bool { relocation.withLock { $0.isClosing == isClosing } }

    func endRelocating() { relocation.withLock { $0.isBusy = false } }

    /// What the block cache has been good for; nil if there is none.
    public var blockCacheUse: CacheUse? { current.chain.cache?.use }

    // MARK: - Ranges

    @inline(__always)
    func checkRange(_ offset: UInt64, _ count: Int) throws(DiskError) {
        guard offset <= size, UInt64(count) <= size - offset else {
            throw DiskError(.invalidArgument, "\(count) bytes reach beyond the disk's end at \(size)", offset: offset)
        }
    }

    /// How much of a request is done at once: what touches no more than two regions.
    @inline(__always)
    func partLength(_ offset: UInt64, _ count: Int) -> Int { min(count, Int(min(locks.regionSize, 1 << 40))) }
}

/// Calls a closure every few seconds on a queue of low priority.
private final class LazyFlush: @unchecked Sendable {  // a Dispatch source may be used from any thread
    private let timer: any DispatchSourceTimer

    init(interval: Int) {
        timer = DispatchSource.makeTimerSource(queue: .global(qos: .utility))
        timer.schedule(deadline: .now() + .seconds(interval), repeating: .seconds(interval), leeway: .seconds(1))
    }

    func start(_ body: @escaping @Sendable () -> Void) {
        timer.setEventHandler(handler: body)
        timer.activate()
    }

    func stop() { timer.cancel() }
}

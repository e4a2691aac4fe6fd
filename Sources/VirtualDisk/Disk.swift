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
    let chain: Chain
    /// The size in bytes.
    public let size: UInt64
    /// Whether writes are possible.
    public let isWritable: Bool
    /// The allocation unit of the top image in bytes; 0 if everything is always allocated.
    public let blockSize: UInt64
    let locks: RegionLocks
    let scratch = ScratchPool()
    let cache: TableCache
    private let writing: WritingState
    /// The top image, if its blocks can be moved.
    let relocating: (any RelocatingBackend)?
    private let relocation = Locked(RelocationState())
    private let lazyFlush: LazyFlush?
    let earlyWriteback: EarlyWriteback?
    private let isClosed = Locked(false)
    private let lockedFiles: [FileStorage]

    init(chain: Chain, cache: TableCache, lockedFiles: [FileStorage], isWritable: Bool, lazyFlushInterval: Int) {
        self.chain = chain
        self.cache = cache
        self.lockedFiles = lockedFiles
        self.isWritable = isWritable
        size = chain.size
        blockSize = chain.layers[0].backend.blockSize
        locks = RegionLocks(blockSize: blockSize)
        writing = WritingState()
        relocating = isWritable ? chain.layers[0].backend as? any RelocatingBackend : nil
        earlyWriteback = isWritable ? EarlyWriteback() : nil
        lazyFlush = isWritable && lazyFlushInterval > 0 ? LazyFlush(interval: lazyFlushInterval) : nil
        lazyFlush?.start { [weak self] in self?.flushIfChanged() }
    }

    // MARK: - Reading

    /// Fills `buffer` from `offset` on. The range must lie inside the disk.
    public func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        try checkRange(offset, buffer.count)
        guard isWritable else { return try chain.read(into: buffer, at: offset) }
        var done = 0
        while done < buffer.count {
            let position = offset + UInt64(done)
            let part = partLength(position, buffer.count - done)
            locks.lockShared(position, UInt64(part))
            defer { locks.unlockShared(position, UInt64(part)) }
            try chain.read(into: buffer.slice(done, part), at: position)
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

    // MARK: - Writing

    /// Writes all of `bytes` at `offset`. The range must lie inside the disk.
    ///
    /// When it returns, later reads see the bytes; they are on stable storage after the next ``flush()``. On an error
    /// part of the range may be written.
    public func write(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) {
        try checkRange(offset, bytes.count)
        try beginWriting()
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
        var batch = ExtentBatch()
        let top = chain.top
        try top.map(offset, UInt64(bytes.count), into: &batch)
        guard batch.coveredLength >= UInt64(bytes.count) else { return false }
        for number in 0..<batch.count where batch[number].kind != .data { return false }
        var done = 0
        for number in 0..<batch.count where done < bytes.count {
            let extent = batch[number]
            let part = bytes.slice(done, Int(min(extent.length, UInt64(bytes.count - done))))
            try top.write(extent.storage, part, at: extent.fileOffset, for: .guestData)
            done += part.count
        }
        if bytes.count >= EarlyWriteback.smallestWrite, let earlyWriteback,
            earlyWriteback.continues(at: offset, bytes.count)
        {
            earlyWriteback.note(bytes.count, in: top.storage(batch[0].storage))
        }
        return true
    }

    // MARK: - Durability

    /// When it returns, everything written before the call is on stable storage, and so is the way to it.
    public func flush() throws(DiskError) {
        guard isWritable, writing.hasBegun else { return }
        writing.noteFlush()
        do throws(DiskError) {
            try chain.layers[0].backend.flush()
            try relocate()
        } catch {
            writing.noteChange()
            throw error.about(chain.layers[0].path)
        }
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
        earlyWriteback?.wait()
        do throws(DiskError) { if movingBlocks { try finishRelocating() } } catch { failure = error }
        for layer in chain.layers {
            do throws(DiskError) { try layer.backend.close() } catch { failure = failure ?? error.about(layer.path) }
        }
        chain.cache?.close()
        for file in lockedFiles { file.unlockImage() }
        if let failure { throw failure }
    }

    /// Tells the top image, once, that changes are coming; called before every change.
    @inline(__always)
    func beginWriting() throws(DiskError) {
        guard isWritable else { throw DiskError(.readOnly, "the disk is mounted read-only") }
        if writing.isChanged { return }
        try writing.begin { () throws(DiskError) in try chain.layers[0].backend.beginWriting() }
    }

    /// Flushes what was written since the last flush, if anything was: for who calls it every few seconds instead of
    /// ``DiskOptions/lazyFlushInterval``. A failure shows at the next flush that somebody asks for.
    public func flushIfChanged() {
        guard writing.isChanged || relocating?.needsRelocation == true else { return }
        try? flush()  // whoever needs to know asks for a flush; the next one reports the same failure
    }

    /// Fills the holes that are left in the top image's file.
    private func finishRelocating() throws(DiskError) {
        guard let relocating, relocating.needsRelocation || writing.isChanged else { return }
        // What was discarded last is a hole after a flush.
        do throws(DiskError) { try relocating.flush() } catch { throw error.about(chain.layers[0].path) }
        while try relocate(atMost: .max, isClosing: true) {}
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
    public var blockCacheUse: CacheUse? { chain.cache?.use }

    /// Whether nothing was written since the disk was opened: its files are what they were.
    var isUnwritten: Bool { !writing.hasBegun }

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

/// Whether the top image has been told that changes are coming, and whether there were any since the last flush.
@safe
private final class WritingState: @unchecked Sendable {  // two words that are only accessed atomically
    private let words: UnsafeMutablePointer<UInt32>
    private let beginning = Locked(false)

    init() {
        unsafe words = .allocate(capacity: 2)
        unsafe words.initialize(repeating: 0, count: 2)
    }

    deinit { unsafe words.deallocate() }

    /// Whether changes were announced.
    var hasBegun: Bool { unsafe clinux_load32_acquire(words) != 0 }
    /// Whether there may have been changes since the last flush.
    @inline(__always) var isChanged: Bool { unsafe clinux_load32_acquire(words + 1) != 0 }

    func noteFlush() { unsafe clinux_store32_release(words + 1, 0) }
    func noteChange() { unsafe clinux_store32_release(words + 1, 1) }

    func begin(_ body: () throws(DiskError) -> Void) throws(DiskError) {
        try beginning.withLock { (_) throws(DiskError) in
            if unsafe clinux_load32_acquire(words) == 0 {
                try body()
                unsafe clinux_store32_release(words, 1)
            }
            noteChange()
        }
    }
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

internal import CLinux
internal import DiskStorage

/// The one cache of mapping tables: pages of files' bytes, in bounded memory, read without a lock.
///
/// A format keeps its tables (grain tables, block map, BAT, L2, …) in files; it asks here for one entry at a byte
/// offset and stores one entry at a byte offset. What an entry means is the format's business alone.
///
/// *Reading* finds the page by its tag in an 8-way set and loads the entry with a sequence check around it (a seqlock a
/// slot), so concurrent hits share no written memory. *Storing* and *misses* take the lock; no lock is held while a
/// page is read from its file. A page that was stored to stays until ``TableSet/flush(data:)`` has written it, in the
/// order that ``WriteOrder`` says.
@safe
public final class TableCache: @unchecked Sendable {  // slots are guarded by `state`'s lock or by their sequence number
    /// What is true of a slot besides its content; guarded by the lock.
    struct Slot {
        /// The sectors that changed since they were last written, a bit each, by order of writing.
        var dirty = InlineArray<5, UInt8>(repeating: 0)
        /// The set that will write it.
        var owner: UInt32 = 0
        /// Its page is being read from its file.
        var isFilling = false
        /// Its changes are being written.
        var isWriting = false
        var isDirty: Bool { dirty[0] | dirty[1] | dirty[2] | dirty[3] | dirty[4] != 0 }
        var canBeTaken: Bool { !isFilling && !isWriting && !isDirty }
    }

    /// A file whose pages are cached.
    struct File {
        let storage: any Storage
        let owner: UInt32
        /// Where the tables end in it: what comes after them is not written, though it shares a sector with them.
        let end: UInt64
    }

    struct State {
        var slots: [Slot]
        var files: [UInt32: File] = [:]
        var nextFile: UInt32 = 0
        var nextSet: UInt32 = 0
        /// Tags of the pages that are being read from their files.
        var pending: [UInt64] = []
        /// Slots with changes, by the set that will write them.
        var dirtySlots: [UInt32: Int] = [:]
        /// How many slots with changes a set can have, where that is limited.
        var dirtyLimits: [UInt32: Int] = [:]
    }

    /// The memory for pages in bytes.
    public let capacity: Int
    let index: PageIndex
    /// Counts the changes that somebody may wait for: who waits sleeps on it.
    private let changes: UnsafeMutablePointer<UInt32>
    let state: Locked<State>

    /// A cache of at most `capacity` bytes of pages (rounded down to a power of two pages, at least 64 KiB).
    public init(capacity: Int = 8 << 20) {
        let wanted = max(capacity, 64 << 10) / (PageIndex.pageSize * PageIndex.ways)
        let setCount = 1 << (Int.bitWidth - 1 - wanted.leadingZeroBitCount)
        index = PageIndex(setCount: setCount)
        self.capacity = setCount * PageIndex.ways * PageIndex.pageSize
        unsafe changes = .allocate(capacity: 1)
        unsafe changes.initialize(to: 0)
        state = Locked(State(slots: Array(repeating: Slot(), count: setCount * PageIndex.ways)))
    }

    deinit {
        index.deallocate()
        unsafe changes.deallocate()
    }

    // MARK: - Reading

    /// Loads a word whose page is not at hand: reads the page in, and waits for who does so already.
    @inline(never)
    func loadSlowly(_ fileTag: UInt64, _ offset: UInt64, wide: Bool) throws(DiskError) -> UInt64 {
        let tag = fileTag | offset >> 12
        let value = try withPage(tag) { slot, _ in
            index.touch(slot)
            let place = unsafe index.place(slot, offset)
            return unsafe wide ? clinux_load64_relaxed(place) : UInt64(clinux_load32_relaxed(place))
        }
        if let value { return value }
        // Every slot of the set waits to be written: the file itself is as good, since the page is not cached.
        let storage = file(of: tag).storage
        let bytes = try storage.availableBytes(at: offset, count: wide ? 8 : 4, for: .table)
        return bytes.reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
    }

    // MARK: - Storing

    /// Stores a 32-bit word; `order` says after what it may be written. False: no slot is free for the page, or the set
    /// can take no more changes, until it has been flushed.
    func store32(_ fileTag: UInt64, _ offset: UInt64, _ value: UInt32, _ order: WriteOrder) throws(DiskError) -> Bool {
        try withPage(fileTag | offset >> 12) { slot, state -> Bool in
            guard markDirty(slot, sector: Int(offset & 4095) / 512, order, &state) else { return false }
            unsafe clinux_store32_relaxed(index.place(slot, offset), value)
            return true
        } == true
    }

    /// Stores a 64-bit word; see ``store32(_:_:_:_:)``.
    func store64(_ fileTag: UInt64, _ offset: UInt64, _ value: UInt64, _ order: WriteOrder) throws(DiskError) -> Bool {
        try withPage(fileTag | offset >> 12) { slot, state -> Bool in
            guard markDirty(slot, sector: Int(offset & 4095) / 512, order, &state) else { return false }
            unsafe clinux_store64_relaxed(index.place(slot, offset), value)
            return true
        } == true
    }

    /// Stores two 64-bit words at `offset`, a multiple of 16, at once; see ``store32(_:_:_:_:)``.
    func storePair(
        _ fileTag: UInt64, _ offset: UInt64, _ first: UInt64, _ second: UInt64, _ order: WriteOrder
    ) throws(DiskError) -> Bool {
        try withPage(fileTag | offset >> 12) { slot, state -> Bool in
            guard markDirty(slot, sector: Int(offset & 4095) / 512, order, &state) else { return false }
            unsafe clinux_store64_relaxed(index.place(slot, offset), first)
            unsafe clinux_store64_relaxed(index.place(slot, offset + 8), second)
            return true
        } == true
    }

    /// Notes a change that is about to be made, under the lock; answers whether it may be.
    private func markDirty(_ slot: Int, sector: Int, _ order: WriteOrder, _ state: inout State) -> Bool {
        let owner = state.slots[slot].owner
        if !state.slots[slot].isDirty {
            let count = state.dirtySlots[owner] ?? 0
            if let limit = state.dirtyLimits[owner], count >= limit { return false }
            state.dirtySlots[owner] = count + 1
        }
        state.slots[slot].dirty[order.rawValue] |= 1 << UInt8(sector)
        return true
    }

    // MARK: - Pages coming and going

    /// Runs `body` under the lock with the slot that holds the page, reading it in first; nil if there is no room.
    func withPage<R>(_ tag: UInt64, _ body: (Int, inout State) -> R) throws(DiskError) -> R? {
        while true {
            let step: PageStep<R> = state.withLock { state in
                let slot = index.find(tag)
                if slot >= 0 { return .done(body(slot, &state)) }
                if state.pending.contains(tag) { return unsafe .wait(clinux_load32_acquire(changes)) }
                guard let victim = takeVictim(for: tag, &state) else {
                    let isFilling = candidates(for: tag).contains { state.slots[$0].isFilling }
                    return unsafe isFilling ? .wait(clinux_load32_acquire(changes)) : .full
                }
                state.pending.append(tag)
                return .fill(victim)
            }
            switch step {
            case .done(let result): return result
            case .wait(let count): unsafe clinux_futex_wait(changes, count)
            case .fill(let slot): try fill(slot, tag)
            case .full: return nil
            }
        }
    }

    private func candidates(for tag: UInt64) -> Range<Int> {
        let first = index.firstSlot(tag)
        return first..<first + PageIndex.ways
    }

    /// Empties a slot of the page's set: a free one, else the least recently read one without changes.
    private func takeVictim(for tag: UInt64, _ state: inout State) -> Int? {
        let candidates = candidates(for: tag).filter { state.slots[$0].canBeTaken }
        var victim = candidates.first { unsafe index.tags[$0] == 0 }
        if victim == nil {
            victim = candidates.first { unsafe clinux_load8_relaxed(index.recent + $0) == 0 } ?? candidates.first
            for slot in candidates { unsafe clinux_store8_relaxed(index.recent + slot, 0) }
        }
        guard let victim else { return nil }
        state.slots[victim].isFilling = true
        index.beginChange(victim)
        return victim
    }

    /// Reads a page into a slot that was taken for it, and wakes who waits for it.
    private func fill(_ slot: Int, _ tag: UInt64) throws(DiskError) {
        let file = file(of: tag)
        var failure: DiskError?
        var bytes: [UInt8] = []
        do throws(DiskError) {
            let page = tag & (1 << PageIndex.pageBits - 1)
            bytes = try file.storage.availableBytes(
                at: page * UInt64(PageIndex.pageSize), count: PageIndex.pageSize, for: .table)
        } catch {
            failure = error
        }
        bytes.append(contentsOf: repeatElement(0, count: PageIndex.pageSize - bytes.count))
        state.withLock { state in
            state.slots[slot] = Slot()
            state.slots[slot].owner = file.owner
            index.endChange(slot, bytes, tag: failure == nil ? tag : 0)
            state.pending.removeAll { $0 == tag }
        }
        wakeWaiters()
        if let failure { throw failure }
    }

    /// Wakes those who wait for a slot to change its state.
    func wakeWaiters() {
        _ = unsafe clinux_fetch_add32(changes, 1)
        unsafe clinux_futex_wake_all(changes)
    }

    func file(of tag: UInt64) -> File {
        let number = UInt32(truncatingIfNeeded: tag >> PageIndex.pageBits) &- 1
        guard let file = state.withLock({ $0.files[number] }) else {
            preconditionFailure("a table of a closed image was asked for")
        }
        return file
    }

    /// Bytes of pages that are cached, and of those that hold changes which are not written yet.
    public var use: (cached: Int, dirty: Int) {
        state.withLock { state in
            let cached = state.slots.indices.count { unsafe index.tags[$0] != 0 }
            return (cached * PageIndex.pageSize, state.dirtySlots.values.reduce(0, +) * PageIndex.pageSize)
        }
    }

    // MARK: - Files

    /// Makes a file's bytes cacheable and answers its tag.
    func attach(_ storage: any Storage, owner: UInt32, end: UInt64) -> UInt64 {
        state.withLock { state in
            let number = state.nextFile
            state.nextFile += 1
            state.files[number] = File(storage: storage, owner: owner, end: end)
            return UInt64(number + 1) << PageIndex.pageBits
        }
    }

    /// A number for a new set of tables.
    func newSet() -> UInt32 {
        state.withLock { state in
            state.nextSet += 1
            return state.nextSet
        }
    }

    /// Forgets all pages and files of a set, changed ones too.
    func detach(set: UInt32) {
        state.withLock { state in
            let numbers = state.files.filter { $0.value.owner == set }.keys
            for slot in state.slots.indices {
                let tag = unsafe index.tags[slot]
                guard tag != 0, numbers.contains(UInt32(truncatingIfNeeded: tag >> PageIndex.pageBits) &- 1) else {
                    continue
                }
                index.beginChange(slot)
                unsafe clinux_store32_release(index.sequences + slot, index.sequences[slot] &+ 1)
                state.slots[slot] = Slot()
            }
            for number in numbers { state.files[number] = nil }
            state.dirtySlots[set] = nil
            state.dirtyLimits[set] = nil
        }
    }
}

/// What to do next about a page that is wanted.
private enum PageStep<Result> {
    case done(Result)
    /// Sleep until the count of changes moves on.
    case wait(UInt32)
    case fill(Int)
    case full
}

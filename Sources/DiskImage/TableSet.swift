internal import CLinux
public import DiskStorage

/// After what a changed table entry may be written: each order is on stable storage before the next one is begun, and
/// guest data before the first.
public enum WriteOrder: Int, Sendable, CaseIterable {
    /// Records of which space is taken (free pointers, refcounts): before anything that points there.
    case allocation = 0
    /// Entries that point to such records: after these, and before anything that they vouch for.
    case allocationDirectory = 1
    /// Entries that point to guest data.
    case entry = 2
    /// Entries that point to tables.
    case directory = 3
    /// What points to everything.
    case header = 4

    /// What such a write is for.
    var purpose: StoragePurpose { rawValue <= Self.allocationDirectory.rawValue ? .allocation : .table }
}

/// The tables of one open image: the files they lie in and the changes that wait to be written, in order.
///
/// ``flush(data:)`` is the only way in which a change reaches a file: guest data first, then the changes that were
/// there when the flush began, order by order, with a flush between. A change made meanwhile waits for the next flush,
/// since its data may not be durable yet.
public final class TableSet: Sendable {
    /// Where tables must end in their files: what the cache can number.
    public static let offsetLimit: UInt64 = UInt64(PageIndex.pageSize) << PageIndex.pageBits

    let cache: TableCache
    let number: UInt32
    /// Serialises flushes; the value counts those that are finished.
    private let flushing = Locked<UInt64>(0)
    /// Flushes asked for so far.
    private let tickets = Locked<UInt64>(0)
    private let dirtyLimit: Int
    private let journal: (any TableJournal)?

    /// With a `journal`, changes go through it instead of being written in their order; all tables lie in one file
    /// then.
    public init(cache: TableCache, journal: (any TableJournal)? = nil) {
        self.cache = cache
        self.journal = journal
        let number = cache.newSet()
        self.number = number
        let limit = max(4, min(1024, cache.capacity / PageIndex.pageSize / 4))
        guard let journal else {
            dirtyLimit = limit
            return
        }
        // What is changed between two flushes fits into one record of the journal.
        let pageLimit = max(1, journal.pageLimit)
        dirtyLimit = max(1, min(limit, pageLimit / 2))
        cache.state.withLock { $0.dirtyLimits[number] = pageLimit }
    }

    deinit { cache.detach(set: number) }

    /// A file with tables of this image in it. Changes are written as whole sectors; where the last sector with a table
    /// holds something else as well, `end` says where the tables end.
    public func table(in storage: any Storage, endingAt end: UInt64 = .max) -> Table {
        Table(cache: cache, tag: cache.attach(storage, owner: number, end: end))
    }

    /// Whether so many changes wait that they should be flushed before more are made.
    public var needsFlush: Bool { cache.state.withLock { $0.dirtySlots[number] ?? 0 } >= dirtyLimit }

    /// Whether changes wait.
    public var isDirty: Bool { cache.state.withLock { $0.dirtySlots[number] ?? 0 } > 0 }

    /// Makes durable what `data` flushes, and then every change stored before the call.
    ///
    /// Callers at the same time share the work: one that waited while another's flush began after it asked is done.
    public func flush(data flushData: () throws(DiskError) -> Void) throws(DiskError) {
        let ticket = tickets.withLock { tickets in
            tickets += 1
            return tickets
        }
        try flushing.withLock { (finished) throws(DiskError) in
            if finished >= ticket { return }
            let covered = tickets.withLock { $0 }
            try flushAlone(flushData)
            finished = covered
        }
    }

    /// Changed sectors, copied out of a page.
    private struct StagedRun {
        let slot: Int
        let order: WriteOrder
        let sectors: UInt8
        let file: UInt32
        let offset: UInt64
        let bytes: [UInt8]
    }

    private func flushAlone(_ flushData: () throws(DiskError) -> Void) throws(DiskError) {
        if let journal { return try flush(through: journal, flushData) }
        let (runs, slots) = stage()
        do throws(DiskError) {
            try flushData()
            for order in WriteOrder.allCases { try write(runs.filter { $0.order == order }) }
        } catch {
            release(slots, redo: runs)
            throw error
        }
        release(slots, redo: [])
    }

    /// Copies all changes, and holds their pages in place until they are written.
    private func stage() -> (runs: [StagedRun], slots: [Int]) {
        cache.state.withLock { state in
            guard let count = state.dirtySlots[number], count > 0 else { return ([], []) }
            var runs: [StagedRun] = []
            var slots: [Int] = []
            for slot in state.slots.indices where state.slots[slot].owner == number && state.slots[slot].isDirty {
                let tag = unsafe cache.index.tags[slot]
                for order in WriteOrder.allCases {
                    let dirty = state.slots[slot].dirty[order.rawValue]
                    for range in Self.runs(of: dirty) {
                        let start = unsafe cache.index.pages + (slot * PageIndex.pageSize + range.lowerBound * 512)
                        unsafe runs.append(
                            StagedRun(
                                slot: slot, order: order, sectors: dirty,
                                file: UInt32(truncatingIfNeeded: tag >> PageIndex.pageBits) &- 1,
                                offset: (tag & (1 << PageIndex.pageBits - 1)) * UInt64(PageIndex.pageSize)
                                    + UInt64(range.lowerBound * 512),
                                bytes: Array(UnsafeRawBufferPointer(start: start, count: range.count * 512))))
                    }
                    state.slots[slot].dirty[order.rawValue] = 0
                }
                state.slots[slot].isWriting = true
                slots.append(slot)
            }
            state.dirtySlots[number] = 0
            return (runs, slots)
        }
    }

    /// A page with changes, copied, and which of its sectors they are in by order.
    private struct StagedPage {
        let slot: Int
        let dirty: InlineArray<5, UInt8>
        let page: TablePage
    }

    /// The same through a journal, which takes whole pages, all of them or none.
    private func flush(
        through journal: any TableJournal, _ flushData: () throws(DiskError) -> Void
    ) throws(DiskError) {
        let staged = stagePages()
        do throws(DiskError) {
            try flushData()
            if !staged.isEmpty { try journal.write(staged.map(\.page).sorted { $0.offset < $1.offset }) }
        } catch {
            release(staged, redo: true)
            throw error
        }
        release(staged, redo: false)
    }

    private func stagePages() -> [StagedPage] {
        cache.state.withLock { state in
            var staged: [StagedPage] = []
            guard let count = state.dirtySlots[number], count > 0 else { return staged }
            for slot in state.slots.indices where state.slots[slot].owner == number && state.slots[slot].isDirty {
                let number = unsafe cache.index.tags[slot] & (1 << PageIndex.pageBits - 1)
                let start = unsafe cache.index.pages + slot * PageIndex.pageSize
                let bytes = unsafe Array(UnsafeRawBufferPointer(start: start, count: PageIndex.pageSize))
                staged.append(
                    StagedPage(
                        slot: slot, dirty: state.slots[slot].dirty,
                        page: TablePage(offset: number * UInt64(PageIndex.pageSize), bytes: bytes)))
                state.slots[slot].dirty = InlineArray(repeating: 0)
                state.slots[slot].isWriting = true
            }
            state.dirtySlots[number] = 0
            return staged
        }
    }

    private func release(_ staged: [StagedPage], redo: Bool) {
        guard !staged.isEmpty else { return }
        cache.state.withLock { state in
            for page in staged {
                state.slots[page.slot].isWriting = false
                guard redo else { continue }
                if !state.slots[page.slot].isDirty { state.dirtySlots[number, default: 0] += 1 }
                for order in WriteOrder.allCases {
                    state.slots[page.slot].dirty[order.rawValue] |= page.dirty[order.rawValue]
                }
            }
        }
        cache.wakeWaiters()
    }

    /// The runs of set bits.
    private static func runs(of mask: UInt8) -> [Range<Int>] {
        var runs: [Range<Int>] = []
        var bit = 0
        while bit < 8 {
            let start = bit
            while bit < 8, mask & 1 << UInt8(bit) != 0 { bit += 1 }
            if bit > start { runs.append(start..<bit) }
            bit += 1
        }
        return runs
    }

    /// Writes the runs of one order and makes them durable.
    private func write(_ runs: [StagedRun]) throws(DiskError) {
        var touched: [UInt32: any Storage] = [:]
        let files = cache.state.withLock { $0.files }
        for run in runs {
            guard let file = files[run.file] else { preconditionFailure("a table file vanished") }
            let count = min(UInt64(run.bytes.count), file.end - min(file.end, run.offset))
            try run.bytes.withIOBytes { (bytes) throws(DiskError) in
                try file.storage.write(
                    bytes.slice(0, Int(count)), at: run.offset, for: run.order.purpose)
            }
            touched[run.file] = file.storage
        }
        for storage in touched.values { try storage.flush() }
    }

    private func release(_ slots: [Int], redo runs: [StagedRun]) {
        guard !slots.isEmpty else { return }
        cache.state.withLock { state in
            for slot in slots { state.slots[slot].isWriting = false }
            for run in runs {
                if !state.slots[run.slot].isDirty { state.dirtySlots[number, default: 0] += 1 }
                state.slots[run.slot].dirty[run.order.rawValue] |= run.sectors
            }
        }
        cache.wakeWaiters()
    }
}

/// A page of a file with tables in it.
public struct TablePage: Sendable {
    /// Where it lies in its file, a multiple of 4096 bytes.
    public let offset: UInt64
    /// Its 4096 bytes.
    public let bytes: [UInt8]

    public init(offset: UInt64, bytes: [UInt8]) {
        self.offset = offset
        self.bytes = bytes
    }
}

/// A format's own journal, through which changes of tables reach its file.
public protocol TableJournal: AnyObject, Sendable {
    /// The most pages that can be written at once.
    var pageLimit: Int { get }

    /// Makes pages durable in the journal, all or none of them, and writes them to where they belong. Guest data is
    /// durable when it is called; no two calls run at the same time.
    func write(_ pages: [TablePage]) throws(DiskError)
}

/// A file with mapping tables in it: loads and stores entries by byte offset. A plain value without references, for the
/// hot path; it lives no longer than its ``TableSet``.
@safe
public struct Table: @unchecked Sendable {  // the cache behind it does its own locking
    private let index: PageIndex
    private let cache: Unmanaged<TableCache>
    private let tag: UInt64

    init(cache: TableCache, tag: UInt64) {
        index = cache.index
        unsafe self.cache = unsafe .passUnretained(cache)
        self.tag = tag
    }

    /// The little-endian 32-bit entry at `offset` (a multiple of 4).
    @inline(__always)
    public func entry32(at offset: UInt64) throws(DiskError) -> UInt32 {
        if let value = index.load32(tag, offset) { return UInt32(littleEndian: value) }
        return unsafe UInt32(
            truncatingIfNeeded: try cache.takeUnretainedValue().loadSlowly(tag, offset, wide: false)
        ).littleEndian
    }

    /// The little-endian 64-bit entry at `offset` (a multiple of 8).
    @inline(__always)
    public func entry64(at offset: UInt64) throws(DiskError) -> UInt64 {
        if let value = index.load64(tag, offset) { return UInt64(littleEndian: value) }
        return unsafe try cache.takeUnretainedValue().loadSlowly(tag, offset, wide: true).littleEndian
    }

    /// Calls `body` with the cache and the file's tag in it.
    func withCache<R>(_ body: (TableCache, UInt64) throws(DiskError) -> R) throws(DiskError) -> R {
        unsafe try body(cache.takeUnretainedValue(), tag)
    }

    /// Stores a little-endian 32-bit entry. False: flush the set first, then store again.
    public func store32(_ value: UInt32, at offset: UInt64, _ order: WriteOrder) throws(DiskError) -> Bool {
        unsafe try cache.takeUnretainedValue().store32(tag, offset, value.littleEndian, order)
    }

    /// Stores a little-endian 64-bit entry. False: flush the set first, then store again.
    public func store64(_ value: UInt64, at offset: UInt64, _ order: WriteOrder) throws(DiskError) -> Bool {
        unsafe try cache.takeUnretainedValue().store64(tag, offset, value.littleEndian, order)
    }

    /// Stores two little-endian 64-bit words that are one entry, at `offset` (a multiple of 16), so that no flush sees
    /// one without the other. (Who reads meanwhile may.) False: flush the set first, then store again.
    public func storePair(
        _ first: UInt64, _ second: UInt64, at offset: UInt64, _ order: WriteOrder
    ) throws(DiskError) -> Bool {
        unsafe try cache.takeUnretainedValue().storePair(
            tag, offset, first.littleEndian, second.littleEndian, order)
    }
}

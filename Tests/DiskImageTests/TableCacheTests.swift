import DiskStorage
import DiskTesting
import Testing

@testable import DiskImage

/// The shared mechanism for mapping tables: entries are right under eviction and concurrency, changes are written in
/// their order and never before guest data, and a failed flush loses nothing.
struct TableCacheTests {
    /// A file of little-endian words, word n being n * 3.
    private func words(_ count: Int) -> MemoryStorage {
        var writer = FieldWriter(count: count * 4)
        for index in 0..<count { writer.littleEndian(UInt32(index * 3), at: index * 4) }
        return MemoryStorage(writer.bytes)
    }

    @Test func entriesAreReadThroughASmallCache() throws {
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: words(1 << 20))
        var generator = SeededGenerator(seed: 4)
        for _ in 0..<20_000 {
            let index = Int.random(in: 0..<1 << 20, using: &generator)
            #expect(try table.entry32(at: UInt64(index * 4)) == UInt32(index * 3))
        }
        #expect(try table.entry64(at: 8) == 6 | 9 << 32)
        #expect(try table.entry32(at: 1 << 30) == 0, "beyond the end there are zeros")
    }

    @Test func changesAreReadBackAndWrittenByAFlushAlone() throws {
        let storage = words(1 << 16)
        let before = storage.bytes
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: storage)
        #expect(try table.store32(77, at: 40, .entry))
        #expect(try table.entry32(at: 40) == 77)
        #expect(set.isDirty)
        #expect(storage.bytes == before)
        var dataWasFlushed = false
        try set.flush { () throws(DiskError) in
            #expect(storage.bytes == before, "an entry was written before guest data was durable")
            dataWasFlushed = true
        }
        #expect(dataWasFlushed && !set.isDirty)
        #expect(try FieldReader(storage.bytes).littleEndian(at: 40, as: UInt32.self) == 77)
    }

    @Test func ordersAreWrittenOneAfterTheOtherWithFlushesBetween() throws {
        let journal = Locked<[String]>([])
        let storage = JournalStorage(words(1 << 16), journal)
        let set = TableSet(cache: TableCache(capacity: 256 << 10))
        let table = set.table(in: storage)
        #expect(try table.store32(1, at: 4096 * 3, .directory))
        #expect(try table.store32(1, at: 4096 * 1, .allocation))
        #expect(try table.store32(1, at: 4096 * 2, .entry))
        #expect(try table.store32(1, at: 4096 * 2 + 512, .entry))
        #expect(try table.store32(1, at: 0, .header))
        try set.flush { () throws(DiskError) in journal.withLock { $0.append("data") } }
        #expect(
            journal.withLock { $0 } == [
                "data", "write 4096", "flush", "write 8192", "flush", "write 12288", "flush", "write 0", "flush",
            ])
    }

    @Test func whatChangesDuringAFlushWaitsForTheNext() throws {
        let storage = words(1 << 16)
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: storage)
        #expect(try table.store32(1, at: 0, .entry))
        try set.flush { () throws(DiskError) in #expect(try table.store32(2, at: 4, .entry)) }
        #expect(try FieldReader(storage.bytes).littleEndian(at: 4, as: UInt32.self) == 3)
        #expect(set.isDirty)
        try set.flush {}
        #expect(try FieldReader(storage.bytes).littleEndian(at: 4, as: UInt32.self) == 2)
    }

    @Test func failedFlushIsDoneAgain() throws {
        let storage = words(1 << 16)
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: storage)
        #expect(try table.store32(5, at: 8, .entry))
        #expect(throws: DiskError.self) {
            try set.flush { () throws(DiskError) in throw .system(5, "flush") }
        }
        #expect(set.isDirty)
        #expect(try FieldReader(storage.bytes).littleEndian(at: 8, as: UInt32.self) == 6)
        try set.flush {}
        #expect(try FieldReader(storage.bytes).littleEndian(at: 8, as: UInt32.self) == 5)
    }

    @Test func fullSetAsksForAFlushAndStillReads() throws {
        let storage = words(1 << 20)
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: storage)
        var refused = 0
        for page in 0..<256 as Range<UInt64> where try !table.store32(9, at: page * 4096, .entry) {
            refused += 1
            #expect(try table.entry32(at: page * 4096) == UInt32(page * 1024 * 3))
            try set.flush {}
            #expect(try table.store32(9, at: page * 4096, .entry))
        }
        #expect(refused > 0)
        try set.flush {}
        for page in 0..<256 {
            #expect(try FieldReader(storage.bytes).littleEndian(at: page * 4096, as: UInt32.self) == 9)
        }
    }

    @Test func failedReadsAreErrorsAndLeaveNothingBehind() throws {
        let fails = Locked(true)
        let storage = JournalStorage(words(1 << 12), Locked([]), failsReads: fails)
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: storage)
        #expect(throws: DiskError.self) { try table.entry32(at: 4) }
        fails.withLock { $0 = false }
        #expect(try table.entry32(at: 4) == 3)
    }

    /// Each word only grows; readers must never see it shrink, nor a word of another place.
    @Test func readersSeeOnlyTheirEntriesWhilePagesComeAndGo() throws {
        let count = 1 << 17
        var writer = FieldWriter(count: count * 4)
        for index in 0..<count { writer.littleEndian(UInt32(index) << 8, at: index * 4) }
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: MemoryStorage(writer.bytes))
        let problems = Locked<[String]>([])
        onThreads(6) { thread in
            var generator = SeededGenerator(seed: UInt64(thread))
            do throws(DiskError) {
                for round in 0..<8000 {
                    let index = Int.random(in: 0..<count, using: &generator)
                    let value = try table.entry32(at: UInt64(index * 4))
                    if value >> 8 != UInt32(index) {
                        problems.withLock { $0.append("word \(index) is \(value)") }
                    }
                    // Words are changed by one thread each.
                    guard thread < 2, index % 2 == thread else { continue }
                    let changed = value & ~0xff | (value + 1) & 0xff
                    while try !table.store32(changed, at: UInt64(index * 4), .entry) { try set.flush {} }
                    if try table.entry32(at: UInt64(index * 4)) != changed {
                        problems.withLock { $0.append("word \(index) lost its change") }
                    }
                    if round % 50 == 0 { try set.flush {} }
                }
            } catch {
                problems.withLock { $0.append("\(error)") }
            }
        }
        #expect(problems.withLock { $0 } == [])
    }
}

/// Notes what is done to a storage, and fails reads on demand.
private final class JournalStorage: Storage {
    let traits = StorageTraits(isWritable: true)
    let name = "journal"
    private let inner: MemoryStorage
    private let journal: Locked<[String]>
    private let failsReads: Locked<Bool>

    init(_ inner: MemoryStorage, _ journal: Locked<[String]>, failsReads: Locked<Bool> = Locked(false)) {
        self.inner = inner
        self.journal = journal
        self.failsReads = failsReads
    }

    func length() -> UInt64 { inner.length() }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        if failsReads.withLock({ $0 }) { throw .system(5, "read") }
        return inner.read(into: buffer, at: offset, for: purpose)
    }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        journal.withLock { $0.append("write \(offset)") }
        try inner.write(bytes, at: offset, for: purpose)
    }

    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        try inner.discard(range, mustZero: mustZero, for: purpose)
    }

    func setLength(_ length: UInt64) throws(DiskError) { try inner.setLength(length) }
    func flush() { journal.withLock { $0.append("flush") } }
    func allocatedBytes() -> UInt64 { inner.allocatedBytes() }
    func nextData(from offset: UInt64) -> Range<UInt64>? { inner.nextData(from: offset) }
}

/// Where tables share a sector with something else.
struct TableEndTests {
    @Test func whatComesAfterTheTablesIsNotWritten() throws {
        let storage = MemoryStorage([UInt8](repeating: 1, count: 4096))
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: storage, endingAt: 1032)
        #expect(try table.store32(7, at: 1028, .entry))
        #expect(try table.store32(8, at: 4, .header))
        // Somebody writes there, directly, after the page was read.
        try storage.write([UInt8](repeating: 2, count: 1000), at: 1032, for: .guestData)
        try set.flush {}
        var expected = [UInt8](repeating: 1, count: 4096)
        expected.replaceSubrange(4..<8, with: [8, 0, 0, 0])
        expected.replaceSubrange(1028..<1032, with: [7, 0, 0, 0])
        for index in 1032..<2032 { expected[index] = 2 }
        #expect(storage.bytes == expected)
    }
}

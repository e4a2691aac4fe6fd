import DiskStorage
import DiskTesting
import Testing

@testable import DiskImage

/// Runs of one entry end where they end, whether their pages are cached, changed, in the file or in its holes.
struct TableRunsTests {
    /// Words of which most are alike, with long holes between.
    private static func words(_ count: Int, using generator: inout SeededGenerator) -> [UInt32] {
        var words: [UInt32] = []
        while words.count < count {
            let word: UInt32 = [0, 0, 1, 1, 7].randomElement(using: &generator) ?? 0
            let length = [1, 2, 3, 700, 5000, 70_000].randomElement(using: &generator) ?? 1
            words += repeatElement(word, count: min(length, count - words.count))
        }
        return words
    }

    /// Writes the words that are not zero: the others are holes.
    private static func write(_ words: [UInt32], to storage: any Storage) throws {
        try storage.setLength(UInt64(words.count * 4))
        var index = 0
        while index < words.count {
            let start = index
            while index < words.count, (words[index] == 0) == (words[start] == 0) { index += 1 }
            guard words[start] != 0 else { continue }
            var writer = FieldWriter(count: (index - start) * 4)
            for place in start..<index { writer.littleEndian(words[place], at: (place - start) * 4) }
            try storage.write(writer.bytes, at: UInt64(start * 4), for: .table)
        }
    }

    @Test(arguments: [64 << 10, 8 << 20]) func endsAreRight(cacheSize: Int) throws {
        var generator = SeededGenerator(seed: 11)
        let folder = try TemporaryFolder()
        let count = 1 << 20
        var words = Self.words(count, using: &generator)
        let storage = try FileStorage(creating: folder.file("tables"))
        try Self.write(words, to: storage)
        let set = TableSet(cache: TableCache(capacity: cacheSize))
        let table = set.table(in: storage)
        for round in 0..<3000 {
            let start = Int.random(in: 0..<count, using: &generator)
            let end = min(count, start + 1 << Int.random(in: 0..<21, using: &generator))
            let word: UInt32 = [words[start], 0, 1].randomElement(using: &generator) ?? 0
            let expected = words[start..<end].firstIndex { $0 != word } ?? end
            let found = try table.endOfRun(of: word, in: UInt64(start * 4)..<UInt64(end * 4))
            #expect(found == UInt64(expected * 4), "round \(round): \(word) from \(start) to \(end)")
            // And with changes that are only in the cache.
            let place = Int.random(in: 0..<count, using: &generator)
            words[place] = [0, 1, 9].randomElement(using: &generator) ?? 0
            while try !table.store32(words[place], at: UInt64(place * 4), .entry) {
                try set.flush { () throws(DiskError) in }
            }
            if round % 100 == 99 { try set.flush { () throws(DiskError) in } }
        }
    }

    /// What a search goes through does not drive out what requests use.
    @Test func longRunsLeaveTheCacheAlone() throws {
        let reads = Locked(0)
        let storage = ObservedStorage(PagedStorage(length: 64 << 20)) { (access) throws(DiskError) in
            if case .read = access { reads.withLock { $0 += 1 } }
        }
        let set = TableSet(cache: TableCache(capacity: 64 << 10))
        let table = set.table(in: storage)
        let places = (0..<8).map { UInt64($0) << 23 }
        for place in places { _ = try table.entry32(at: place) }
        let before = reads.withLock { $0 }
        #expect(try table.endOfRun(of: 0, in: 4096..<64 << 20) == 64 << 20)
        let between = reads.withLock { $0 }
        for place in places { _ = try table.entry32(at: place) }
        #expect(between - before < 64 << 20 / 4096 / 8, "a long run was read page by page")
        #expect(reads.withLock { $0 } == between, "a long run took the place of pages that are in use")
    }
}

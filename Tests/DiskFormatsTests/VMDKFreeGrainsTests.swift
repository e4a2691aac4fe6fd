import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// Grains that were given up are kept as runs, not without limit, and used again only after a flush.
struct VMDKFreeGrainsTests {
    private static let grain: UInt64 = 65_536

    /// Whatever is added in whatever order comes out once, the first in the file first, in pieces that lie together.
    @Test func whatGoesInComesOutOnce() {
        var generator = SeededGenerator(seed: 5)
        for _ in 0..<50 {
            var free = VMDKFreeGrains(grainSize: Self.grain)
            let numbers = (0..<UInt64(400)).filter { _ in Bool.random(using: &generator) }.shuffled(using: &generator)
            let dirty = Set(numbers.filter { $0 % 50 < 3 })
            for number in numbers { free.add(number * Self.grain + 512, isZero: !dirty.contains(number)) }
            var found: [UInt64] = []
            while let run = free.take(UInt64.random(in: 1...20, using: &generator)) {
                for index in 0..<run.count {
                    let number = (run.offset - 512) / Self.grain + index
                    found.append(number)
                    #expect(run.isZero == !dirty.contains(number))
                }
            }
            #expect(found == numbers.sorted())
        }
    }

    @Test func neighboursAreOneRun() {
        var free = VMDKFreeGrains(grainSize: Self.grain)
        for number in 0..<UInt64(1000) { free.add(number * Self.grain, isZero: true) }
        for number in (2000..<UInt64(3000)).reversed() { free.add(number * Self.grain, isZero: true) }
        #expect(free.runs.count == 2)
        // Between them, in an order in which nothing meets until the end.
        for number in (1000..<UInt64(2000)).filter({ $0 % 2 == 0 }) + (1000..<UInt64(2000)).filter({ $0 % 2 == 1 }) {
            free.add(number * Self.grain, isZero: true)
        }
        #expect(free.take(.max) == .init(offset: 0, count: 3000, isZero: true))
        #expect(free.take(1) == nil)
    }

    /// A million grains that do not meet take no more memory than the limit allows; what meets later still counts.
    @Test func thereIsALimit() {
        var free = VMDKFreeGrains(grainSize: Self.grain)
        for number in 0..<UInt64(1_000_000) { free.add(number * 2 * Self.grain, isZero: true) }
        #expect(free.runs.count == VMDKFreeGrains.limit)
        var known: UInt64 = 0
        while let run = free.take(.max) { known += run.count }
        #expect(known == UInt64(VMDKFreeGrains.limit))
    }

    /// Random grains of few places, far more than the limit: joining them makes room again.
    @Test func joiningMakesRoom() {
        var generator = SeededGenerator(seed: 6)
        var free = VMDKFreeGrains(grainSize: Self.grain, limit: 100)
        let numbers = Array(0..<UInt64(120)).shuffled(using: &generator)
        for number in numbers { free.add(number * Self.grain, isZero: true) }
        #expect(free.runs.count <= 100)
        var count: UInt64 = 0
        while let run = free.take(.max) { count += run.count }
        #expect(count > 100)
    }

    @Test func theLongestAreKept() {
        var free = VMDKFreeGrains(grainSize: Self.grain, limit: 10)
        var other = VMDKFreeGrains(grainSize: Self.grain, limit: 10)
        for number in 0..<UInt64(8) { free.add(number * 100 * Self.grain, isZero: true) }
        for number in 0..<UInt64(8) {
            for index in 0..<3 as Range<UInt64> { other.add((number * 100 + 50 + index) * Self.grain, isZero: true) }
        }
        free.add(other)
        #expect(free.runs.count == 10)
        #expect(free.runs.count { $0.count == 3 } == 8)
    }

    /// The rule that keeps old entries on the disk from leading to new data.
    @Test func reuseWaitsForAFlush() throws {
        let storage = MemoryStorage([UInt8](repeating: 1, count: 20 << 16))
        let end = FileEndCell(20 << 16)
        let file = VMDKSparseFile(
            .hosted, handle: StorageHandle(storage), end: end, length: 20 << 16, grainSize: Self.grain)
        try file.giveUp(3 << 16)
        try file.giveUp(4 << 16)
        #expect(try file.takeGrains(1).offset == 20 << 16)
        let first = file.beginFlush()
        // Given up while the flush is under way: not among what it makes durable.
        try file.giveUp(5 << 16)
        #expect(try file.takeGrains(1).offset == 21 << 16)
        file.endFlush(first, succeeded: false)
        #expect(try file.takeGrains(1).offset == 22 << 16)
        let second = file.beginFlush()
        try file.giveUp(9 << 16)
        file.endFlush(second, succeeded: true)
        let taken = try file.takeGrains(10)
        #expect(taken.offset == 3 << 16 && taken.count == 3 && taken.isZero)
        #expect(try file.takeGrains(1).offset == 23 << 16)
        file.endFlush(file.beginFlush(), succeeded: true)
        file.putBack(1 << 16)
        let dirty = try file.takeGrains(1)
        #expect(dirty.offset == 1 << 16 && !dirty.isZero)
        #expect(try file.takeGrains(1).offset == 9 << 16)
    }
}

import DiskStorage
import DiskTesting
import Testing

@testable import DiskImage

/// Blocks that were given up are kept as runs, not without limit.
struct FreeBlocksTests {
    private static let block: UInt64 = 65_536

    /// Whatever is added in whatever order comes out once, the first in the file first, in pieces that lie together.
    @Test func whatGoesInComesOutOnce() {
        var generator = SeededGenerator(seed: 5)
        for _ in 0..<50 {
            var free = FreeBlocks(blockSize: Self.block)
            let numbers = (0..<UInt64(400)).filter { _ in Bool.random(using: &generator) }.shuffled(using: &generator)
            let dirty = Set(numbers.filter { $0 % 50 < 3 })
            for number in numbers { free.add(number * Self.block + 512, isZero: !dirty.contains(number)) }
            var found: [UInt64] = []
            while let run = free.take(UInt64.random(in: 1...20, using: &generator)) {
                for index in 0..<run.count {
                    let number = (run.offset - 512) / Self.block + index
                    found.append(number)
                    #expect(run.isZero == !dirty.contains(number))
                }
            }
            #expect(found == numbers.sorted())
        }
    }

    @Test func neighboursAreOneRun() {
        var free = FreeBlocks(blockSize: Self.block)
        for number in 0..<UInt64(1000) { free.add(number * Self.block, isZero: true) }
        for number in (2000..<UInt64(3000)).reversed() { free.add(number * Self.block, isZero: true) }
        #expect(free.runs.count == 2)
        // Between them, in an order in which nothing meets until the end.
        for number in (1000..<UInt64(2000)).filter({ $0 % 2 == 0 }) + (1000..<UInt64(2000)).filter({ $0 % 2 == 1 }) {
            free.add(number * Self.block, isZero: true)
        }
        #expect(free.take(.max) == .init(offset: 0, count: 3000, isZero: true))
        #expect(free.take(1) == nil)
    }

    /// A million blocks that do not meet take no more memory than the limit allows; what meets later still counts.
    @Test func thereIsALimit() {
        var free = FreeBlocks(blockSize: Self.block)
        for number in 0..<UInt64(1_000_000) { free.add(number * 2 * Self.block, isZero: true) }
        #expect(free.runs.count == FreeBlocks.limit)
        var known: UInt64 = 0
        while let run = free.take(.max) { known += run.count }
        #expect(known == UInt64(FreeBlocks.limit))
    }

    /// Random blocks of few places, far more than the limit: joining them makes room again.
    @Test func joiningMakesRoom() {
        var generator = SeededGenerator(seed: 6)
        var free = FreeBlocks(blockSize: Self.block, limit: 100)
        let numbers = Array(0..<UInt64(120)).shuffled(using: &generator)
        for number in numbers { free.add(number * Self.block, isZero: true) }
        #expect(free.runs.count <= 100)
        var count: UInt64 = 0
        while let run = free.take(.max) { count += run.count }
        #expect(count > 100)
    }

    @Test func theLongestAreKept() {
        var free = FreeBlocks(blockSize: Self.block, limit: 10)
        var other = FreeBlocks(blockSize: Self.block, limit: 10)
        for number in 0..<UInt64(8) { free.add(number * 100 * Self.block, isZero: true) }
        for number in 0..<UInt64(8) {
            for index in 0..<3 as Range<UInt64> { other.add((number * 100 + 50 + index) * Self.block, isZero: true) }
        }
        free.add(other)
        #expect(free.runs.count == 10)
        #expect(free.runs.count { $0.count == 3 } == 8)
    }
}

extension FreeBlocksTests {
    /// Runs go in and come out at the file's end, piece by piece, whatever was added in between.
    @Test func theLastRunIsTakenAtTheEndAlone() {
        var free = FreeBlocks(blockSize: 1)
        free.add(.init(offset: 10, count: 5, isZero: false))
        free.add(.init(offset: 90, count: 10, isZero: true))
        free.add(.init(offset: 80, count: 10, isZero: false))
        free.add(.init(offset: 0, count: 0, isZero: false))
        #expect(free.count == 25)
        #expect(free.takeLast(endingAt: 99) == nil && free.takeLast(endingAt: 101) == nil)
        #expect(free.takeLast(endingAt: 100) == .init(offset: 90, count: 10, isZero: true))
        #expect(free.takeLast(endingAt: 90) == .init(offset: 80, count: 10, isZero: false))
        #expect(free.takeLast(endingAt: 80) == nil)
        #expect(free.take(9) == .init(offset: 10, count: 5, isZero: false))
        #expect(free.isEmpty && free.takeLast(endingAt: 10) == nil)
    }

    @Test func tooManyRunsAreForgotten() {
        var free = FreeBlocks(blockSize: 1, limit: 4)
        for number in 0..<UInt64(10) { free.add(.init(offset: number * 10, count: 2, isZero: false)) }
        #expect(free.count == 8)
    }
}

import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// Locks on regions: never two who exclude each other, and never a standstill.
struct RegionLocksTests {
    /// Who is in a region now, as far as its lock lets them.
    private struct Occupants {
        var sharing = 0
        var alone = 0
    }

    @Test func regionsAreAsLargeAsABlock() {
        #expect(RegionLocks(blockSize: 0).regionSize == 1 << 20)
        #expect(RegionLocks(blockSize: 4096).regionSize == 1 << 20)
        #expect(RegionLocks(blockSize: 64 << 20).regionSize == 64 << 20)
        #expect(RegionLocks(blockSize: 1 << 63).regionSize == 1 << 63)
    }

    @Test func sharedAndExclusiveLocksUnderLoad() {
        let locks = RegionLocks(blockSize: 0)
        let regions = 140  // more than there are locks: some share one
        let occupants = (0..<regions).map { _ in Locked(Occupants()) }
        let problems = Locked<[String]>([])
        let seed = UInt64.random(in: 0...UInt64.max)
        onThreads(8) { thread in
            var generator = SeededGenerator(seed: seed &+ UInt64(thread))
            for _ in 0..<4000 {
                // Few regions, and pairs of neighbours in both orders of their locks (63 and 64 wrap round).
                let region = [0, 1, 2, 62, 63, 64, 65, 127, 128].randomElement(using: &generator) ?? 0
                let spansTwo = Bool.random(using: &generator)
                let offset = UInt64(region) << 20 + (spansTwo ? (1 << 20) - 5 : 17)
                let touched = spansTwo ? [region, region + 1] : [region]
                if Int.random(in: 0..<4, using: &generator) == 0 {
                    locks.lockExclusive(offset, 10)
                    for index in touched {
                        let isClean = occupants[index].withLock { state in
                            state.alone += 1
                            return state.alone == 1 && state.sharing == 0
                        }
                        if !isClean { problems.withLock { $0.append("region \(index) was not alone") } }
                    }
                    for index in touched { occupants[index].withLock { $0.alone -= 1 } }
                    locks.unlockExclusive(offset, 10)
                } else {
                    locks.lockShared(offset, 10)
                    for index in touched {
                        let isClean = occupants[index].withLock { state in
                            state.sharing += 1
                            return state.alone == 0
                        }
                        if !isClean { problems.withLock { $0.append("region \(index) was shared with its owner") } }
                    }
                    for index in touched { occupants[index].withLock { $0.sharing -= 1 } }
                    locks.unlockShared(offset, 10)
                }
            }
        }
        #expect(problems.withLock { $0.prefix(3) }.isEmpty, "seed \(seed)")
        // All were given back: everything can be had alone.
        for region in 0..<regions {
            locks.lockExclusive(UInt64(region) << 20, 1)
            locks.unlockExclusive(UInt64(region) << 20, 1)
        }
    }

    /// Whoever wants a region alone gets it, however many share it in turns.
    @Test(.timeLimit(.minutes(1))) func sharersDoNotStarveAWriter() {
        let locks = RegionLocks(blockSize: 0)
        let isDone = Locked(false)
        onThreads(4) { thread in
            if thread == 0 {
                for _ in 0..<500 {
                    locks.lockExclusive(0, 1)
                    locks.unlockExclusive(0, 1)
                }
                isDone.withLock { $0 = true }
            } else {
                while !isDone.withLock({ $0 }) {
                    locks.lockShared(0, 1)
                    locks.unlockShared(0, 1)
                }
            }
        }
    }
}

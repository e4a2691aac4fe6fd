import DiskImage
import DiskStorage
import Testing

@testable import DiskFormats

/// Where grains go in a sparse extent.
struct VMDKSparseFileTests {
    /// The rule that keeps old entries on the disk from leading to new data.
    @Test func reuseWaitsForAFlush() throws {
        let storage = MemoryStorage([UInt8](repeating: 1, count: 20 << 16))
        let end = FileEndCell(20 << 16)
        let file = VMDKSparseFile(
            .hosted, handle: StorageHandle(storage), end: end, length: 20 << 16, grainSize: 1 << 16)
        try file.giveUp(3 << 16)
        try file.giveUp(4 << 16)
        #expect(try file.takeGrains(1).offset == 20 << 16)
        let first = file.grains.beginFlush()
        // Given up while the flush is under way: not among what it makes durable.
        try file.giveUp(5 << 16)
        #expect(try file.takeGrains(1).offset == 21 << 16)
        file.grains.endFlush(first, succeeded: false)
        #expect(try file.takeGrains(1).offset == 22 << 16)
        let second = file.grains.beginFlush()
        try file.giveUp(9 << 16)
        file.grains.endFlush(second, succeeded: true)
        let taken = try file.takeGrains(10)
        #expect(taken.offset == 3 << 16 && taken.count == 3 && taken.isZero)
        #expect(try file.takeGrains(1).offset == 23 << 16)
        file.grains.endFlush(file.grains.beginFlush(), succeeded: true)
        file.grains.putBack(1 << 16)
        let dirty = try file.takeGrains(1)
        #expect(dirty.offset == 1 << 16 && !dirty.isZero)
        #expect(try file.takeGrains(1).offset == 9 << 16)
    }
}

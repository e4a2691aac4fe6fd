import CAllocationCounter
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Requests to allocated blocks allocate no memory. Holds for optimised code, which is what is shipped and tested.
@Suite(.serialized) struct AllocationTests {
    private static let size = 16 << 20

    /// An image of which everything is allocated, below `depth` empty snapshots.
    private func makeDisk(_ folder: TemporaryFolder, depth: Int) throws -> Disk {
        var image = NewImage(path: folder.path + "/0.vmdk")
        image.size = UInt64(Self.size)
        try image.create()
        let base = try Disk.open(image.path, options: DiskOptions(isWritable: true))
        for offset in stride(from: 0, to: Self.size, by: 1 << 20) {
            try base.write([UInt8](repeating: 5, count: 1 << 20), at: UInt64(offset))
        }
        try base.close()
        for number in 0..<depth {
            var child = NewImage(path: folder.path + "/\(number + 1).vmdk")
            child.parent = folder.path + "/\(number).vmdk"
            try child.create()
        }
        return try Disk.open(folder.path + "/\(depth).vmdk", options: DiskOptions(isWritable: true))
    }

    /// The allocations of this thread while `body` runs a thousand times.
    private func count<E: Error>(_ body: (UInt64) throws(E) -> Void) throws(E) -> Int {
        for round in 0..<2000 as Range<UInt64> { try body(round) }
        callocationcounter_begin()
        for round in 0..<1000 as Range<UInt64> { try body(round) }
        return callocationcounter_end()
    }

    #if !DEBUG
    @Test(arguments: [0, 1, 8]) func readsAllocateNothing(depth: Int) throws {
        let folder = try TemporaryFolder()
        let disk = try makeDisk(folder, depth: depth)
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = try bytes.withIOBuffer { (buffer) throws(DiskError) in
            try self.count { (round) throws(DiskError) in
                try disk.read(into: buffer, at: round &* 52_736 % UInt64(Self.size - 4096))
            }
        }
        #expect(count <= 0)
        try disk.close()
    }

    @Test func writesInPlaceAllocateNothing() throws {
        let folder = try TemporaryFolder()
        let disk = try makeDisk(folder, depth: 0)
        let bytes = [UInt8](repeating: 9, count: 4096)
        let count = try bytes.withIOBytes { (memory) throws(DiskError) in
            try self.count { (round) throws(DiskError) in
                try disk.write(memory, at: round &* 52_736 % UInt64(Self.size - 4096))
            }
        }
        #expect(count <= 0)
        try disk.close()
    }
    #endif

    /// The counter counts.
    @Test func counterSeesAllocations() {
        let count = self.count { round in
            let memory = [UInt64](repeating: round, count: 100 + Int(round % 3))
            withExtendedLifetime(memory) { _ = memory.reduce(0, &+) }
        }
        #expect(count == -1 || count >= 1000)
    }
}

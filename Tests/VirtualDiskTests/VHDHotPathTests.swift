import CAllocationCounter
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// What a request to a VHD costs: no memory for what is there already, and few reads of sector bitmaps.
@Suite(.serialized) struct VHDHotPathTests {
    private static let size = 16 << 20

    private enum Kind: String, CaseIterable {
        case fixed, dynamic, fullChild, partialChild
    }

    /// A disk of which everything is allocated: in a child, or in every other sector of it.
    private static func make(_ folder: TemporaryFolder, _ kind: Kind) throws -> Disk {
        let variant = kind == .fixed ? "fixed" : nil
        let base = try VHD.create(folder, "base.vhd", size: size, variant: variant)
        try VHD.write(base, [(5, 0, size)])
        var top = base
        if kind == .fullChild || kind == .partialChild {
            top = try VHD.create(folder, "child.vhd", parent: "base.vhd")
            if kind == .fullChild { try VHD.write(top, [(6, 0, size)]) }
            if kind == .partialChild {
                let pieces = stride(from: UInt64(0), to: UInt64(size), by: 16_384).map { (UInt8(6), $0, 8192) }
                try VHD.write(top, pieces)
            }
        }
        return try Disk.open(top, options: DiskOptions(isWritable: true))
    }

    /// The allocations of this thread while `body` runs a thousand times.
    private func count<E: Error>(_ body: (UInt64) throws(E) -> Void) throws(E) -> Int {
        for round in 0..<2000 as Range<UInt64> { try body(round) }
        callocationcounter_begin()
        for round in 0..<1000 as Range<UInt64> { try body(round) }
        return callocationcounter_end()
    }

    #if !DEBUG
    @Test func readsAndWritesInPlaceAllocateNothing() throws {
        for kind in Kind.allCases {
            let folder = try TemporaryFolder()
            let disk = try Self.make(folder, kind)
            var bytes = [UInt8](repeating: 0, count: 4096)
            let reads = try bytes.withIOBuffer { (buffer) throws(DiskError) in
                try self.count { (round) throws(DiskError) in
                    try disk.read(into: buffer, at: round &* 52_736 % UInt64(Self.size - 4096))
                }
            }
            #expect(reads <= 0, "\(kind.rawValue)")
            let writes = try bytes.withIOBytes { (memory) throws(DiskError) in
                try self.count { (round) throws(DiskError) in
                    try disk.write(memory, at: round &* 49_152 % UInt64(Self.size - 16_384) & ~16_383)
                }
            }
            #expect(writes <= 0, "\(kind.rawValue)")
            try disk.close()
        }
    }
    #endif

    /// Of a block that is held as a whole the bitmap is read once, however small the cache.
    @Test func bitmapsOfFullBlocksAreReadOnce() throws {
        let folder = try TemporaryFolder()
        let size = 96 << 20
        let path = try VHD.create(folder, size: size, blockSize: 64 << 10)
        try VHD.write(path, [(1, 0, size)])
        let reads = Locked(0)
        var options = DiskOptions(isWritable: true)
        options.tableCacheSize = 64 << 10
        options.lazyFlushInterval = 0
        options.wrapStorage = { storage in
            ObservedStorage(storage) { (access) throws(DiskError) in
                if case .read(_, _, .table) = access { reads.withLock { $0 += 1 } }
            }
        }
        let disk = try Disk.open(path, options: options)
        for _ in 0..<5 {
            for offset in stride(from: UInt64(0), to: UInt64(size), by: 64 << 10) {
                _ = try disk.read(at: offset, count: 1)
            }
        }
        try disk.close()
        // A page for each bitmap, and those of the table, which are read again in each round.
        #expect(reads.withLock { $0 } < size >> 16 + 100)
    }
}

import CAllocationCounter
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Requests to allocated blocks allocate no memory, in any format. Holds for optimised code, which is what is shipped
/// and tested.
@Suite(.serialized) struct AllocationTests {
    private static let size = 16 << 20

    /// How an image of a format is made, and how many snapshots lie over it.
    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        var making = FormatRow.Making()
        var depth = 0
        var testDescription: String {
            let variant = making.variant.map { ", \($0)" } ?? ""
            let block = making.blockSize.map { ", blocks of \($0)" } ?? ""
            return "\(row.format)\(variant)\(block), \(depth) snapshots"
        }
    }

    /// Every way to make an image of every format that is written, without snapshots and with as many as it can have.
    static let cases = FormatRow.all.filter(\.isWritable).flatMap { row -> [Case] in
        let flat = row.ours.map { Case(row: row, making: $0) }
        guard row.child != nil else { return flat }
        return flat + [1, 8].map { Case(row: row, making: row.ours.first ?? .init(), depth: $0) }
    }

    /// An image of which everything is allocated, below empty snapshots. A format that is only made over others lies
    /// over a raw disk.
    private func makeDisk(_ test: Case, in folder: TemporaryFolder) throws -> Disk {
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        let base = test.row.ours.isEmpty ? raw : test.row
        var image = NewImage(path: folder.file(base.file("0")))
        image.size = UInt64(Self.size)
        (image.variant, image.blockSize, image.options) = (
            test.making.variant, test.making.blockSize, test.making.options
        )
        try image.create()
        let disk = try Disk.open(image.path, options: base.options(isWritable: true))
        for offset in stride(from: 0, to: Self.size, by: 1 << 20) {
            try disk.write([UInt8](repeating: 5, count: 1 << 20), at: UInt64(offset))
        }
        try disk.close()
        var top = (path: image.path, row: base)
        for number in 0..<test.depth {
            var child = NewImage(path: folder.file(test.row.file("\(number + 1)")))
            child.parent = top.path
            child.parentFormat = top.row.mustBeNamed ? top.row.format : nil
            try child.create()
            top = (child.path, test.row)
        }
        return try Disk.open(top.path, options: top.row.options(isWritable: true))
    }

    /// The allocations of this thread while `body` runs a thousand times.
    private func count<E: Error>(_ body: (UInt64) throws(E) -> Void) throws(E) -> Int {
        for round in 0..<2000 as Range<UInt64> { try body(round) }
        callocationcounter_begin()
        for round in 0..<1000 as Range<UInt64> { try body(round) }
        return callocationcounter_end()
    }

    #if !DEBUG
    @Test(arguments: cases) func readsAllocateNothing(_ test: Case) throws {
        let folder = try TemporaryFolder()
        let disk = try makeDisk(test, in: folder)
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = try bytes.withIOBuffer { (buffer) throws(DiskError) in
            try self.count { (round) throws(DiskError) in
                try disk.read(into: buffer, at: round &* 52_736 % UInt64(Self.size - 4096))
            }
        }
        #expect(count <= 0)
        try disk.close()
    }

    /// With snapshots, after everything was written to the top one once.
    @Test(arguments: cases.filter { $0.depth <= 1 }) func writesInPlaceAllocateNothing(_ test: Case) throws {
        let folder = try TemporaryFolder()
        let disk = try makeDisk(test, in: folder)
        for offset in stride(from: 0, to: Self.size, by: 1 << 20) where test.depth > 0 {
            try disk.write([UInt8](repeating: 6, count: 1 << 20), at: UInt64(offset))
        }
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

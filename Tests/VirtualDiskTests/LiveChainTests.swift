import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// The chain of an open disk changes while many threads read and write it: no read sees anything but what was written,
/// nothing that was written is lost, and what is left are sound images.
@Suite(.serialized) struct LiveChainTests {
    static let rows = ChainMergeTests.rows
    private static let size = 24 << 20

    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        let isWritable: Bool
        var testDescription: String { "\(row.format), \(isWritable ? "read-write" : "read-only")" }
    }

    static let cases = rows.flatMap { [Case(row: $0, isWritable: true), Case(row: $0, isWritable: false)] }

    /// Into each of the others, one after the other, until one image is left.
    @Test(arguments: cases) func imagesAreMergedWhileTheDiskIsUsed(_ test: Case) throws {
        let row = test.row
        for steps in [[(0, 2), (1, 0)], [(2, 1), (0, 1), (1, 0)], [(1, 2), (0, 1), (0, 1)], [(3, 0)], [(0, 3)]] {
            let chain = try TestChain([row, row, row, row], sizes: [Self.size, Self.size, Self.size, Self.size])
            let disk = try Disk.open(chain.path(0), options: row.options(isWritable: test.isWritable))
            var model = chain.models[0]
            var images = Array(0..<4)
            for (source, target) in steps {
                model = try Guests.beside(disk, model, isWriting: test.isWritable) { () throws(DiskError) in
                    _ = try disk.merge(source, into: target)
                }
                images.removeSubrange(source < target ? source..<target : target + 1..<source + 1)
                #expect(disk.layers.map(\.path) == images.map { chain.path($0) }, "\(test.testDescription), \(steps)")
            }
            try disk.close()
            try chain.expectShown(
                images[0], model, below: images.dropFirst().map { chain.rows[$0] }, "\(test.testDescription), \(steps)")
        }
    }

    // MARK: - Sizes

    @Test(arguments: rows) func imagesOfSeveralSizesAreMerged(_ row: FormatRow) throws {
        let (size, mebibyte) = (Self.size, 1 << 20)
        let cases: [(sizes: [Int], source: Int, target: Int)] = [
            // A lower image becomes as large as what is merged into it, and does not show what lies below it.
            ([size, size, size - 3 * mebibyte, size], 1, 2), ([size, size, size - 3 * mebibyte, size], 0, 2),
            ([size + mebibyte, size + mebibyte, size, size + 2 * mebibyte], 1, 2),
            // One that ends before what it is merged into hides the rest.
            ([size, size - mebibyte, size + 2 * mebibyte, size], 1, 2), ([size, size - mebibyte, size, size], 1, 3),
            ([size, size, size + 2 * mebibyte, size], 0, 2),
            // Upwards, what lies between or below may have any size.
            ([size, size, size - mebibyte, size], 2, 1), ([size, size, size - mebibyte, size + mebibyte], 3, 0),
        ]
        for (sizes, source, target) in cases {
            let chain = try TestChain([row, row, row, row], sizes: sizes)
            let disk = try Disk.open(chain.path(0), options: row.options(isWritable: true))
            let model = try Guests.beside(disk, chain.models[0], isWriting: true) { () throws(DiskError) in
                _ = try disk.merge(source, into: target)
            }
            var images = Array(0..<4)
            images.removeSubrange(source < target ? source..<target : target + 1..<source + 1)
            #expect(disk.layers.map(\.path) == images.map { chain.path($0) })
            try disk.close()
            try chain.expectShown(
                images[0], model, below: images.dropFirst().map { chain.rows[$0] },
                "\(row.format), \(sizes), \(source) into \(target)", isResized: true)
        }
    }

    @Test(arguments: rows) func snapshotsAreMadeAndTakenBackWhileTheDiskIsUsed(_ row: FormatRow) throws {
        let chain = try TestChain([row, row], sizes: [Self.size, Self.size])
        let disk = try Disk.open(chain.path(0), options: row.options(isWritable: true))
        let paths = Locked<[String]>([])
        let model = try Guests.beside(disk, chain.models[0], isWriting: true) { () throws(DiskError) in
            for _ in 0..<3 {
                let path = try disk.makeSnapshot()
                paths.withLock { $0.append(path) }
            }
        }
        #expect(disk.layers.count == 5 && paths.withLock { $0.last } == disk.layers[0].path, "\(disk.layers)")
        // What lies below is closed: another process may read it.
        let below = try Disk.open(disk.layers[1].path, options: row.options(isWritable: false))
        try below.close()
        #expect(throws: DiskError.self) {
            _ = try Disk.open(disk.layers[1].path, options: row.options(isWritable: true))
        }
        let merged = try Guests.beside(disk, model, isWriting: true) { () throws(DiskError) in
            _ = try disk.merge(0, into: 3)
        }
        try disk.close()
        try chain.expectShown(0, merged, below: [row], "\(row.format)")
    }

    @Test(arguments: rows) func theTopImageGoes(_ row: FormatRow) throws {
        let chain = try TestChain([row, row])
        let disk = try Disk.open(chain.path(0), options: row.options(isWritable: true))
        try disk.write([1, 2, 3], at: 100)
        try disk.popTop(deletingFiles: true)
        var model = chain.models[1]
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.write([4, 5, 6], at: 1000)
        model.write([4, 5, 6], at: 1000)
        #expect(throws: DiskError.self) { try disk.popTop() }
        try disk.close()
        #expect(try chain.folder.snapshotOfAll().keys.sorted() == [chain.name(1)])
        try chain.expectShown(1, model, below: [], "\(row.format)")
    }

    @Test(arguments: rows) func aMergeThatIsStoppedLeavesTheDiskAsItWas(_ row: FormatRow) throws {
        let chain = try TestChain([row, row, row], sizes: [Self.size, Self.size, Self.size])
        let disk = try Disk.open(chain.path(0), options: row.options(isWritable: true))
        var model = chain.models[0]
        for (source, target) in [(0, 2), (2, 0), (1, 2)] {
            let stopping = StoppingControl(at: 4 << 20)
            model = try Guests.beside(disk, model, isWriting: true) { () throws(DiskError) in
                do throws(DiskError) {
                    _ = try disk.merge(source, into: target, control: stopping.control)
                } catch {
                    guard error.kind == .cancelled else { throw error }
                }
            }
            #expect(disk.layers.count == 3)
        }
        try disk.close()
        try chain.expectShown(0, model, below: [row, row], "\(row.format)")
    }
}

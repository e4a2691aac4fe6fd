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

    /// Threads with a part of the disk each, which check what they read against what they wrote.
    private final class Guests: Sendable {
        private let disk: Disk
        private let state: Locked<(isEnding: Bool, mistakes: [String])>
        private let models: [Locked<DiskModel>]
        private let part: Int
        static let count = 3

        init(_ disk: Disk, _ model: DiskModel) {
            self.disk = disk
            part = model.size / Self.count
            state = Locked((false, []))
            models = (0..<Self.count).map { number in
                var own = DiskModel(size: model.size / Self.count)
                own.write(model.bytes.slice(number * own.size, own.size), at: 0)
                return Locked(own)
            }
        }

        var mistakes: [String] { state.withLock { $0.mistakes } }
        func end() { state.withLock { $0.isEnding = true } }

        /// Works until the end; `isWriting`: writes too.
        func run(_ number: Int, isWriting: Bool) {
            var generator = SeededGenerator(seed: UInt64(number) + 1)
            let pool = RandomPool(size: 1 << 20, seed: UInt64(number))
            var count = 0
            while !state.withLock({ $0.isEnding }) {
                count += 1
                do throws(DiskError) {
                    try step(number, count, isWriting, pool, &generator)
                } catch {
                    state.withLock { $0.mistakes.append("guest \(number), step \(count): \(error)") }
                    return
                }
            }
        }

        private func step(
            _ number: Int, _ count: Int, _ isWriting: Bool, _ pool: RandomPool, _ generator: inout SeededGenerator
        ) throws(DiskError) {
            let start = Int.random(in: 0..<part - 1, using: &generator)
            let length = min(part - start, Int.random(in: 1...(count % 5 == 0 ? 300_000 : 9_000), using: &generator))
            let place = UInt64(number * part + start)
            var model = models[number].withLock { $0 }
            switch isWriting ? count % 4 : 0 {
            case 0, 2:
                if let mistake = try model.mistake(in: disk.read(at: place, count: length), at: start) {
                    state.withLock { $0.mistakes.append("guest \(number), step \(count): \(mistake)") }
                }
            case 1:
                let data = pool.bytes(length, using: &generator)
                try disk.write(data, at: place)
                model.write(data, at: start)
            default:
                if count % 16 == 3 { try disk.flush() }
                try disk.discard(offset: place, length: UInt64(length))
                model.zero(start..<start + length)
            }
            models[number].withLock { $0 = model }
        }

        /// What the disk must hold.
        func content(of model: DiskModel) -> DiskModel {
            var whole = model
            for (number, part) in models.enumerated() {
                whole.write(part.withLock { $0.bytes }, at: number * self.part)
            }
            return whole
        }
    }

    /// Runs `body` beside the guests; answers what the disk holds at the end.
    private func beside(
        _ disk: Disk, _ model: DiskModel, isWriting: Bool, _ body: @escaping @Sendable () throws(DiskError) -> Void
    ) throws -> DiskModel {
        let guests = Guests(disk, model)
        let failure = Locked<DiskError?>(nil)
        onThreads(Guests.count + 1) { number in
            if number < Guests.count { return guests.run(number, isWriting: isWriting) }
            do throws(DiskError) { try body() } catch { failure.withLock { $0 = error } }
            guests.end()
        }
        #expect(guests.mistakes.isEmpty, "\(guests.mistakes.prefix(3))")
        if let failure = failure.withLock({ $0 }) { throw failure }
        return guests.content(of: model)
    }

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
                model = try beside(disk, model, isWriting: test.isWritable) { () throws(DiskError) in
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

    @Test(arguments: rows) func snapshotsAreMadeAndTakenBackWhileTheDiskIsUsed(_ row: FormatRow) throws {
        let chain = try TestChain([row, row], sizes: [Self.size, Self.size])
        let disk = try Disk.open(chain.path(0), options: row.options(isWritable: true))
        let paths = Locked<[String]>([])
        let model = try beside(disk, chain.models[0], isWriting: true) { () throws(DiskError) in
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
        let merged = try beside(disk, model, isWriting: true) { () throws(DiskError) in
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
            model = try beside(disk, model, isWriting: true) { () throws(DiskError) in
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

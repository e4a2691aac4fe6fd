import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// The process that writes an image is killed, in any format: what it had flushed is there, for readers without a byte
/// changed, and for writers after whatever repair the format needs; what it had not flushed is old or new.
struct KilledWriterTests {
    private static let sectors = 8192

    /// A format, how its image is made, and how it is opened afterwards.
    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        /// Nil: the image lies over another.
        let making: FormatRow.Making?
        let isWritable: Bool
        var testDescription: String {
            let kind = making.map { FormatMatrixTests.Case(row: row, making: $0, peerOptions: "").testDescription }
            return "\(kind ?? row.format + " over another"), opened \(isWritable ? "for writing" : "to be read")"
        }
    }

    static let cases = FormatRow.all.filter(\.isWritable).flatMap { row in
        (row.ours.map(Optional.some) + (row.child == nil ? [] : [nil])).flatMap { making in
            [false, true].map { Case(row: row, making: making, isWritable: $0) }
        }
    }

    @Test(arguments: cases) func whatWasFlushedSurvives(_ test: Case) async throws {
        let folder = try TemporaryFolder()
        let seed = UInt64.random(in: 0...UInt64.max)
        let (path, below) = try Self.makeImage(test, in: folder)
        let result = await #expect(processExitsWith: .signal(SIGKILL)) {
            [format = test.row.format as String, path = path as String, seed = seed as UInt64] in
            let row = try #require(FormatRow.all.first { $0.format == format })
            var model = KilledWriterTests.initialModel
            let disk = try Disk.open(path, options: row.options(isWritable: true))
            try KilledWriterTests.work(on: disk, &model, seed)
            kill(getpid(), SIGKILL)
        }
        try #require(result != nil, "\(test): the writer was not killed where it should be")
        var model = Self.initialModel
        try Self.work(on: nil, &model, seed)
        let before = try folder.snapshotOfAll()
        let context = "\(test), seed \(seed)"
        let disk = try Disk.open(path, options: test.row.options(isWritable: test.isWritable))
        let content = try disk.read(at: 0, count: Self.sectors * 512)
        let mistake = model.firstMistake(in: content, allowed: model.allowed(at: 1000))
        #expect(mistake == nil, "\(context): \(mistake ?? "")")
        try disk.close()
        if !test.isWritable { #expect(try folder.snapshotOfAll() == before, "\(context): a reader changed a file") }
        try Self.expectSound(test.row, path, below, context)
    }

    /// An image with some content, alone or below an empty one in the same format (or in one that has children
    /// alone); answers what lies below.
    private static func makeImage(
        _ test: Case, in folder: TemporaryFolder
    ) throws -> (path: String, below: [FormatRow]) {
        let row = test.row
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        let lowest = row.ours.isEmpty ? raw : row
        var base = NewImage(path: folder.file(lowest.file("base")))
        base.size = UInt64(sectors * 512)
        if let making = test.making ?? lowest.ours.first {
            (base.variant, base.blockSize, base.options) = (making.variant, making.blockSize, making.options)
        }
        try base.create()
        let disk = try Disk.open(base.path, options: lowest.options(isWritable: true))
        try disk.write((0..<3000).flatMap { GuestModel.sector($0, stamp: 7) }, at: 0)
        try disk.close()
        guard test.making == nil, let making = row.child else { return (base.path, []) }
        var top = NewImage(path: folder.file(row.file("top")))
        (top.parent, top.parentFormat) = (base.path, lowest.mustBeNamed ? lowest.format : nil)
        (top.variant, top.blockSize, top.options) = (making.variant, making.blockSize, making.options)
        try top.create()
        return (top.path, [lowest])
    }

    static var initialModel: GuestModel {
        GuestModel(initial: (0..<sectors).map { $0 < 3000 ? 7 : 0 }, firstStamp: 1000)
    }

    /// A session that ends without a flush; without a disk, what it makes of the model.
    static func work(on disk: Disk?, _ model: inout GuestModel, _ seed: UInt64) throws {
        var generator = SeededGenerator(seed: seed)
        for step in 0..<60 {
            let start = Int.random(in: 0..<sectors, using: &generator)
            let range = start..<min(sectors, start + Int.random(in: 1...200, using: &generator))
            switch Int.random(in: 0..<10, using: &generator) {
            case 0...5:
                let data = model.write(range, event: step)
                try disk?.write(data, at: UInt64(start * 512))
            case 6...7:
                model.discard(range, event: step)
                try disk?.discard(offset: UInt64(start * 512), length: UInt64(range.count * 512))
            default:
                guard step < 50 else { continue }
                try disk?.flush()
                model.flush(event: step)
            }
        }
    }

    /// Repair puts right whatever there is, nothing was lost, and QEMU finds nothing worse than lost space.
    private static func expectSound(
        _ row: FormatRow, _ path: String, _ below: [FormatRow], _ context: String
    ) throws {
        var options = row.options(isWritable: false)
        let found = try ImageCheck.run(path, options: options)
        #expect(found.remaining(.loss) == 0, "\(context): \(found.findings)")
        options.isWritable = true
        let repaired = try ImageCheck.run(path, options: options, repair: true)
        #expect(repaired.remaining(.repairable) + repaired.remaining(.loss) == 0, "\(context): \(repaired.findings)")
        guard let peer = row.peer, row.isCheckedByPeer, Judge.canFollow(row, below) else { return }
        let result = try Subprocess.run(["qemu-img", "check", "-q", "-f", peer, path])
        #expect(result.status == 0 || result.status == 3, "\(context): \(result.outputText)\(result.errorText)")
    }
}

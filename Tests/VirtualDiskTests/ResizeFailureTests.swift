import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// A disk is given another size, and the power fails, the process is killed or the storage fails at any moment of it:
/// the image opens, has the one size or the other, and shows the same bytes; and a second try comes through.
@Suite(.serialized) struct ResizeFailureTests {
    /// What happens to which image.
    struct Case: Sendable, CustomTestStringConvertible {
        let image: ResizedImage.Case
        let isChild: Bool
        let newSize: Int
        var oldSize = (3 << 20) + 3 * 512
        var testDescription: String { "\(image)\(isChild ? ", a child" : ""), from \(oldSize) to \(newSize)" }
    }

    static let cases: [Case] = ResizedImage.rows.flatMap { row in
        var cases: [Case] = []
        for making in row.ours {
            let image = ResizedImage.Case(row: row, making: making)
            cases.append(Case(image: image, isChild: false, newSize: (2 << 20) + 512))
            // Tables move where they are small, and that is not too long for memory.
            // (Nor where they would be thousands of files.)
            let isLong =
                row.format == "vhdx" || image.isFlat || row.format == "qed" || making.variant == "split"
            cases.append(Case(image: image, isChild: false, newSize: isLong ? 6 << 20 : 12 << 30))
        }
        return cases + ResizedImage.chains(of: row).map { Case(image: $0, isChild: true, newSize: 7 << 20) }
    }

    private static let parentSize = 5 << 20

    private func makeImage(
        _ test: Case, in folder: TemporaryFolder, _ generator: inout SeededGenerator
    ) throws -> ResizedImage {
        var image = try ResizedImage(
            test.image, in: folder, size: test.oldSize, parentSize: test.isChild ? Self.parentSize : nil,
            using: &generator)
        if test.newSize < test.oldSize { try image.discard(from: test.newSize) }
        return image
    }

    private static func resize(
        _ path: String, _ row: FormatRow, to size: Int, _ wrap: @escaping @Sendable (any Storage) -> any Storage
    ) throws {
        var options = row.options(isWritable: true)
        options.wrapStorage = wrap
        var resize = ImageResize(path: path, size: .exactly(UInt64(size)), options: options)
        resize.allowsShrinking = true
        _ = try resize.run()
    }

    /// The disk has one size or the other, and in both cases what it held; behind that, zeros.
    private func verify(
        _ image: ResizedImage, _ test: Case, isWritable: Bool, _ context: String,
        wrap: (@Sendable (any Storage) -> any Storage)? = nil
    ) {
        do {
            var options = test.image.row.options(isWritable: isWritable)
            options.locksImages = wrap == nil
            options.wrapStorage = wrap
            let disk = try Disk.open(image.path, options: options)
            #expect([test.oldSize, test.newSize].contains(Int(disk.size)), "\(context): \(disk.size) bytes")
            let common = min(test.oldSize, Int(disk.size))
            if let mistake = try image.model.mistake(of: disk, in: 0..<common) {
                Issue.record("\(context): \(mistake)")
            }
            let rest = min(Int(disk.size), 8 << 20)
            if rest > common {
                let bytes = try disk.read(at: UInt64(common), count: rest - common)
                if let first = bytes.firstIndex(where: { $0 != 0 }) {
                    Issue.record("\(context): byte \(common + first) behind the former end is \(bytes[first])")
                }
            }
            try disk.close()
        } catch {
            Issue.record("\(context): \(error)")
        }
    }

    /// (That a file was removed is not replayed: extents that go away are EditingPowerCutTests' business.)
    @Test(arguments: cases.filter { !($0.newSize < $0.oldSize && $0.image.making.variant?.hasPrefix("split") == true) })
    func powerCut(_ test: Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 21)
        let image = try makeImage(test, in: folder, &generator)
        let log = CrashLog()
        try Self.resize(image.path, test.image.row, to: test.newSize) { $0.traits.isWritable ? log.record($0) : $0 }
        // (What is made longer by gigabytes is in memory here.)
        guard try FileStorage(path: image.path, isWritable: false).length() < 64 << 20 else { return }
        var replay = log.replay()
        let step = max(1, log.count / 60)
        for (number, cut) in stride(from: 0, through: log.count, by: step).enumerated() {
            for mode in [.all, .none, .some(percent: 50)] as [CrashReplay.CutMode] {
                let files = replay.files(at: cut, mode, using: &generator)
                verify(
                    image, test, isWritable: number % 2 == 0,
                    "\(test.testDescription), cut \(cut) of \(log.count), \(mode)"
                ) { storage in
                    files[storage.name].map { MemoryStorage($0, name: storage.name) } ?? storage
                }
            }
        }
    }

    @Test(arguments: cases) func failingStorage(_ test: Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 22)
        let image = try makeImage(test, in: folder, &generator)
        let before = try folder.snapshotOfAll()
        let counter = FaultPlan(event: nil, errno: ENOSPC)
        try Self.resize(image.path, test.image.row, to: test.newSize) { $0.traits.isWritable ? counter.wrap($0) : $0 }
        let step = max(1, counter.events / 25)
        for event in stride(from: 0, to: counter.events, by: step) {
            try folder.restore(before)
            let plan = FaultPlan(event: event, errno: ENOSPC, lasts: event % 2 == 0)
            do {
                try Self.resize(image.path, test.image.row, to: test.newSize) {
                    $0.traits.isWritable ? plan.wrap($0) : $0
                }
            } catch {
                #expect((error as? DiskError)?.errno == ENOSPC, "\(test.testDescription), event \(event): \(error)")
            }
            let context = "\(test.testDescription), event \(event) of \(counter.events) failed"
            verify(image, test, isWritable: event % 3 == 0, context)
            try Self.resize(image.path, test.image.row, to: test.newSize) { $0 }
            var resized = image
            resized.model = image.model.resized(to: min(test.newSize, 16 << 20))
            verify(resized, test, isWritable: false, context + ", and a second try did not")
        }
    }

    @Test(arguments: cases) func killedProcess(_ test: Case) async throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 23)
        let image = try makeImage(test, in: folder, &generator)
        let before = try folder.snapshotOfAll()
        let counter = FaultPlan(event: nil, errno: ENOSPC)
        try Self.resize(image.path, test.image.row, to: test.newSize) { $0.traits.isWritable ? counter.wrap($0) : $0 }
        for quarter in 1...3 {
            try folder.restore(before)
            let event = counter.events * quarter / 4
            let result = await #expect(processExitsWith: .signal(SIGKILL)) {
                [
                    format = test.image.row.format as String, path = image.path as String, size = test.newSize as Int,
                    event = event as Int
                ] in
                let row = try #require(FormatRow.all.first { $0.format == format })
                let countdown = KillCountdown(event)
                try ResizeFailureTests.resize(path, row, to: size) {
                    $0.traits.isWritable ? countdown.wrap($0) : $0
                }
            }
            try #require(result != nil, "\(test.testDescription): it was not killed where it should be")
            verify(image, test, isWritable: quarter == 2, "\(test.testDescription), killed before event \(event)")
            try Self.resize(image.path, test.image.row, to: test.newSize) { $0 }
            verify(
                image, test, isWritable: false, "\(test.testDescription), killed before event \(event), and done again")
        }
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Whatever ends a merge or a rebase, the disk shows the same bytes; and done again, it is finished.
@Suite(.serialized) struct ChainSafetyTests {
    /// What is done to a chain of four images.
    enum Change: String, Sendable, CaseIterable, CustomTestStringConvertible {
        case down, up, commit, rebase, flatten
        var testDescription: String { rawValue }

        /// The images that are left, in numbers of the chain as it was.
        var kept: [Int] {
            switch self {
            case .down: [0, 3]
            case .up: [0, 1]
            case .commit: [2, 3]
            case .rebase: [0, 3]
            case .flatten: [0]
            }
        }

        /// The image that shows afterwards what the top one did.
        var top: Int { self == .commit ? 2 : 0 }

        func run(
            _ chain: TestChain, _ options: DiskOptions, keepsFiles: Bool,
            _ control: OperationControl = OperationControl()
        ) throws(DiskError) {
            switch self {
            case .down, .up, .commit:
                var merge = ChainMerge(top: chain.path(0))
                merge.options = options
                merge.source = .number([Change.down: 1, .up: 3, .commit: 0][self] ?? 0)
                merge.target = .number([Change.down: 3, .up: 1, .commit: 2][self] ?? 0)
                merge.keepsFiles = keepsFiles
                _ = try merge.run(control)
            case .rebase, .flatten:
                var rebase = ChainRebase(chain.path(0), parent: self == .rebase ? chain.path(3) : nil)
                rebase.options = options
                try rebase.run(control)
            }
        }
    }

    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        let change: Change
        var testDescription: String { "\(row.format), \(change)" }
    }

    static let cases = ChainMergeTests.rows.flatMap { row in Change.allCases.map { Case(row: row, change: $0) } }

    private static func options(_ row: FormatRow) -> DiskOptions {
        var options = row.options(isWritable: false)
        options.lazyFlushInterval = 0
        return options
    }

    // MARK: - Power cuts

    @Test(arguments: cases) func everyCutLeavesTheSameDisk(_ test: Case) throws {
        let size = (1 << 20) + 5 * 512
        let chain = try TestChain([test.row, test.row, test.row, test.row], sizes: [size, size, size, size])
        var options = Self.options(test.row)
        let log = CrashLog()
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        // Removing files is one step more, before which all is durable.
        try test.change.run(chain, options, keepsFiles: true)
        #expect(log.count > 0)
        var generator = SeededGenerator(seed: chain.seed)
        var replay = log.replay()
        let count = 400
        let cuts =
            log.count < count
            ? Array(0...log.count) : (0..<count).map { _ in Int.random(in: 0...log.count, using: &generator) }
        for (number, cut) in (cuts + [log.count]).sorted().enumerated() {
            let percent = [10, 50, 90].randomElement(using: &generator) ?? 50
            let mode: CrashReplay.CutMode = [.all, .none, .some(percent: percent)][number % 3]
            let files = replay.files(at: cut, mode, using: &generator)
            try Self.expectShown(
                test, chain, files, "\(test.testDescription), seed \(chain.seed), cut \(cut) of \(log.count), \(mode)")
        }
    }

    private static func expectShown(
        _ test: Case, _ chain: TestChain, _ files: [String: [UInt8]], _ context: String
    ) throws {
        var options = options(test.row)
        options.locksImages = false
        options.wrapStorage = { storage in
            guard let bytes = files[storage.name] else { return storage }
            return MemoryStorage(bytes, name: storage.name)
        }
        do {
            let disk = try Disk.open(chain.path(0), options: options)
            #expect(disk.size == UInt64(chain.models[0].size), "\(context)")
            if let mistake = try chain.models[0].mistake(of: disk, in: 0..<chain.models[0].size) {
                Issue.record("\(context): \(mistake)")
            }
            try disk.close()
        } catch {
            Issue.record("\(context): \(error)")
        }
    }

    // MARK: - Killed

    @Test(arguments: cases) func killedItIsFinishedByTheNext(_ test: Case) async throws {
        let chain = try TestChain([test.row, test.row, test.row, test.row])
        for tenth in [2, 5, 10] {
            _ = await #expect(processExitsWith: .signal(SIGKILL)) {
                [
                    format = test.row.format as String, change = test.change.rawValue as String,
                    folder = chain.folder.path as String, tenth = tenth as Int
                ] in
                let row = try #require(FormatRow.all.first { $0.format == format })
                let change = try #require(Change(rawValue: change))
                let chain = TestChain(existing: [row, row, row, row], in: folder)
                let control = OperationControl { progress in
                    if progress.fraction * 10 >= Double(tenth) { kill(getpid(), SIGKILL) }
                }
                try change.run(chain, ChainSafetyTests.options(row), keepsFiles: false, control)
            }
            try Self.expectShown(
                test, chain, [:], "\(test.testDescription), seed \(chain.seed), killed at \(tenth) tenths")
        }
        try test.change.run(chain, Self.options(test.row), keepsFiles: false)
        let kept = test.change.kept
        try chain.expectShown(
            test.change.top, chain.models[0], below: kept.dropFirst().map { chain.rows[$0] },
            "\(test.testDescription), finished",
            mayLeak: true)
    }

    /// Killed after the image above was told of its new parent, and before the files went: they go with the next call.
    @Test(arguments: ChainMergeTests.rows) func filesThatWereLeftGoWithTheNextCall(_ row: FormatRow) throws {
        let chain = try TestChain([row, row, row, row])
        var merge = ChainMerge(top: chain.path(0))
        merge.source = .path(chain.path(1))
        merge.target = .path(chain.path(3))
        merge.keepsFiles = true
        _ = try merge.run()
        merge.keepsFiles = false
        let outcome = try merge.run()
        #expect(outcome.obsoleteFiles.count == 2, "\(outcome)")
        let names = try Set(chain.folder.snapshotOfAll().keys)
        #expect(names == [chain.name(0), chain.name(3)])
        try chain.expectShown(0, chain.models[0], below: [row], "\(row.format)")
    }

    /// An image that has something of its own is never taken for one that was merged.
    @Test func whatWasNotMergedIsNotRemoved() throws {
        let row = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try TestChain([row, row])
        var other = NewImage(path: chain.folder.file("other.qcow2"))
        other.parent = chain.path(1)
        try other.create()
        let disk = try Disk.open(other.path, options: row.options(isWritable: true))
        try disk.write([1, 2, 3], at: 700_001)
        try disk.close()
        let before = try chain.folder.snapshotOfAll()
        var merge = ChainMerge(top: chain.path(0))
        merge.source = .path(other.path)
        merge.target = .path(chain.path(1))
        #expect(throws: DiskError.self) { _ = try merge.run() }
        #expect(try chain.folder.snapshotOfAll() == before)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Writes and flushes fail, the process is killed, the power fails, at any moment of a change of the chain of a disk
/// that is being written: the disk shows the right bytes or none, and the images on the disk are a chain that holds
/// what was flushed.
@Suite(.serialized) struct LiveFailureTests {
    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        let change: LiveChange
        var testDescription: String { "\(row.format), \(change)" }
    }

    static let cases = ChainMergeTests.rows.flatMap { row in LiveChange.allCases.map { Case(row: row, change: $0) } }
    static let merges = cases.filter { LiveChange.merges.contains($0.change) }

    /// A guest's steps before, during and after the change.
    private static func run(
        _ test: Case, _ disk: Disk, _ guest: SteppingGuest, began: () -> Void = {}
    ) -> DiskError? {
        guest.work(12)
        began()
        let control = OperationControl { _ in guest.work(4) }
        do throws(DiskError) { try test.change.run(disk, control) } catch { return error }
        return nil
    }

    // MARK: - Failing I/O

    @Test(arguments: cases) func whateverFailsTheBytesAreRight(_ test: Case) throws {
        let chain = try StampedChain(test.row, seed: 3)
        let dry = FaultPlan(event: nil, errno: EIO)
        var range = 0..<0
        try Self.fail(try chain.copy(), test, dry, "nothing") { range = $0 }
        var generator = SeededGenerator(seed: 4)
        let events =
            PowerCutTests.isTorture
            ? Array(range) : (0..<6).map { _ in Int.random(in: range, using: &generator) } + range.suffix(6)
        for event in Set(events).sorted() {
            for (lasts, errno) in [(false, EIO), (true, ENOSPC)] {
                let plan = FaultPlan(event: event, errno: errno, lasts: lasts)
                let context =
                    "\(test.testDescription), event \(event) of \(range) fails\(lasts ? " and all others" : "")"
                try Self.fail(try chain.copy(), test, plan, context)
            }
        }
    }

    private static func fail(
        _ chain: StampedChain, _ test: Case, _ plan: FaultPlan, _ context: String,
        _ tell: (Range<Int>) -> Void = { _ in }
    ) throws {
        var options = test.row.options(isWritable: true)
        options.wrapStorage = { $0.traits.isWritable ? plan.wrap($0) : $0 }
        let disk = try Disk.open(chain.path(0), options: options)
        var guest = SteppingGuest(disk, holding: chain.stamps[0], seed: 6) { plan.events }
        var start = 0
        let failure = run(test, disk, guest) { start = plan.events }
        tell(start..<plan.events)
        if test.change == .pop, failure == nil {
            guest = SteppingGuest(disk, holding: chain.stamps[1], seed: 7, firstStamp: 500_000) { plan.events }
        }
        func expectRight(_ moment: String) {
            if let mistake = guest.mistake(of: disk) {
                Issue.record("\(context), \(moment): \(mistake) (\(failure.map { "\($0)" } ?? "done"))")
            }
        }
        expectRight("after it")
        guest.work(6)
        expectRight("after work")
        plan.lift()
        // Once more: done, or refused.
        if failure != nil, test.change != .pop { _ = run(test, disk, guest) }
        guest.work(6)
        expectRight("in the end")
        let path = disk.layers[0].path
        var isClosed = true
        do throws(DiskError) { try disk.close() } catch { isClosed = false }
        try expectImages(path, test, guest, isClosed ? guest.current : guest.model.allowed(at: .max), context)
    }

    /// The images on the disk are a chain that holds what it must.
    private static func expectImages(
        _ path: String, _ test: Case, _ guest: SteppingGuest, _ allowed: [[UInt32]], _ context: String
    ) throws {
        do {
            let disk = try Disk.open(path, options: test.row.options(isWritable: false))
            let content = try disk.read(at: 0, count: StampedChain.sectors * 512)
            if let mistake = guest.model.firstMistake(in: content, allowed: allowed) {
                Issue.record("\(context), opened again: \(mistake)")
            }
            try disk.close()
            let report = try ImageCheck.run(path, options: test.row.options(isWritable: false))
            #expect(report.remaining(.loss) == 0, "\(context): \(report.findings)")
        } catch {
            Issue.record("\(context), opened again: \(error)")
        }
    }

    // MARK: - Power cuts

    @Test(arguments: cases) func everyCutLeavesWhatWasFlushed(_ test: Case) throws {
        let chain = try StampedChain(test.row, seed: 8)
        let log = CrashLog()
        var options = test.row.options(isWritable: true)
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        let disk = try Disk.open(chain.path(0), options: options)
        let first = SteppingGuest(disk, holding: chain.stamps[0], seed: 9) { log.count }
        if let failure = Self.run(test, disk, first) { throw failure }
        let end = log.count
        let path = disk.layers[0].path
        // From then on what was below is the disk.
        var last = first
        if test.change == .pop {
            last = SteppingGuest(disk, holding: chain.stamps[1], seed: 10, firstStamp: 500_000) { log.count }
        }
        last.work(12)
        try disk.close()
        var generator = SeededGenerator(seed: 11)
        var replay = log.replay()
        let count = PowerCutTests.isTorture ? log.count * 4 : 150
        let cuts = (0..<count).map { _ in Int.random(in: 0...log.count, using: &generator) } + [end, log.count]
        for (number, cut) in cuts.sorted().enumerated() {
            let percent = [10, 50, 90].randomElement(using: &generator) ?? 50
            let mode: CrashReplay.CutMode = [.all, .none, .some(percent: percent)][number % 3]
            let files = replay.files(at: cut, mode, using: &generator)
            let isAfter = cut > end
            try Self.expectCut(
                files, test, isAfter ? path : chain.path(0), isAfter ? last.model : first.model, cut,
                "\(test.testDescription), cut \(cut) of \(end) and \(log.count), \(mode)")
        }
    }

    private static func expectCut(
        _ files: [String: [UInt8]], _ test: Case, _ path: String, _ model: GuestModel, _ cut: Int, _ context: String
    ) throws {
        var options = test.row.options(isWritable: false)
        options.locksImages = false
        options.wrapStorage = { storage in
            guard let bytes = files[storage.name] else { return storage }
            return MemoryStorage(bytes, name: storage.name)
        }
        do {
            let disk = try Disk.open(path, options: options)
            let content = try disk.read(at: 0, count: StampedChain.sectors * 512)
            if let mistake = model.firstMistake(in: content, allowed: model.allowed(at: cut)) {
                Issue.record("\(context): \(mistake)")
            }
            try disk.close()
        } catch {
            Issue.record("\(context): \(error)")
        }
    }

    // MARK: - Killed

    @Test(arguments: merges) func whatWasFlushedSurvivesTheProcess(_ test: Case) async throws {
        let original = try StampedChain(test.row, seed: 12)
        // How many events there are.
        let dry = try original.copy()
        let count = Locked(0..<0)
        try Self.fail(dry, test, FaultPlan(event: nil, errno: EIO), "nothing") { range in
            count.withLock { $0 = range }
        }
        let range = count.withLock { $0 }
        for part in [1, 5, 9] {
            let chain = try original.copy()
            let event = range.lowerBound + range.count * part / 10
            let context = "\(test.testDescription), killed at event \(event) of \(range)"
            let result = await #expect(processExitsWith: .signal(SIGKILL)) {
                [
                    format = test.row.format as String, change = test.change.rawValue as String,
                    folder = chain.folder.path as String, event = event as Int
                ] in
                let row = try #require(FormatRow.all.first { $0.format == format })
                let change = try #require(LiveChange(rawValue: change))
                try LiveFailureTests.beKilled(
                    Case(row: row, change: change), StampedChain(existing: row, in: folder), at: event)
            }
            try #require(result != nil, "\(context): it was not killed")
            // The steps that were done, and one that may have been.
            let guest = SteppingGuest(nil, holding: chain.stamps[0], seed: 6) { 0 }
            guest.work(Int(Progress.last(in: chain.folder, "progress")) ?? 0)
            guest.step(fails: true)
            try Self.expectImages(chain.path(0), test, guest, guest.model.allowed(at: 1), context)
            // A writer repairs what needs it, and the merge is done.
            let disk = try Disk.open(chain.path(0), options: test.row.options(isWritable: true))
            let shown = try disk.read(at: 0, count: StampedChain.sectors * 512)
            let isDone = disk.layers.count < 4
            if !isDone { try test.change.run(disk, OperationControl()) }
            #expect(try disk.read(at: 0, count: shown.count) == shown, "\(context), done again")
            let top = disk.layers[0].path
            try disk.close()
            let again = try Disk.open(top, options: test.row.options(isWritable: false))
            #expect(try again.read(at: 0, count: shown.count) == shown, "\(context), opened again")
            try again.close()
        }
    }

    /// Works until the event with that number, which is its last.
    static func beKilled(_ test: Case, _ chain: StampedChain, at event: Int) throws {
        let progress = try Progress(folder: chain.folder.path)
        progress.note("0")
        let plan = FaultPlan(killingAt: event)
        var options = test.row.options(isWritable: true)
        options.wrapStorage = { $0.traits.isWritable ? plan.wrap($0) : $0 }
        let disk = try Disk.open(chain.path(0), options: options)
        let empty = [UInt32](repeating: 0, count: StampedChain.sectors)
        let guest = SteppingGuest(disk, holding: empty, seed: 6) { 0 }
        let work: @Sendable (Int) -> Void = { count in
            for _ in 0..<count {
                guest.step()
                progress.note("\(guest.steps)")
            }
        }
        work(12)
        try test.change.run(disk, OperationControl { _ in work(4) })
    }
}

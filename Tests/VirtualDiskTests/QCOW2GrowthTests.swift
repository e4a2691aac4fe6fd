import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// A refcount table that grows, and so moves, while the power fails or the storage does. (Small images, as the tests of
/// all formats have them, never get there.)
struct QCOW2GrowthTests {
    private static let sectors = 1024
    private static let size = sectors * GuestModel.sectorSize

    /// An image whose file is so long that the next tables lie where its refcount table does not reach.
    private static func make(_ folder: TemporaryFolder) throws -> String {
        var image = NewImage(path: folder.file("disk.qcow2"))
        image.size = UInt64(size)
        image.blockSize = 512
        image.options = ["refcount-bits": "64"]
        try image.create()
        // A table of one cluster has 64 entries, for blocks of 64 refcounts each: 2 MiB.
        try FileStorage(path: image.path, isWritable: true).setLength(2 << 20 - 4 << 10)
        return image.path
    }

    private static func options(_ wrap: @escaping @Sendable (any Storage) -> any Storage) -> DiskOptions {
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.locksImages = false
        options.wrapStorage = wrap
        return options
    }

    /// Writes, discards and flushes; answers how many calls failed.
    private static func work(
        on disk: Disk, _ model: inout GuestModel, _ generator: inout SeededGenerator, event: () -> Int
    ) -> Int {
        var errors = 0
        for step in 0..<30 {
            let start = Int.random(in: 0..<sectors, using: &generator)
            let range = start..<min(sectors, start + Int.random(in: 1...80, using: &generator))
            let offset = UInt64(start * GuestModel.sectorSize)
            do {
                switch step % 5 {
                case 0...2: try disk.write(model.write(range, event: event()), at: offset)
                case 3:
                    model.discard(range, event: event())
                    try disk.discard(offset: offset, length: UInt64(range.count * GuestModel.sectorSize))
                default:
                    try disk.flush()
                    model.flush(event: event())
                }
            } catch {
                errors += 1
                if step % 5 < 4 { model.lastChangeFailed() }
            }
        }
        return errors
    }

    private static func refcountTable(_ storage: any Storage) throws -> [UInt8] {
        try storage.bytes(at: 48, count: 12, for: .header, "the header")
    }

    @Test(arguments: [1, 2, 3] as [UInt64]) func growthSurvivesEveryCut(_ seed: UInt64) throws {
        let folder = try TemporaryFolder()
        let path = try Self.make(folder)
        let before = try Self.refcountTable(FileStorage(path: path, isWritable: false))
        var generator = SeededGenerator(seed: seed)
        var model = GuestModel(initial: [UInt32](repeating: 0, count: Self.sectors), firstStamp: 1000)
        let log = CrashLog()
        let disk = try Disk.open(path, options: Self.options { log.record($0) })
        #expect(Self.work(on: disk, &model, &generator) { log.count } == 0)
        try disk.close()
        model.flush(event: log.count)
        #expect(try Self.refcountTable(FileStorage(path: path, isWritable: false)) != before, "it did not grow")
        try QCOW2PeerTests.expectSound(path)
        var replay = log.replay()
        for cut in 0...log.count {
            let mode: CrashReplay.CutMode = [.all, .none, .some(percent: 50)][cut % 3]
            let files = replay.files(at: cut, mode, using: &generator)
            let context = "seed \(seed), cut \(cut) of \(log.count), \(mode)"
            if cut % 4 == 0 {
                let remains = try TemporaryFolder()
                let copy = try remains.write(files[path] ?? [], to: "disk.qcow2")
                let verdict = try QCOW2PeerTests.verdict(copy)
                #expect(verdict == 0 || verdict == 3, "\(context): \(verdict)")
            }
            let again = try Disk.open(
                path, options: Self.options { MemoryStorage(files[$0.name] ?? [], name: $0.name) })
            let content = try again.read(at: 0, count: Self.size)
            let mistake = model.firstMistake(in: content, allowed: model.allowed(at: cut))
            #expect(mistake == nil, "\(context): \(mistake ?? "")")
            // And it goes on from there.
            try again.write([1, 2, 3], at: 70_000)
            try again.close()
        }
    }

    @Test(arguments: [5, 28] as [Int32], [false, true]) func growthSurvivesEveryFault(
        _ errno: Int32, _ lasts: Bool
    ) throws {
        func session(_ plan: FaultPlan, _ context: String) throws {
            let folder = try TemporaryFolder()
            let path = try Self.make(folder)
            var generator = SeededGenerator(seed: 1)
            var model = GuestModel(initial: [UInt32](repeating: 0, count: Self.sectors), firstStamp: 1000)
            let disk = try Disk.open(path, options: Self.options { plan.wrap($0) })
            var errors = Self.work(on: disk, &model, &generator) { 0 }
            plan.lift()
            do {
                try disk.close()
                model.flush(event: 0)
            } catch { errors += 1 }
            #expect(errors > 0 || plan.failures == 0, "\(context): nobody was told")
            let report = try ImageCheck.run(path)
            #expect(report.remaining(.loss) + report.remaining(.repairable) == 0, "\(context): \(report.findings)")
            let again = try Disk.open(path, options: Self.options { $0 })
            let mistake = model.firstMistake(
                in: try again.read(at: 0, count: Self.size), allowed: model.allowed(at: 1))
            #expect(mistake == nil, "\(context): \(mistake ?? "")")
            try again.close()
        }
        let plan = FaultPlan(event: nil, errno: errno)
        try session(plan, "without a fault")
        let count = try #require(plan.eventsWhenLifted)
        for event in stride(from: 0, to: count, by: 2) {
            try session(
                FaultPlan(event: event, errno: errno, lasts: lasts), "event \(event) of \(count), errno \(errno)")
        }
    }
}

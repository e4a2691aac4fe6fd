import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Disks that are read through a cache beside a model: at any time and after any end what is read is right, and what is
/// in the file is, for a reader that shares nothing with the library, a sound cache of that disk.
struct BlockCacheModelTests {
    /// What lies below.
    enum Kind: String, CaseIterable, Sendable, CustomTestStringConvertible {
        case raw
        /// With an end that is no whole chunk.
        case oddRaw
        /// Images with holes and zeros, the lower ones cached and the top one written.
        case chain
        /// The same with an overlay on top.
        case overlay

        var testDescription: String { rawValue }
        var isWritten: Bool { self == .chain || self == .overlay }
    }

    /// The disk of a test, and what it holds.
    private struct Subject {
        let kind: Kind
        let folder: TemporaryFolder
        let path: String
        /// What a file that is changed behind the cache's back is called.
        let base: String
        var model: DiskModel
    }

    private static func makeSubject(_ kind: Kind, _ generator: inout SeededGenerator) throws -> Subject {
        let folder = try TemporaryFolder()
        guard kind.isWritten else {
            let size = kind == .raw ? 6 << 20 : (5 << 20) + 137 * 512
            let (path, model) = try VCI.makeRaw(folder, size: size, seed: generator.next())
            return Subject(kind: kind, folder: folder, path: path, base: path, model: model)
        }
        var model = DiskModel(size: 6 << 20)
        var path = ""
        for name in ["base.vdi", "middle.vdi", "top.vdi"] {
            var image = NewImage(path: folder.file(name))
            if path.isEmpty { image.size = UInt64(model.size) } else { image.parent = path }
            image.blockSize = 1 << 20
            if path.isEmpty { image.blockSize = nil }
            try image.create()
            path = image.path
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            for _ in 0..<6 {
                let start = Int.random(in: 0..<model.size - 400_000, using: &generator)
                let data = ConformanceTests.pool.bytes(
                    Int.random(in: 1...400_000, using: &generator), using: &generator)
                try disk.write(data, at: UInt64(start))
                model.write(data, at: start)
            }
            try disk.discard(offset: 1 << 20, length: 300_000)
            model.zero(1 << 20..<1 << 20 + 300_000)
            try disk.close()
        }
        return Subject(kind: kind, folder: folder, path: path, base: folder.file("base.vdi"), model: model)
    }

    @Test(arguments: Kind.allCases) func readsAreRightWhateverHappens(_ kind: Kind) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        var subject = try Self.makeSubject(kind, &generator)
        let cache = subject.folder.file("cache.vci")
        let sessions = 14
        for session in 0..<sessions {
            let context = "\(kind), seed \(seed), session \(session)"
            let said = Locked<[CacheNotice]>([])
            var options = VCI.options(cache, size: session < 7 ? 2 << 20 : 4 << 20, said, isWritable: kind == .chain)
            if kind == .overlay { options.overlay = .temporary(folder: subject.folder.path) }
            let model = subject.model
            let disk = try Disk.open(subject.path, options: options)
            try use(disk, &subject.model, isWritten: kind.isWritten, context, &generator)
            if session % 5 == 2 { try VCI.copy(cache, to: subject.folder.file("crashed.vci")) }
            try disk.close()
            #expect(said.withLock { $0.allSatisfy { !$0.isWarning } }, "\(context): \(said.withLock { $0 })")
            try VCI.expectSound(cache, context)
            if !kind.isWritten { try VCI.expectAgreement(cache, subject.model, context) }
            if kind == .overlay { subject.model = model }
            switch session % 5 {
            case 2: try Subprocess.run(["mv", subject.folder.file("crashed.vci"), cache]).expectSuccess()
            case 3 where !kind.isWritten: try Self.change(&subject, &generator)
            case 4: unsafe unlink(cache)
            default: break
            }
        }
    }

    /// Reads (and writes) of all sorts, compared with the model.
    private func use(
        _ disk: Disk, _ model: inout DiskModel, isWritten: Bool, _ context: String,
        _ generator: inout SeededGenerator
    ) throws {
        var stream = 0
        for step in 0..<150 {
            let count: Int
            var start = Int.random(in: 0..<model.size, using: &generator)
            switch step % 6 {
            case 0: count = 4096
            case 1: count = Int.random(in: 1...300_000, using: &generator)
            case 2:
                (start, count) = (start / VCI.chunk * VCI.chunk, VCI.chunk * Int.random(in: 1...6, using: &generator))
            case 3:
                (start, count) = (stream, 128 << 10)
                stream = stream + count >= model.size ? 0 : stream + count
            case 4: (start, count) = (max(0, model.size - Int.random(in: 1...100_000, using: &generator)), 100_000)
            default: count = Int.random(in: 1...600, using: &generator)
            }
            let range = start..<min(model.size, start + count)
            if isWritten, step % 7 == 3 {
                let data = ConformanceTests.pool.bytes(range.count, using: &generator)
                try disk.write(data, at: UInt64(start))
                model.write(data, at: start)
            }
            if let mistake = try model.mistake(of: disk, in: range) {
                Issue.record("\(context), step \(step): \(mistake)")
            }
        }
    }

    /// Another tool changes the image, without changing its length.
    private static func change(_ subject: inout Subject, _ generator: inout SeededGenerator) throws {
        let file = try FileStorage(path: subject.base, isWritable: true)
        for _ in 0..<20 {
            let start = Int.random(in: 0..<subject.model.size - 5000, using: &generator)
            let data = ConformanceTests.pool.bytes(5000, using: &generator)
            try file.write(data, at: UInt64(start), for: .guestData)
            subject.model.write(data, at: start)
        }
    }

    /// The power fails at any moment of a session, and of what was not flushed any part has reached the disk: what is
    /// found then is emptied, or it is right. The session begins with a cache of this disk, of another one, or with
    /// none.
    @Test(arguments: ["this", "another", "none"]) func powerCuts(_ what: String) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 3 << 20, seed: seed)
        let (other, _) = try VCI.makeRaw(folder, "other.raw", size: 3 << 20, seed: seed &+ 1)
        let cache = folder.file("cache.vci")
        if what == "none" { try folder.write([], to: "cache.vci") }
        if what != "none" {
            let before = try Disk.open(what == "this" ? path : other, options: VCI.options(cache))
            _ = try before.read(at: 0, count: 3 << 19)
            try before.close()
        }
        let log = CrashLog()
        let disk = try Disk.open(
            path, options: VCI.options(cache, wrap: { $0.name == cache ? log.record($0) : $0 }))
        for _ in 0..<60 {
            let start = Int.random(in: 0..<model.size - 100_000, using: &generator)
            _ = try disk.read(at: UInt64(start), count: Int.random(in: 1...100_000, using: &generator))
        }
        try disk.close()
        #expect(log.count > 30)
        var replay = log.replay()
        var kept = 0
        for cut in 0...log.count {
            for percent in [0, 20, 80, 100] {
                let bytes = replay.files(at: cut, .some(percent: percent), using: &generator)[cache] ?? []
                let storage = MemoryStorage(bytes, name: cache)
                let options = VCI.options(cache, wrap: { $0.name == cache ? storage : $0 })
                let found = try Disk.open(path, options: options)
                if let mistake = try model.mistake(of: found, in: 0..<model.size) {
                    Issue.record("\(what), seed \(seed), cut \(cut) of \(log.count), \(percent) %: \(mistake)")
                }
                kept += found.blockCacheUse?.hitBytes ?? 0 > 0 ? 1 : 0
                try found.close()
            }
        }
        // Those before the first change was durable, and those after the last one.
        #expect(kept >= 4 && kept < 4 * log.count / 2, "\(what): \(kept) of \(4 * log.count)")
    }

    /// Whichever instant the file is copied at: it is emptied, or it is right.
    @Test func aCrashAtAnyWriteLeavesNothingWrong() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 3 << 20, seed: seed)
        let cache = folder.file("cache.vci")
        // A closed cache of the first half, so that there is something to be wrong with.
        let first = try Disk.open(path, options: VCI.options(cache))
        _ = try first.read(at: 0, count: 3 << 19)
        try first.close()
        let before = try folder.read("cache.vci")
        let plan = FaultPlan(event: nil, errno: EIO)
        var options = VCI.options(cache, wrap: { $0.name == cache ? plan.wrap($0) : $0 })
        func session() throws {
            let disk = try Disk.open(path, options: options)
            for offset in stride(from: 0, to: 3 << 20, by: 196_608) {
                _ = try disk.read(at: UInt64(offset), count: 5000)
            }
            try disk.close()
        }
        try session()
        let events = plan.events
        #expect(events > 10)
        for event in 0..<events {
            unsafe unlink(cache)
            try folder.write(before, to: "cache.vci")
            // From that event on nothing reaches the file.
            let cut = FaultPlan(event: event, errno: EIO, lasts: true)
            options.wrapStorage = { $0.name == cache ? cut.wrap($0) : $0 }
            let said = Locked<[CacheNotice]>([])
            options.cache?.report = { notice in said.withLock { $0.append(notice) } }
            try session()
            #expect(said.withLock { $0.filter(\.isWarning).count } == 1, "event \(event)")
            let disk = try Disk.open(path, options: VCI.options(cache))
            if let mistake = try model.mistake(of: disk, in: 0..<model.size) {
                Issue.record("event \(event): \(mistake)")
            }
            try disk.close()
            try VCI.expectSound(cache, "event \(event)")
            try VCI.expectAgreement(cache, model, "event \(event)")
        }
    }
}

extension Subprocess.Result {
    fileprivate func expectSuccess() { #expect(status == 0, "\(errorText)") }
}

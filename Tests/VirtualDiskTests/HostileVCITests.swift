import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Every byte of a block cache is hostile, as ``HostileVMDKTests`` has it for VMDK; and whatever it holds, the disk
/// opens and reads right.
///
/// Of the disk all is cached, so that there is no field which can be another without contradicting something else:
/// against who can write to it a cache has no defence.
struct HostileVCITests {
    @Test func anyFieldHoldsAnything() async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [seed = seed as UInt64, path = folder.path as String] in
            try HostileVCISession(seed: seed, notes: path).changeFields()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    @Test func fileEndsAnywhere() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            try HostileVCISession(seed: 1, notes: path).truncate()
        }
        HostileVMDKTests.explain(result, "", folder)
    }

    /// Caches that say they are as large as can be, in files that are as long as no file system has them.
    @Test func hugeCaches() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            try HostileVCISession(seed: 1, notes: path).makeHuge()
        }
        HostileVMDKTests.explain(result, "", folder)
    }
}

/// One kind of harm after the other, in a process of its own.
struct HostileVCISession {
    private let seed: UInt64
    private let progress: Progress
    private let folder: TemporaryFolder
    private let disk: String
    private let model: DiskModel
    private let cache: String
    private let bytes: [UInt8]

    /// Seventeen chunks, of which the last one is short: a tree of two levels.
    private static let size = (1 << 20) + 5 * 512

    init(seed: UInt64, notes: String) throws {
        alarm(300)  // whatever goes on for ever ends here
        self.seed = seed
        folder = try TemporaryFolder()
        progress = try Progress(folder: notes)
        (disk, model) = try VCI.makeRaw(folder, size: Self.size, seed: 1)
        cache = folder.file("cache.vci")
        let opened = try Disk.open(disk, options: VCI.options(cache))
        _ = try opened.read(at: 0, count: Self.size)
        try opened.close()
        bytes = try folder.read("cache.vci")
        try #require(VCI.extents(cache).count == 17)
    }

    /// Uses a cache of these bytes, twice; answers how much was read past it the first time.
    @discardableResult
    private func attempt(_ what: String, _ changed: [UInt8], length: UInt64? = nil) -> UInt64 {
        progress.note(what)
        var missed: UInt64 = 0
        let start = clock()
        let before = MemoryPeak.reset()
        let storage = PagedStorage(changed, length: length, name: cache)
        var options = VCI.options(cache, wrap: { [cache] in $0.name == cache ? storage : $0 })
        options.locksImages = false
        for round in 0..<2 {
            do throws(DiskError) {
                let disk = try Disk.open(disk, options: options)
                for range in [0..<Self.size, 5000..<6000, Self.size - 100..<Self.size] {
                    guard let mistake = try model.mistake(of: disk, in: range) else { continue }
                    Issue.record("\(what), seed \(seed), round \(round): \(mistake)")
                }
                if round == 0 { missed = disk.blockCacheUse?.missBytes ?? 0 }
                try disk.close()
            } catch {
                // What does not begin as a cache is not taken for one.
                if error.kind != .invalidArgument { Issue.record("\(what), seed \(seed): \(error)") }
            }
        }
        let time = Double(clock() - start) / Double(CLOCKS_PER_SEC)
        let memory = MemoryPeak.now - before - storage.keptBytes
        if memory > HostileImage.memoryLimit { Issue.record("\(what): took \(memory >> 20) MiB of memory") }
        if time > HostileImage.timeLimit { Issue.record("\(what): took \(time) s") }
        return missed
    }

    private typealias Field = (name: String, offset: Int, width: Int)

    /// The fields of header, map, root, leaves; and some bits.
    private func fields() throws -> [Field] {
        var fields: [Field] = [(0, 4), (4, 4), (8, 8), (16, 1), (17, 4), (21, 8), (29, 8), (37, 4), (41, 8), (57, 8)]
            .map { ("header+\($0.0)", $0.0, $0.1) }
        fields += [(0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8)].map { ("map+\($0.0)", 1024 + $0.0, $0.1) }
        fields += [0, 1, 9, 40, 300, 511].map { ("bits+\($0)", 1536 + $0, 1) }
        let root = Int(bytes.number(at: 21, width: 8)) * 512
        fields.append(("root", root, 1))
        for entry in [0, 1, 3, 203] {
            for (place, width) in [(0, 8), (8, 4), (12, 8)] {
                fields.append(("branch \(entry)+\(place)", root + 1 + entry * 20 + place, width))
            }
        }
        let leaves = Set(try VCI.extents(cache).map(\.node)).sorted()
        for node in [leaves.first, leaves.last].compactMap({ $0 }) {
            fields.append(("leaf \(node)", node * 512, 1))
            for entry in [0, 1, 4, 106] {
                for (place, width) in [(0, 8), (8, 8), (16, 1), (17, 1), (18, 8), (26, 4), (30, 8)] {
                    fields.append(("leaf \(node), \(entry)+\(place)", node * 512 + 1 + entry * 38 + place, width))
                }
            }
        }
        return fields
    }

    /// Sets each field to many values; then several at once.
    func changeFields() throws {
        #expect(attempt("as it is", bytes) == 0)
        var generator = SeededGenerator(seed: seed)
        let fields = try fields()
        for field in fields {
            let old = bytes.number(at: field.offset, width: field.width)
            for value in hostileValues(width: field.width, was: old, using: &generator) where value != old {
                attempt("\(field.name) = \(value)", bytes.setting(value, at: field.offset, width: field.width))
            }
        }
        for _ in 0..<300 {
            var changed = bytes
            var what = "at once"
            for _ in 0..<Int.random(in: 2...4, using: &generator) {
                guard let field = fields.randomElement(using: &generator) else { break }
                let old = bytes.number(at: field.offset, width: field.width)
                let values = hostileValues(width: field.width, was: old, using: &generator)
                let value = values.randomElement(using: &generator) ?? 0
                changed = changed.setting(value, at: field.offset, width: field.width)
                what += ", \(field.name) = \(value)"
            }
            attempt(what, changed)
        }
    }

    func truncate() throws {
        let metadata = stride(from: 0, to: 40 << 10, by: 512)
        let data = stride(from: 40 << 10, to: bytes.count, by: 61 * 512)
        for length in Array(metadata) + Array(data) + [1, 3, 4, 8, 43, 511, 1023, bytes.count - 1, bytes.count - 512] {
            attempt("ends after \(length) of \(bytes.count)", bytes.prefixArray(length))
        }
    }

    func makeHuge() throws {
        for size in [1 << 20, 1 << 27, 1 << 28, 1 << 29, 1 << 30, 1 << 31, 1 << 44, 1 << 63] as [UInt64] {
            for length in [nil, 1 << 33, 1 << 39, 1 << 43] as [UInt64?] {
                for fields in [[8], [8, 1024 + 8], [8, 1024 + 8, 1024 + 16]] {
                    var changed = bytes
                    for field in fields { changed = changed.setting(size, at: field, width: 8) }
                    let blocks = min(UInt64(UInt32.max), 1 + size / 4096)
                    changed = changed.setting(blocks, at: 37, width: 4)
                    if fields.count == 3 {
                        let used = bytes.number(at: 1024 + 24, width: 8) + bytes.number(at: 1024 + 32, width: 8)
                        changed = changed.setting(size &- used, at: 1024 + 16, width: 8)
                    }
                    attempt("\(size) blocks in \(length ?? 0) bytes, \(fields.count) fields", changed, length: length)
                }
            }
        }
    }
}

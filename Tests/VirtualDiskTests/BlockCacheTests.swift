import CAllocationCounter
import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// What a block cache is good for, which one is used, and what becomes of those that are not.
struct BlockCacheTests {
    private static let size = 4 << 20

    private func read(_ path: String, _ options: DiskOptions, _ range: Range<Int> = 0..<size) throws -> [UInt8] {
        let disk = try Disk.open(path, options: options)
        let bytes = try disk.read(at: UInt64(range.lowerBound), count: range.count)
        try disk.close()
        return bytes
    }

    // MARK: - Hits

    /// The second pass reads nothing from the image, in the same session or the next one.
    @Test func nothingIsReadTwice() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: Self.size, seed: 1)
        let cache = folder.file("cache.vci")
        let counter = ReadCounter()
        let options = VCI.options(cache, size: 16 << 20, wrap: counter.wrap(except: cache))
        for session in 0..<3 {
            let disk = try Disk.open(path, options: options)
            for pass in 0..<2 {
                counter.reset()
                for offset in stride(from: 0, to: Self.size, by: 4096) {
                    let place = offset * 37 % Self.size
                    if let mistake = try model.mistake(of: disk, in: place..<place + 4096) {
                        Issue.record("\(mistake)")
                    }
                }
                #expect(counter.bytes == (session + pass == 0 ? Self.size : 0), "session \(session), pass \(pass)")
            }
            let use = try #require(disk.blockCacheUse)
            #expect(use.cachedBytes == UInt64(Self.size) && use.capacity >= 15 << 20)
            #expect(use.hitBytes + use.missBytes == UInt64(2 * Self.size))
            #expect(use.missBytes == (session == 0 ? UInt64(Self.size / 16) : 0))
            try disk.close()
        }
        try VCI.expectSound(cache)
        try VCI.expectAgreement(cache, model)
    }

    /// One read of the images for as much as is missing in one piece, so that the first pass is no slower than without
    /// a cache; and of a request in part, the rest only.
    @Test func whatIsMissingIsReadAtOnce() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: Self.size, seed: 2)
        let cache = folder.file("cache.vci")
        let counter = ReadCounter()
        let disk = try Disk.open(path, options: VCI.options(cache, size: 16 << 20, wrap: counter.wrap(except: cache)))
        #expect(try model.mistake(of: disk, in: 1 << 20..<2 << 20) == nil)
        #expect(counter.calls == 1 && counter.bytes == 1 << 20)
        counter.reset()
        #expect(try model.mistake(of: disk, in: (1 << 20) - 2 * VCI.chunk..<(2 << 20) + VCI.chunk) == nil)
        #expect(counter.calls == 2 && counter.bytes == 3 * VCI.chunk)
        counter.reset()
        // Edges inside of chunks.
        #expect(try model.mistake(of: disk, in: (3 << 20) - 100..<(3 << 20) + 100) == nil)
        #expect(counter.calls == 2 && counter.bytes == 2 * VCI.chunk)
        try disk.close()
    }

    /// Exactly the chunk that was used longest ago goes; and the order outlives the session.
    @Test func whatWasUsedLongestAgoGoes() throws {
        let folder = try TemporaryFolder()
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let (path, model) = try VCI.makeRaw(folder, size: 8 << 20, seed: 3)
        let cache = folder.file("cache.vci")
        let counter = ReadCounter()
        let disk = try Disk.open(path, options: VCI.options(cache, wrap: counter.wrap(except: cache)))
        let slots = 31
        #expect(disk.blockCacheUse?.capacity == UInt64(slots * VCI.chunk))
        var order: [Int] = []
        var last = 0
        for step in 0..<600 {
            // Never near the last ones, which would be a stream.
            let chunk = (last + Int.random(in: 9...119, using: &generator)) % 128
            last = chunk
            counter.reset()
            let range = chunk * VCI.chunk + 512..<chunk * VCI.chunk + 1000
            #expect(try model.mistake(of: disk, in: range) == nil)
            let isHit = order.contains(chunk)
            #expect((counter.calls == 0) == isHit, "seed \(seed), step \(step)")
            order.removeAll { $0 == chunk }
            order.append(chunk)
            if order.count > slots { order.removeFirst() }
        }
        try disk.close()
        try VCI.expectSound(cache)
        let extents = try VCI.extents(cache)
        #expect(extents.map(\.first).sorted() == order.map { $0 * 128 }.sorted(), "seed \(seed)")
        // The layout keeps the order of leaves.
        let nodes = Dictionary(uniqueKeysWithValues: extents.map { ($0.first, $0.node) })
        #expect(extents.map(\.node) == order.compactMap { nodes[$0 * 128] }, "seed \(seed)")
    }

    /// A backup reads everything once: what is used often is still there.
    @Test func largeSequentialReadsDoNotWashItOut() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 24 << 20, seed: 4)
        let cache = folder.file("cache.vci")
        let counter = ReadCounter()
        let disk = try Disk.open(path, options: VCI.options(cache, size: 8 << 20, wrap: counter.wrap(except: cache)))
        let hot = (0..<64).map { $0 * 5 % 128 * 2 * VCI.chunk / 2 }
        for offset in hot { _ = try disk.read(at: UInt64(offset), count: 4096) }
        for offset in stride(from: 10 << 20, to: 24 << 20, by: 128 << 10) {
            #expect(try model.mistake(of: disk, in: offset..<offset + 128 << 10) == nil)
        }
        counter.reset()
        for offset in hot { _ = try disk.read(at: UInt64(offset), count: 4096) }
        #expect(counter.calls <= 20, "\(counter.calls) of \(hot.count) are gone")
        // A piece of the stream is still there, and its end in any case.
        counter.reset()
        #expect(try model.mistake(of: disk, in: (24 << 20) - 4096..<24 << 20) == nil)
        #expect(counter.calls == 0)
        try disk.close()
        try VCI.expectSound(cache)
    }

    /// Zeros that an image's tables know of are not kept.
    @Test func holesTakeNoRoom() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = 64 << 20
        try image.create()
        try VHD.write(image.path, [(7, 5 << 20, 100)])
        let disk = try Disk.open(image.path, options: VCI.options(folder.file("cache.vci")))
        #expect(try disk.read(at: 0, count: 16 << 20).filter { $0 == 7 }.count == 100)
        #expect(try #require(disk.blockCacheUse).cachedBytes <= 1 << 20)
        try disk.close()
        try VCI.expectSound(folder.file("cache.vci"))
    }

    // MARK: - Which images

    /// What is cached below an image that is written stays when that one changes, and the other way round.
    @Test func belongsToTheImagesBelow() throws {
        let folder = try TemporaryFolder()
        let (base, _) = try VCI.makeRaw(folder, "base.raw", size: Self.size, seed: 5)
        var child = NewImage(path: folder.file("child.qcow2"))
        (child.parent, child.parentFormat) = (base, "raw")
        try child.create()
        let cache = folder.file("cache.vci")
        let counter = ReadCounter()
        let said = Locked<[CacheNotice]>([])
        let options = VCI.options(cache, size: 16 << 20, said, isWritable: true, wrap: counter.wrap(except: cache))
        for round in 0..<3 {
            let disk = try Disk.open(child.path, options: options)
            try disk.write([UInt8](repeating: UInt8(round), count: 5000), at: UInt64(round) << 20)
            _ = try disk.read(at: 0, count: Self.size)
            try disk.close()
            #expect(try VCI.extents(cache).count == Self.size / VCI.chunk)
            counter.reset()
            let again = try Disk.open(child.path, options: options)
            _ = try again.read(at: 3 << 20, count: 1 << 20)
            try again.close()
            #expect(counter.bytes == 0, "round \(round)")
        }
        #expect(said.withLock { $0.isEmpty }, "\(said.withLock { $0 })")
        // Read-only the child is cached too: another cache, then.
        var readOnly = options
        readOnly.isWritable = false
        _ = try read(child.path, readOnly)
        #expect(said.withLock { $0.count == 1 && $0[0].text.contains("emptied") && !$0[0].isWarning })
    }

    @Test func nothingBelowIsNothingToCache() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = 1 << 20
        try image.create()
        let said = Locked<[CacheNotice]>([])
        let cache = folder.file("cache.vci")
        let disk = try Disk.open(image.path, options: VCI.options(cache, said, isWritable: true))
        #expect(disk.blockCacheUse == nil)
        try disk.close()
        #expect(said.withLock { $0.count == 1 && $0[0].text.contains("not used") && !$0[0].isWarning })
        #expect(unsafe access(cache, F_OK) != 0)
    }

    /// However an image is changed, what was cached of it is gone.
    @Test(arguments: ["bytes", "length", "time", "replaced", "moved", "options"])
    func aChangedImageIsReadAgain(_ what: String) throws {
        let folder = try TemporaryFolder()
        var (path, model) = try VCI.makeRaw(folder, size: Self.size, seed: 6)
        let cache = folder.file("cache.vci")
        let said = Locked<[CacheNotice]>([])
        var options = VCI.options(cache, size: 16 << 20, said)
        #expect(model.mistake(in: try read(path, options), at: 0) == nil)
        switch what {
        case "bytes":
            model.write([1, 2, 3], at: 12345)
            try VHD.poke(path, [1, 2, 3], at: 12345)
        case "length":
            try FileStorage(path: path, isWritable: true).setLength(UInt64(Self.size) - 512)
            model = model.resized(to: Self.size - 512)
        case "time": try Peer.run("touch", path)
        case "replaced":
            model.write([9], at: 0)
            try folder.write(model.bytes, to: "other")
            try Peer.run("touch", "-r", path, folder.file("other"))
            try Peer.run("mv", folder.file("other"), path)
        case "moved":
            try Peer.run("mv", path, folder.file("moved.raw"))
            path = folder.file("moved.raw")
        default: options.formatOptions["vhd-size"] = "current"
        }
        #expect(model.mistake(in: try read(path, options, 0..<model.size), at: 0) == nil)
        #expect(said.withLock { $0.count == 1 && $0[0].text.contains("emptied") && !$0[0].isWarning }, "\(what)")
        try VCI.expectSound(cache)
        #expect(model.mistake(in: try read(path, options, 0..<model.size), at: 0) == nil)
        #expect(said.withLock { $0.count } == 1, "\(what)")
    }

    /// Until something is put into it, a cache of another disk stays what it is.
    @Test func aLookAtAnotherDiskCostsNothing() throws {
        let folder = try TemporaryFolder()
        let (first, _) = try VCI.makeRaw(folder, "a.raw", size: Self.size, seed: 7)
        let (second, _) = try VCI.makeRaw(folder, "b.raw", size: Self.size, seed: 8)
        let cache = folder.file("cache.vci")
        _ = try read(first, VCI.options(cache))
        let before = try folder.read("cache.vci")
        try Disk.open(second, options: VCI.options(cache)).close()
        #expect(try folder.read("cache.vci") == before)
        let disk = try Disk.open(second, options: VCI.options(cache))
        _ = try disk.read(at: 0, count: 1)
        // In use, and of the second disk.
        #expect(try folder.read("cache.vci")[16] == 1)
        #expect(throws: DiskError.self) { try BlockCacheFile.check(cache) }
        try disk.close()
        #expect(try VCI.extents(cache).count == 1)
        #expect(try FileStorage(path: cache, isWritable: false).length() < 200_000)
    }

    // MARK: - Which file

    @Test func anotherFileIsNotTouched() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 1 << 20, seed: 9)
        for name in ["disk.raw", "text", "short"] {
            if name == "text" { try folder.write(Array("my letters".utf8), to: name) }
            if name == "short" { try folder.write([0x56, 0x43, 0x49], to: name) }
            let before = try folder.read(name)
            #expect { try Disk.open(path, options: VCI.options(folder.file(name))) } throws: {
                "\($0)".contains("is no block cache")
            }
            #expect(try folder.read(name) == before)
        }
        #expect { try Disk.open(path, options: VCI.options(folder.path)) } throws: { "\($0)".contains("a folder") }
        // An empty one is as good as none.
        try folder.write([], to: "empty")
        #expect(model.mistake(in: try read(path, VCI.options(folder.file("empty")), 0..<model.size), at: 0) == nil)
        try VCI.expectSound(folder.file("empty"))
    }

    /// Where there can be none the disk is opened all the same.
    @Test func noCacheIsNoHarm() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 1 << 20, seed: 10)
        let said = Locked<[CacheNotice]>([])
        let missing = VCI.options(folder.file("none/cache.vci"), said)
        #expect(model.mistake(in: try read(path, missing, 0..<model.size), at: 0) == nil)
        #expect(said.withLock { $0.count == 1 && $0[0].isWarning && $0[0].text.contains("without a block cache") })
    }

    @Test func oneUserAtATime() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 2 << 20, seed: 11)
        let cache = folder.file("cache.vci")
        let first = try Disk.open(path, options: VCI.options(cache))
        _ = try first.read(at: 0, count: 100_000)
        let said = Locked<[CacheNotice]>([])
        let second = try Disk.open(path, options: VCI.options(cache, said))
        #expect(second.blockCacheUse == nil)
        #expect(said.withLock { $0.count == 1 && $0[0].isWarning && $0[0].text.contains("in use") })
        #expect(throws: DiskError.self) { try BlockCacheFile.drop(cache) }
        #expect(throws: DiskError.self) { try BlockCacheFile.check(cache) }
        #expect(try BlockCacheFile.information(cache).isUnclean)
        #expect(model.mistake(in: try second.read(at: 0, count: model.size), at: 0) == nil)
        try second.close()
        try first.close()
        try VCI.expectSound(cache)
        #expect(try VCI.extents(cache).count == 2)
    }

    /// The file's own commands.
    @Test(arguments: [false, true]) func makingAndDropping(_ isFixed: Bool) throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 2 << 20, seed: 12)
        let cache = folder.file("cache.vci")
        // Rounded down to what can be.
        try BlockCacheFile.create(cache, size: (8 << 20) + 12345, isFixed: isFixed)
        try VCI.expectSound(cache)
        let information = try BlockCacheFile.information(cache)
        #expect(information.size == 8 << 20 && information.isFixed == isFixed && information.imageUUID == nil)
        #expect((information.allocatedBytes >= 8 << 20) == isFixed)
        #expect(throws: DiskError.self) { try BlockCacheFile.create(cache, size: 8 << 20) }
        for bytes in [0, (2 << 20) - 1, 512 << 30 + 2 << 20, .max] as [UInt64] {
            #expect(throws: DiskError.self) { try BlockCacheFile.create(folder.file("other"), size: bytes) }
        }
        #expect(unsafe access(folder.file("other"), F_OK) != 0)
        let said = Locked<[CacheNotice]>([])
        #expect(model.mistake(in: try read(path, VCI.options(cache, size: nil, said), 0..<model.size), at: 0) == nil)
        let full = try #require(BlockCacheFile.information(cache).contents)
        #expect(full.cachedBytes == 2 << 20 && full.extents == 32 && said.withLock { $0.isEmpty })
        // Its size is what it was made with.
        _ = try read(path, VCI.options(cache, size: 4 << 20, said), 0..<model.size)
        #expect(said.withLock { $0.count == 1 && $0[0].text.contains("its size stays") })
        try BlockCacheFile.drop(cache)
        try VCI.expectSound(cache)
        let empty = try BlockCacheFile.information(cache)
        #expect(empty.contents?.extents == 0 && empty.imageUUID == nil && empty.isFixed == isFixed)
        #expect(throws: DiskError.self) { try BlockCacheFile.drop(path) }
        #expect(try folder.read("disk.raw") == model.bytes)
    }

    // MARK: - Failures

    /// A cache that fails at any time, once or for good: the disk reads right, and one line says so.
    @Test(arguments: [EIO, ENOSPC], [false, true]) func failingFile(_ errno: Int32, _ lasts: Bool) throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 3 << 20, seed: 13)
        let cache = folder.file("cache.vci")
        for event in 0..<40 {
            unsafe unlink(cache)
            let plan = FaultPlan(event: event, errno: errno, lasts: lasts)
            let said = Locked<[CacheNotice]>([])
            let options = VCI.options(cache, said, wrap: { $0.name == cache ? plan.wrap($0) : $0 })
            let disk = try Disk.open(path, options: options)
            for offset in stride(from: 0, to: model.size, by: 300_000) {
                let range = offset..<min(model.size, offset + 70_000)
                if let mistake = try model.mistake(of: disk, in: range) { Issue.record("event \(event): \(mistake)") }
            }
            try disk.close()
            let warnings = said.withLock { $0.filter(\.isWarning) }
            #expect(warnings.count == (plan.failures > 0 ? 1 : 0), "event \(event): \(warnings)")
            if plan.failures == 0 { break }
        }
    }

    /// Reads that fail, and a file that somebody cuts off.
    @Test(arguments: ["read", "cut"]) func unreadableFile(_ what: String) throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 3 << 20, seed: 14)
        let cache = folder.file("cache.vci")
        let isFailing = Locked(false)
        let said = Locked<[CacheNotice]>([])
        let options = VCI.options(
            cache, size: 8 << 20, said,
            wrap: { storage in
                storage.name != cache || what == "cut"
                    ? storage
                    : ObservedStorage(storage) { (access) throws(DiskError) in
                        if case .read = access, isFailing.withLock({ $0 }) { throw .system(EIO, "read") }
                    }
            })
        let disk = try Disk.open(path, options: options)
        _ = try disk.read(at: 0, count: model.size)
        isFailing.withLock { $0 = true }
        if what == "cut" { try FileStorage(path: cache, isWritable: true).setLength(300_000) }
        for _ in 0..<2 { #expect(try model.mistake(of: disk, in: 0..<model.size) == nil) }
        try disk.close()
        #expect(said.withLock { $0.count == 1 && $0[0].isWarning }, "\(said.withLock { $0 })")
        #expect(try BlockCacheFile.check(cache).remaining(.repairable) == 1)
    }

    /// An image that cannot be read somewhere: who does not ask for that is not told.
    @Test func unreadableImage() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 1 << 20, seed: 15)
        let cache = folder.file("cache.vci")
        let options = VCI.options(
            cache,
            wrap: { storage in
                storage.name == cache
                    ? storage
                    : ObservedStorage(storage) { (access) throws(DiskError) in
                        if case .read(_, let count, .guestData) = access, count > 8192 { throw .system(EIO, "read") }
                    }
            })
        let disk = try Disk.open(path, options: options)
        #expect(try model.mistake(of: disk, in: 5000..<9000) == nil)
        #expect(throws: DiskError.self) { try disk.read(at: 0, count: 100_000) }
        try disk.close()
        #expect(try VCI.extents(cache).isEmpty)
    }

    // MARK: - Threads

    /// More threads than the cache has slots for, all evicting under each other.
    @Test(arguments: [2 << 20, 4 << 20]) func threadsThatEvictUnderEachOther(_ size: UInt64) throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 12 << 20, seed: 16)
        let cache = folder.file("cache.vci")
        let disk = try Disk.open(path, options: VCI.options(cache, size: size))
        let seed = UInt64.random(in: 0...UInt64.max)
        let mistakes = Locked<[String]>([])
        onThreads(12) { number in
            var generator = SeededGenerator(seed: seed &+ UInt64(number))
            for _ in 0..<1500 {
                let start = Int.random(in: 0..<model.size, using: &generator)
                let count = [512, 4096, 70_000, 200_000].randomElement(using: &generator) ?? 0
                let range = start..<min(model.size, start + count)
                do {
                    guard let mistake = try model.mistake(of: disk, in: range) else { continue }
                    mistakes.withLock { $0.append(mistake) }
                } catch {
                    mistakes.withLock { $0.append("\(error)") }
                }
            }
        }
        #expect(mistakes.withLock { $0.isEmpty }, "seed \(seed): \(mistakes.withLock { $0.first ?? "" })")
        try disk.close()
        try VCI.expectSound(cache)
        try VCI.expectAgreement(cache, model, "seed \(seed)")
    }

    /// Those who miss the same chunk at the same time read it once.
    @Test func missesOfOneChunkShareOneRead() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try VCI.makeRaw(folder, size: 1 << 20, seed: 17)
        let cache = folder.file("cache.vci")
        let counter = ReadCounter()
        let wrap = counter.wrap(except: cache, delay: 100_000)
        let disk = try Disk.open(path, options: VCI.options(cache, wrap: wrap))
        let wrong = Locked(0)
        onThreads(8) { number in
            let range = number * 4096..<number * 4096 + 4096
            if (try? model.mistake(of: disk, in: range)) != .some(.none) { wrong.withLock { $0 += 1 } }
        }
        #expect(wrong.withLock { $0 } == 0 && counter.calls == 1 && counter.bytes == VCI.chunk)
        try disk.close()
    }

    #if !DEBUG
    @Test func hitsAllocateNothing() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try VCI.makeRaw(folder, size: 4 << 20, seed: 18)
        let disk = try Disk.open(path, options: VCI.options(folder.file("cache.vci"), size: 16 << 20))
        _ = try disk.read(at: 0, count: 4 << 20)
        var bytes = [UInt8](repeating: 0, count: 100_000)
        let count = try bytes.withIOBuffer { (buffer) throws(DiskError) in
            callocationcounter_begin()
            for round in 0..<1000 as Range<UInt64> {
                try disk.read(
                    into: buffer.slice(0, round % 2 == 0 ? 4096 : 100_000), at: round &* 52_736 % (4 << 20 - 100_000))
            }
            return callocationcounter_end()
        }
        #expect(count <= 0)
        try disk.close()
    }
    #endif
}

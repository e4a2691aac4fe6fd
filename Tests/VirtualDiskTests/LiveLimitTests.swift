import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Open disks whose chain changes only in part: those with an overlay or a block cache; and the locks of their images.
@Suite(.serialized) struct LiveLimitTests {
    static let rows = ChainMergeTests.rows
    private static let size = 12 << 20

    private func chain(_ row: FormatRow) throws -> TestChain {
        try TestChain([row, row, row, row], sizes: [Self.size, Self.size, Self.size, Self.size])
    }

    // MARK: - Overlays

    @Test(arguments: rows) func imagesBelowAnOverlayAreMerged(_ row: FormatRow) throws {
        for pair in [(1, 2), (2, 3), (1, 4), (3, 2), (4, 1), (2, 1)] {
            let chain = try chain(row)
            var options = row.options(isWritable: false)
            options.overlay = .temporary(folder: chain.folder.path)
            let disk = try Disk.open(chain.path(0), options: options)
            _ = try Guests.beside(disk, chain.models[0], isWriting: true) { () throws(DiskError) in
                _ = try disk.merge(pair.0, into: pair.1)
            }
            try disk.close()
            var images = Array(0..<4)
            let (source, target) = (pair.0 - 1, pair.1 - 1)
            images.removeSubrange(source < target ? source..<target : target + 1..<source + 1)
            try chain.expectShown(
                images[0], chain.models[0], below: images.dropFirst().map { chain.rows[$0] }, "\(row.format), \(pair)")
        }
    }

    /// One with a name is opened again, over the image that it records.
    @Test(arguments: rows) func anOverlayWithANameKnowsItsImage(_ row: FormatRow) throws {
        let hasIdentity = !["qcow2", "qed"].contains(row.format)
        for (source, target, isDone) in [
            (3, 2, true), (4, 2, true), (2, 3, hasIdentity), (3, 1, hasIdentity), (1, 2, true), (1, 4, true),
            (0, 1, false), (2, 0, false),
        ] {
            let chain = try chain(row)
            var options = row.options(isWritable: false)
            options.overlay = .file(chain.folder.file("kept"))
            var disk = try Disk.open(chain.path(0), options: options)
            var model = chain.models[0]
            try disk.write([1, 2, 3, 4], at: 70_001)
            model.write([1, 2, 3, 4], at: 70_001)
            let before = disk.layers.map(\.path)
            do throws(DiskError) {
                _ = try disk.merge(source, into: target)
                #expect(isDone, "\(row.format), \(source) into \(target): done")
            } catch {
                #expect(
                    !isDone && error.kind == .unsupported && "\(error)".contains("overlay"),
                    "\(row.format), \(source) into \(target): \(error)")
                #expect(disk.layers.map(\.path) == before)
            }
            #expect(throws: DiskError.self) { _ = try disk.makeSnapshot() }
            #expect(throws: DiskError.self) { try disk.popTop() }
            #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
            try disk.close()
            disk = try Disk.open(chain.path(isDone && source == 1 ? target - 1 : 0), options: options)
            #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
            #expect(disk.layers.count == (isDone ? 5 - abs(source - target) : 5))
            try disk.close()
        }
    }

    /// A power cut while the overlay is told that it lies over another image: it belongs to the one or the other, and
    /// shows the same.
    @Test(arguments: rows) func cutsOfAnOverlaysLink(_ row: FormatRow) throws {
        let chain = try chain(row)
        let log = CrashLog()
        var options = row.options(isWritable: false)
        options.overlay = .file(chain.folder.file("kept"))
        var disk = try Disk.open(chain.path(0), options: options)
        var model = chain.models[0]
        try disk.write([1, 2, 3, 4], at: 70_001)
        model.write([1, 2, 3, 4], at: 70_001)
        try disk.close()
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        disk = try Disk.open(chain.path(0), options: options)
        _ = try disk.merge(1, into: 2, keepsFiles: true)
        try disk.close()
        var generator = SeededGenerator(seed: 4)
        var replay = log.replay()
        let cuts =
            (0..<16).map { _ in Int.random(in: 0...log.count, using: &generator) }
            + (max(0, log.count - 24)...log.count)
        var found = [false, false]
        for (number, cut) in cuts.sorted().enumerated() {
            let mode: CrashReplay.CutMode = [.all, .none, .some(percent: 50)][number % 3]
            let files = replay.files(at: cut, mode, using: &generator)
            options.locksImages = false
            options.wrapStorage = { storage in
                files[storage.name].map { MemoryStorage($0, name: storage.name) } ?? storage
            }
            // What is in memory has no time of change, by which an image without an identity would be refused.
            let hasIdentity = !["qcow2", "qed"].contains(row.format)
            var failures: [String] = []
            for image in 0...1 {
                do throws(DiskError) {
                    let disk = try Disk.open(chain.path(image), options: options)
                    found[image] = true
                    let mistake = try model.mistake(of: disk, in: 0..<model.size)
                    if let mistake {
                        failures.append(mistake)
                        if hasIdentity { Issue.record("\(row.format), cut \(cut) of \(log.count): \(mistake)") }
                    }
                    try disk.close()
                } catch {
                    failures.append("\(error)")
                }
            }
            #expect(failures.count < 2, "\(row.format), cut \(cut) of \(log.count): \(failures)")
        }
        #expect(found == [true, true])
    }

    // MARK: - Block caches

    /// What is cached stays where it is still right, also after the disk was closed.
    @Test(arguments: rows, [false, true]) func aBlockCacheStaysRight(_ row: FormatRow, _ isWritable: Bool) throws {
        for (source, target) in isWritable ? [(2, 3), (0, 1), (1, 0)] : [(3, 1), (0, 2)] {
            let chain = try chain(row)
            let cache = chain.folder.file("cache.vci")
            var options = row.options(isWritable: isWritable)
            options.cache = CacheOptions(path: cache, size: 32 << 20) { _ in }
            let disk = try Disk.open(chain.path(0), options: options)
            var model = chain.models[0]
            let context = "\(row.format), \(source) into \(target)"
            #expect(try model.mistake(of: disk, in: 0..<model.size) == nil, "\(context)")
            let before = try #require(disk.blockCacheUse)
            model = try Guests.beside(disk, model, isWriting: isWritable) { () throws(DiskError) in
                _ = try disk.merge(source, into: target)
            }
            let after = try #require(disk.blockCacheUse)
            if !isWritable || source > 0 && target > 0 {
                #expect(after.cachedBytes >= before.cachedBytes, "\(context)")
            }
            #expect(try model.mistake(of: disk, in: 0..<model.size) == nil, "\(context), merged")
            if isWritable {
                let path = try disk.makeSnapshot()
                #expect(try model.mistake(of: disk, in: 0..<model.size) == nil, "\(context), a snapshot")
                try disk.popTop(deletingFiles: true)
                #expect(disk.layers.allSatisfy { $0.path != path })
                #expect(try model.mistake(of: disk, in: 0..<model.size) == nil, "\(context), without it")
            }
            let top = disk.layers[0].path
            let cached = try #require(disk.blockCacheUse).cachedBytes
            try disk.close()
            try VCI.expectSound(cache, context)
            let again = try Disk.open(top, options: options)
            #expect(try #require(again.blockCacheUse).cachedBytes == cached, "\(context), opened again")
            #expect(try model.mistake(of: again, in: 0..<model.size) == nil, "\(context), opened again")
            try again.close()
        }
    }

    /// While images are merged into the one that is written, the guest gives up what that got because an image that
    /// goes away says zeros there.
    @Test(arguments: rows) func zerosThatWereGivenUpStayZeros(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        let block = 4 << 20
        for number in [2, 1, 0] {
            var image = NewImage(path: folder.file(row.file("image\(number)")))
            image.size = UInt64(3 * block)
            if number < 2, let making = row.child {
                (image.variant, image.blockSize, image.options) = (making.variant, making.blockSize, making.options)
                image.parent = folder.file(row.file("image\(number + 1)"))
            }
            try image.create()
            let disk = try Disk.open(image.path, options: row.options(isWritable: true))
            if number == 2 { try disk.write([UInt8](repeating: 7, count: 3 * block), at: 0) }
            if number == 1 { try disk.discard(offset: UInt64(block), length: UInt64(block)) }
            try disk.close()
        }
        let disk = try Disk.open(folder.file(row.file("image0")), options: row.options(isWritable: true))
        try disk.write([UInt8](repeating: 9, count: block), at: UInt64(block))
        let isGivenUp = Locked(false)
        _ = try disk.merge(
            1, into: 0,
            control: OperationControl { progress in
                guard progress.done == progress.total, !isGivenUp.withLock({ $0 }) else { return }
                isGivenUp.withLock { $0 = true }
                try? disk.discard(offset: UInt64(block), length: UInt64(block))
            })
        #expect(isGivenUp.withLock { $0 } && disk.layers.count == 2)
        let expected =
            [UInt8](repeating: 7, count: block) + [UInt8](repeating: 0, count: block)
            + [UInt8](repeating: 7, count: block)
        #expect(try disk.read(at: 0, count: 3 * block) == expected, "\(row.format)")
        try disk.close()
    }

    // MARK: - Locks

    /// A reader becomes a writer, and a writer a reader, and nobody comes in between.
    @Test func locksPassOnWithoutAGap() throws {
        let folder = try TemporaryFolder()
        let path = try folder.write([1, 2, 3], to: "image")
        let reader = try FileStorage(path: path, isWritable: false)
        try reader.lockImage()
        let isEnding = Locked(false)
        let intruders = Locked((attempts: 0, successes: 0))
        onThreads(2) { number in
            guard number == 0 else {
                while !isEnding.withLock({ $0 }) {
                    guard let file = try? FileStorage(path: path, isWritable: true) else { continue }
                    let isIn = (try? file.lockImage()) != nil
                    intruders.withLock { $0 = ($0.attempts + 1, $0.successes + (isIn ? 1 : 0)) }
                    file.unlockImage()
                }
                return
            }
            defer { isEnding.withLock { $0 = true } }
            while intruders.withLock({ $0.attempts < 50 }) {
                guard let writer = try? FileStorage(path: path, isWritable: true),
                    (try? writer.lockImage(takingOverFrom: reader)) != nil
                else { continue }
                // And back, in the same way.
                while (try? reader.lockImage(takingOverFrom: writer)) == nil {}
            }
        }
        #expect(intruders.withLock { $0.attempts >= 50 && $0.successes == 0 })
    }

    /// Another reader is in the way: the image stays locked as it was.
    @Test func locksThatCannotPassOnStay() throws {
        let folder = try TemporaryFolder()
        let path = try folder.write([1, 2, 3], to: "image")
        let reader = try FileStorage(path: path, isWritable: false)
        let other = try FileStorage(path: path, isWritable: false)
        try reader.lockImage()
        try other.lockImage()
        let writer = try FileStorage(path: path, isWritable: true)
        #expect(throws: DiskError.self) { try writer.lockImage(takingOverFrom: reader) }
        other.unlockImage()
        let third = try FileStorage(path: path, isWritable: true)
        #expect(throws: DiskError.self) { try third.lockImage() }
        try writer.lockImage(takingOverFrom: reader)
        #expect(throws: DiskError.self) { try other.lockImage() }
        reader.unlockImage()
        #expect(throws: DiskError.self) { try third.lockImage() }
        writer.unlockImage()
        try third.lockImage()
    }

    /// Another process reads an image that is to be written: it is refused, and the disk goes on, locked as it was.
    @Test func aReaderElsewhereIsNotDisturbed() throws {
        let row = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try chain(row)
        let disk = try Disk.open(chain.path(0), options: row.options(isWritable: true))
        let reader = try Disk.open(chain.path(2), options: row.options(isWritable: false))
        #expect(throws: DiskError.self) { _ = try disk.merge(1, into: 2) }
        #expect(try chain.models[0].mistake(of: disk, in: 0..<Self.size) == nil)
        try reader.close()
        #expect(throws: DiskError.self) {
            _ = try Disk.open(chain.path(2), options: row.options(isWritable: true))
        }
        _ = try disk.merge(1, into: 2)
        try disk.close()
        try chain.expectShown(0, chain.models[0], below: [row, row], "merged")
    }
}

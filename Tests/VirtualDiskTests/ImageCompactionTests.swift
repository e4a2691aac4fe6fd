import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Images made smaller where they lie: what they show stays, what need not be in them goes.
@Suite(.serialized) struct ImageCompactionTests {
    private static let size = 6 << 20
    private static let pool = RandomPool(seed: 31)

    /// How an image is made: alone, or over one of another format.
    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        let making: FormatRow.Making
        /// The parent's format; nil: none.
        let parent: FormatRow?
        var testDescription: String {
            let image = FormatMatrixTests.Case(row: row, making: making, peerOptions: "").testDescription
            return image + (parent.map { " over \($0.format)" } ?? "")
        }
        var isFixed: Bool {
            // (A QCOW2 whose space was taken gives it back.)
            row.format == "raw" || making.options["data-file-raw"] != nil
                || row.format != "qcow2" && making.variant.map { $0.contains("fixed") || $0 == "esx" } == true
        }
    }

    static let bases = FormatRow.all.filter(\.isWritable).flatMap { row in
        row.ours.map { Case(row: row, making: $0, parent: nil) }
    }

    static let children = FormatRow.all.filter { $0.child != nil }.flatMap { row in
        FormatRow.all.filter { !$0.ours.isEmpty }
            .filter { !row.linksByUUIDAlone || ["vmdk", "vdi", "vhd", "vhdx"].contains($0.format) }
            .map { Case(row: row, making: row.child ?? .init(), parent: $0) }
    }

    /// An image with data, zeros that were written, and, over a parent, what the parent has; with a model of its disk.
    private struct Image {
        let path: String
        let below: [FormatRow]
        var model: DiskModel
    }

    private static func make(
        _ test: Case, in folder: TemporaryFolder, size: Int = Self.size, _ generator: inout SeededGenerator
    ) throws -> Image {
        var model = DiskModel(size: size)
        var image = NewImage(path: folder.file(test.row.file("image")))
        if let parent = test.parent {
            var base = NewImage(path: folder.file(parent.file("parent")))
            base.size = UInt64(size)
            let making = parent.ours.first ?? .init()
            (base.variant, base.blockSize, base.options) = (making.variant, making.blockSize, making.options)
            try base.create()
            let disk = try Disk.open(base.path, options: parent.options(isWritable: true))
            for start in [0, 1 << 20, 5 << 19] where start < size {
                let bytes = pool.bytes(min(1 << 19, size - start), using: &generator)
                try disk.write(bytes, at: UInt64(start))
                model.write(bytes, at: start)
            }
            try disk.close()
            (image.parent, image.parentFormat) = (base.path, parent.mustBeNamed ? parent.format : nil)
        } else {
            image.size = UInt64(size)
        }
        image.format = test.row.format
        (image.variant, image.blockSize, image.options) = (
            test.making.variant, test.making.blockSize, test.making.options
        )
        try image.create()
        try fill(image.path, test.row, &model, &generator)
        return Image(path: image.path, below: test.parent.map { [$0] } ?? [], model: model)
    }

    /// In two sessions everything is written, then much of it again: with zeros, or with what the parent has.
    private static func fill(
        _ path: String, _ row: FormatRow, _ model: inout DiskModel, _ generator: inout SeededGenerator
    ) throws {
        let below = model
        var disk = try Disk.open(path, options: row.options(isWritable: true))
        var order = Array(stride(from: 0, to: model.size, by: 1 << 18))
        order.shuffle(using: &generator)
        for start in order {
            let bytes = pool.bytes(min(1 << 18, model.size - start), using: &generator)
            try disk.write(bytes, at: UInt64(start))
            model.write(bytes, at: start)
        }
        try disk.close()
        disk = try Disk.open(path, options: row.options(isWritable: true))
        for start in order.prefix(order.count * 2 / 3) {
            let count = min(1 << 18, model.size - start)
            let isZero = start % (1 << 19) == 0
            let bytes = isZero ? [UInt8](repeating: 0, count: count) : below.bytes.slice(start, count)
            // (Not all at once: some formats drop blocks of zeros that are written as such.)
            for part in [0, count / 2] {
                let piece = bytes.slice(part, count - count / 2)
                try disk.write(piece, at: UInt64(start + part))
            }
            model.write(bytes, at: start)
        }
        try disk.close()
    }

    private static func expectSound(_ test: Case, _ image: Image, _ folder: TemporaryFolder, _ context: String) throws {
        let disk = try Disk.open(image.path, options: test.row.options(isWritable: false))
        let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size)
        #expect(mistake == nil, "\(context): \(mistake ?? "")")
        try ConformanceTests.expectHonestExtents(disk, image.model, context)
        try disk.close()
        let report = try ImageCheck.run(image.path, options: test.row.options(isWritable: false))
        // (What an ESX sparse extent has lost is estimated, and its tables count as lost.)
        let isEstimated = test.making.variant == "esx-sparse"
        let found = report.counts.filter { $0.key != .note && !(isEstimated && $0.key == .leak) }
        #expect(found.isEmpty, "\(context): \(report.findings)")
        _ = try Judge.compare(test.row, image.path, over: image.below, with: image.model, in: folder)
    }

    @Test(arguments: bases + children) func showsTheSameAndIsSmaller(_ test: Case) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let image = try Self.make(test, in: folder, &generator)
        let context = "\(test), seed \(seed)"
        var grandchild: NewImage?
        if let child = test.row.child {
            var new = NewImage(path: folder.file(test.row.file("grandchild")))
            (new.parent, new.variant, new.blockSize) = (image.path, child.variant, child.blockSize)
            try new.create()
            grandchild = new
        }
        let result = try ImageCompaction.run(image.path, options: test.row.options(isWritable: true))
        try Self.expectSound(test, image, folder, context)
        #expect(result.after.allocatedBytes <= result.before.allocatedBytes, "\(context): \(result)")
        let information = try #require(
            ImageInformation.read(image.path, options: test.row.options(isWritable: false)).first)
        let droppable = Self.droppable(image.model, blockSize: Int(information.blockSize))
        if test.parent == nil, 4096...1 << 18 ~= information.blockSize {
            // Of what can be given up in pieces as small as were written, all went.
            let slack = 3 << 20  // tables, and blocks of which a part is used
            let held = image.model.size - droppable
            #expect(result.after.allocatedBytes <= UInt64(held + slack), "\(context): \(result)")
        }
        if test.isFixed {
            #expect(result.after.fileLength == result.before.fileLength, "\(context): \(result)")
            #expect(droppable == 0 || !result.notes.isEmpty, "\(context): \(result)")
        } else {
            // (A VDI's blocks of zeros are gone before.)
            let isAtOnce = test.row.format == "vdi" || test.parent != nil
            #expect(droppable == 0 || isAtOnce || result.zeroBytes > 0, "\(context): \(result)")
            #expect(result.after.fileLength <= result.before.fileLength, "\(context): \(result)")
        }
        // Nothing is left to be done, and nothing is done.
        let before = try folder.snapshotOfAll()
        _ = try ImageCompaction.run(image.path, options: test.row.options(isWritable: true))
        #expect(try folder.snapshotOfAll() == before, "\(context): a second time changed something")
        if let grandchild {
            let disk = try Disk.open(grandchild.path, options: test.row.options(isWritable: false))
            let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size)
            #expect(mistake == nil, "\(context), through a child: \(mistake ?? "")")
            try disk.close()
        }
        // It can be used as ever.
        var model = image.model
        let disk = try Disk.open(image.path, options: test.row.options(isWritable: true))
        for start in stride(from: 100_000, to: model.size, by: 700_000) {
            let bytes = Self.pool.bytes(min(200_000, model.size - start), using: &generator)
            try disk.write(bytes, at: UInt64(start))
            model.write(bytes, at: start)
        }
        try disk.close()
        try Self.expectSound(
            test, Image(path: image.path, below: image.below, model: model), folder, context + ", written again")
    }

    /// Bytes of the model in whole blocks of zeros.
    private static func droppable(_ model: DiskModel, blockSize: Int) -> Int {
        let block = max(1 << 18, blockSize)
        return stride(from: 0, to: model.size, by: block).reduce(0) { sum, start in
            let count = min(block, model.size - start)
            return sum + (model.bytes.slice(start, count).allSatisfy { $0 == 0 } ? count : 0)
        }
    }

    // MARK: - Interruptions

    static let interrupted =
        (bases.filter { $0.making.variant == nil } + children.filter { $0.parent?.format == $0.row.format })

    /// Asked to stop at any moment, it leaves a sound image, and goes on where it was the next time.
    @Test(arguments: interrupted) func canBeStopped(_ test: Case) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let image = try Self.make(test, in: folder, &generator)
        let context = "\(test), seed \(seed)"
        for limit in [1, 3, 10] {
            let count = Locked(0)
            let box = Locked<OperationControl?>(nil)
            let control = OperationControl { _ in
                let now = count.withLock { count in
                    count += 1
                    return count
                }
                if now == limit { box.withLock { $0 }?.cancel() }
            }
            box.withLock { $0 = control }
            do {
                _ = try ImageCompaction.run(
                    image.path, options: test.row.options(isWritable: true), control: control)
            } catch {
                #expect(error.kind == .cancelled, "\(context): \(error)")
            }
            let disk = try Disk.open(image.path, options: test.row.options(isWritable: false))
            let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size)
            #expect(mistake == nil, "\(context), after \(limit): \(mistake ?? "")")
            try disk.close()
        }
        _ = try ImageCompaction.run(image.path, options: test.row.options(isWritable: true))
        try Self.expectSound(test, image, folder, context)
    }

    /// The power fails at any moment: the chain shows the same bytes, to readers and writers.
    @Test(arguments: interrupted) func survivesPowerCuts(_ test: Case) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let image = try Self.make(test, in: folder, size: 2 << 20, &generator)
        let log = CrashLog()
        var options = test.row.options(isWritable: true)
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        _ = try ImageCompaction.run(image.path, options: options)
        var replay = log.replay()
        let cuts = (0..<120).map { _ in Int.random(in: 0...log.count, using: &generator) }.sorted()
        for (number, cut) in cuts.enumerated() {
            let percent = [10, 50, 90].randomElement(using: &generator) ?? 50
            let mode: CrashReplay.CutMode = [.all, .none, .some(percent: percent)][number % 3]
            let files = replay.files(at: cut, mode, using: &generator)
            let context = "\(test), seed \(seed), cut \(cut) of \(log.count), \(mode)"
            var options = test.row.options(isWritable: number % 2 == 0)
            options.locksImages = false
            options.wrapStorage = { storage in
                guard let bytes = files[storage.name] else { return storage }
                return MemoryStorage(bytes, name: storage.name)
            }
            do {
                let disk = try Disk.open(image.path, options: options)
                if let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size) {
                    Issue.record("\(context): \(mistake)")
                }
                try disk.close()
                if number % 3 == 0 {
                    // What was cut off is done by the next one.
                    options.isWritable = true
                    _ = try ImageCompaction.run(image.path, options: options)
                }
            } catch {
                Issue.record("\(context): \(error)")
            }
        }
    }

    /// Its process is killed: the image is what it was, and the next one ends the work.
    @Test(arguments: interrupted.indices) func survivesKill(_ index: Int) async throws {
        let test = Self.interrupted[index]
        var generator = SeededGenerator(seed: UInt64(index))
        let folder = try TemporaryFolder()
        let image = try Self.make(test, in: folder, &generator)
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [path = image.path as String, index = index as Int] in
            let count = Locked(0)
            let control = OperationControl { _ in
                let now = count.withLock { count in
                    count += 1
                    return count
                }
                if now == 9 { kill(getpid(), SIGKILL) }
            }
            let row = ImageCompactionTests.interrupted[index].row
            _ = try ImageCompaction.run(path, options: row.options(isWritable: true), control: control)
            // (Where there are fewer steps, it was done.)
            kill(getpid(), SIGKILL)
        }
        let before = try folder.snapshotOfAll()
        let disk = try Disk.open(image.path, options: test.row.options(isWritable: false))
        let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size)
        #expect(mistake == nil, "\(test): \(mistake ?? "")")
        try disk.close()
        #expect(try folder.snapshotOfAll() == before)
        _ = try ImageCompaction.run(image.path, options: test.row.options(isWritable: true))
        try Self.expectSound(test, image, folder, "\(test)")
    }

    // MARK: - What cannot be

    @Test func streamsAreRefused() throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 1)
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        let image = try Self.make(Case(row: raw, making: .init(), parent: nil), in: folder, &generator)
        let stream = folder.file("stream.vmdk")
        try Peer.run(
            "qemu-img", "convert", "-q", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", image.path,
            stream)
        let before = try folder.read("stream.vmdk")
        #expect { try ImageCompaction.run(stream) } throws: { ($0 as? DiskError)?.kind == .unsupported }
        #expect(try folder.read("stream.vmdk") == before)
    }

    /// An image that somebody has open is left alone.
    @Test func openImagesAreLocked() throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 2)
        let vmdk = try #require(FormatRow.all.first { $0.format == "vmdk" })
        let image = try Self.make(Case(row: vmdk, making: .init(), parent: nil), in: folder, &generator)
        let disk = try Disk.open(image.path)
        #expect { try ImageCompaction.run(image.path) } throws: { ($0 as? DiskError)?.kind == .locked }
        try disk.close()
    }

    /// What internal snapshots hold stays what it was.
    @Test func snapshotsStay() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
        try Peer.run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 4M", "-c", "write -P 0 4M 2M", path)
        try Peer.run("qemu-img", "snapshot", "-c", "one", path)
        try Peer.run("qemu-io", "-f", "qcow2", "-c", "write -P 0 1M 2M", "-c", "write -P 7 6M 1M", path)
        let result = try ImageCompaction.run(path)
        #expect(result.zeroBytes >= 2 << 20)
        try Peer.run("qemu-img", "check", "-q", path)
        var options = DiskOptions()
        options.snapshot = "one"
        let snapshot = try Disk.open(path, options: options)
        #expect(try snapshot.read(at: 0, count: 4 << 20) == [UInt8](repeating: 5, count: 4 << 20))
        try snapshot.close()
        let disk = try Disk.open(path)
        #expect(try disk.read(at: 1 << 20, count: 2 << 20).allSatisfy { $0 == 0 })
        #expect(try disk.read(at: 6 << 20, count: 1 << 20).allSatisfy { $0 == 7 })
        try disk.close()
    }
}

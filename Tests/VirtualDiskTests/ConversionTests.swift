import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// What is converted shows the same afterwards, to us and to everybody else who can read it; what fails leaves nothing.
struct ConversionTests {
    private static let size = (5 << 20) + 3 * 512
    private static let pool = RandomPool(seed: 17)

    /// Formats that can be made from nothing.
    private static let made = FormatRow.all.filter { !$0.ours.isEmpty }

    /// A way to make the new image.
    struct Target: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        let making: FormatRow.Making
        var testDescription: String {
            FormatMatrixTests.Case(row: row, making: making, peerOptions: "").testDescription
        }

        func image(at path: String) -> NewImage {
            var image = NewImage(path: path)
            image.format = row.format
            (image.variant, image.blockSize, image.options) = (making.variant, making.blockSize, making.options)
            return image
        }
    }

    static let targets = made.flatMap { row in row.ours.map { Target(row: row, making: $0) } }

    static func judge(
        _ target: Target, _ path: String, _ model: DiskModel, _ folder: TemporaryFolder, _ context: String
    ) throws {
        let disk = try Disk.open(path, options: target.row.options(isWritable: false))
        #expect(disk.size >= UInt64(model.size), "\(context)")
        let whole = model.resized(to: Int(disk.size))
        let mistake = try whole.mistake(of: disk, in: 0..<whole.size)
        #expect(mistake == nil, "\(context): \(mistake ?? "")")
        try disk.close()
        let report = try ImageCheck.run(path, options: target.row.options(isWritable: false))
        for finding in report.findings where finding.severity != .note {
            Issue.record("\(context): \(finding.severity): \(finding.message)")
        }
        let judges = try Judge.compare(target.row, path, over: [], with: whole, in: folder)
        #expect(judges > 0, "\(context): nobody looked at it")
    }

    // MARK: - Everything to everything

    /// A chain of every format, to every way in which an image can be made.
    @Test(arguments: FormatRow.all) func everyFormatToEveryOther(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        var source = try MatrixImage.base(row, in: folder, size: Self.size, pool: Self.pool)
        if row.isWritable { try source.weWrite("the base") } else { try source.peerWrites() }
        if row.child != nil {
            try source.makeSnapshot(row)
            try source.weWrite("the snapshot")
        }
        for target in Self.targets where row.format == "vmdk" || target.making.variant == nil {
            let place = try TemporaryFolder()
            let new = target.image(at: place.file(target.row.file("base")))
            var conversion = ImageConversion(
                from: source.path, options: source.row.options(isWritable: false), to: new)
            conversion.verifies = true
            try conversion.run()
            try Self.judge(target, new.path, source.model, place, "\(row.format) to \(target.testDescription)")
        }
    }

    /// Every kind of disk that there are tests with: streams, several files, chains of several formats.
    @Test(arguments: DiskKind.all) func everyKindOfDisk(_ kind: DiskKind) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 99)
        let (path, model) = try kind.make(in: folder, pool: Self.pool, using: &generator)
        for row in Self.made where row.format == "raw" || row.format == "qcow2" {
            let target = Target(row: row, making: FormatRow.Making())
            let new = target.image(at: folder.file("converted.\(row.format)"))
            try ImageConversion(from: path, options: kind.options(isWritable: false), to: new).run()
            try Self.judge(target, new.path, model, folder, "\(kind.name) to \(row.format)")
        }
    }

    /// A disk of zeros and holes takes hardly any space, whatever it becomes.
    @Test(arguments: targets.filter { $0.making.variant == nil }) func sparseStaysSparse(_ target: Target) throws {
        let folder = try TemporaryFolder()
        let source = folder.file("source.raw")
        let file = try FileStorage(creating: source)
        try file.setLength(256 << 20)
        try file.write([1, 2, 3], at: 200 << 20, for: .guestData)
        // Zeros that are stored, in the middle of data too.
        try file.write([UInt8](repeating: 0, count: 16 << 20), at: 32 << 20, for: .guestData)
        let image = target.image(at: folder.file(target.row.file("new")))
        try ImageConversion(from: source, options: DiskOptions(format: "raw"), to: image).run()
        let information = try #require(
            try ImageInformation.read(image.path, options: target.row.options(isWritable: false)).first)
        // Tables and one block; those of VHDX have 1 MiB each.
        #expect(
            information.allocatedBytes <= max(2 << 20, 8 << 20), "\(target): \(information.allocatedBytes) bytes")
        #expect(try Peer.run("cmp", source, source).isEmpty)
    }

    // MARK: - Chains

    /// A chain of every format becomes a chain of every format.
    @Test(arguments: FormatRow.all.filter { $0.child != nil && !$0.ours.isEmpty })
    func keepsTheChain(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        var source = try MatrixImage.base(row, in: folder, size: Self.size, pool: Self.pool)
        try source.weWrite("the base")
        for _ in 0..<2 {
            try source.makeSnapshot(row)
            try source.weWrite("a snapshot")
        }
        for target in Self.made where target.child != nil {
            let place = try TemporaryFolder()
            var conversion = ChainConversion(from: source.path, to: place.path, format: target.format)
            conversion.verifies = true
            let paths = try conversion.run()
            #expect(paths.count == 3)
            let images = try ImageInformation.read(paths[0], wholeChain: true)
            #expect(images.map(\.format) == Array(repeating: target.format, count: 3))
            let judges = try Judge.compare(
                target, paths[0], over: [target, target], with: source.model, in: place)
            #expect(judges > 0 || target.format == "vhd" && row.format == "vhd" || target.reader != nil)
            // Each layer holds what the old one held, so that the base alone shows what it showed.
            let old = try Disk.open(source.path)
            let base = try Disk.open(paths[2])
            let oldBase = try Disk.open(old.layers[2].path)
            #expect(try oldBase.read(at: 0, count: Self.size) == base.read(at: 0, count: Self.size))
            for disk in [old, base, oldBase] { try disk.close() }
        }
    }

    /// The top image alone, over a copy of its parent in another format.
    @Test func topImageOverANamedParent() throws {
        let folder = try TemporaryFolder()
        guard let vmdk = FormatRow.all.first(where: { $0.format == "vmdk" }) else { return }
        var source = try MatrixImage.base(vmdk, in: folder, size: Self.size, pool: Self.pool)
        try source.weWrite("the base")
        let basePath = source.path
        try source.makeSnapshot(vmdk)
        try source.weWrite("the snapshot")
        for target in Self.made where target.child != nil {
            let base = folder.file(target.file("new-base"))
            try ImageConversion(from: basePath, to: Target(row: target, making: .init()).image(at: base)).run()
            var top = NewImage(path: folder.file(target.file("new-top")))
            top.format = target.format
            top.parent = base
            var conversion = ImageConversion(from: source.path, to: top)
            conversion.verifies = true
            try conversion.run()
            let disk = try Disk.open(top.path)
            let mistake = try source.model.mistake(of: disk, in: 0..<Self.size)
            #expect(mistake == nil, "\(target.format): \(mistake ?? "")")
            try disk.close()
        }
    }

    // MARK: - Compressed

    @Test(arguments: [512, 4096, 65536, 2 << 20], ["zlib", "zstd"])
    func compressedQCOW2(_ clusterSize: Int, _ method: String) throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        for bits in ["1", "16", "64"] {
            var new = NewImage(path: folder.file("new-\(bits).qcow2"))
            new.blockSize = UInt64(clusterSize)
            new.options = ["compression-type": method, "refcount-bits": bits]
            var conversion = ImageConversion(from: source, options: DiskOptions(format: "raw"), to: new)
            conversion.compresses = true
            conversion.verifies = true
            try conversion.run()
            try Peer.run("qemu-img", "check", "-q", "-f", "qcow2", new.path)
            try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", source, new.path)
            let report = try ImageCheck.run(new.path)
            #expect(report.findings.isEmpty, "\(report.findings)")
            // And back, by threads that decompress.
            let back = NewImage(path: folder.file("back-\(bits).raw"))
            try ImageConversion(from: new.path, to: back).run()
            try Peer.run("cmp", source, back.path)
            // It can be written to like any other.
            let disk = try Disk.open(new.path, options: DiskOptions(isWritable: true))
            try disk.write([UInt8](repeating: 9, count: 300_000), at: 100_000)
            try disk.close()
            try Peer.run("qemu-img", "check", "-q", "-f", "qcow2", new.path)
        }
    }

    @Test func compressedWithExtendedEntries() throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        var new = NewImage(path: folder.file("new.qcow2"))
        new.options = ["extended-l2": "on"]
        var conversion = ImageConversion(from: source, options: DiskOptions(format: "raw"), to: new)
        conversion.compresses = true
        try conversion.run()
        try Peer.run("qemu-img", "check", "-q", "-f", "qcow2", new.path)
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", source, new.path)
    }

    @Test func streamOptimized() throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        var new = NewImage(path: folder.file("new.vmdk"))
        new.variant = "stream"
        var conversion = ImageConversion(from: source, options: DiskOptions(format: "raw"), to: new)
        conversion.verifies = true
        try conversion.run()
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vmdk", source, new.path)
        let report = try ImageCheck.run(new.path)
        #expect(report.findings.isEmpty, "\(report.findings)")
        let information = try #require(try ImageInformation.read(new.path).first)
        #expect(information.fileLength < 14 << 20)
    }

    /// Text, noise, zeros and holes, of a size that no cluster divides.
    private static func mixedDisk(_ folder: TemporaryFolder) throws -> String {
        let path = folder.file("source.raw")
        let file = try FileStorage(creating: path)
        var generator = SeededGenerator(seed: 5)
        let text = (0..<3 << 20).map { UInt8(truncatingIfNeeded: 97 + ($0 * $0 / 7 + $0 / 1000) % 23) }
        try file.write(text, at: 1 << 20, for: .guestData)
        for place in [6, 7] {
            try file.write(pool.bytes(1 << 20, using: &generator), at: UInt64(place) << 20, for: .guestData)
        }
        // Uniform, and no noise.
        try file.write((0..<1 << 20).map { UInt8(truncatingIfNeeded: $0) }, at: 9 << 20, for: .guestData)
        try file.setLength((20 << 20) + 3 * 512)
        try file.write([1], at: (20 << 20) + 3 * 512 - 1, for: .guestData)
        return path
    }

    // MARK: - Sizes, and what fails

    @Test func anotherSize() throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        var larger = NewImage(path: folder.file("larger.vdi"))
        larger.size = 64 << 20
        try ImageConversion(from: source, options: DiskOptions(format: "raw"), to: larger).run()
        let disk = try Disk.open(larger.path)
        #expect(disk.size == 64 << 20)
        try disk.close()
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vdi", source, larger.path)
        // Smaller only where nothing is lost.
        var smaller = NewImage(path: folder.file("smaller.vdi"))
        smaller.size = (20 << 20) + 512
        #expect(throws: DiskError.self) { try ImageConversion(from: larger.path, to: smaller).run() }
        #expect(throws: DiskError.self) { try FileStorage(path: smaller.path, isWritable: false) }
        smaller.size = (20 << 20) + 3 * 512
        try ImageConversion(from: larger.path, to: smaller).run()
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vdi", source, smaller.path)
    }

    @Test func whatIsThereIsNotTouched() throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        let path = try folder.write([1, 2, 3], to: "there.vmdk")
        #expect(throws: DiskError.self) {
            try ImageConversion(from: source, options: DiskOptions(format: "raw"), to: NewImage(path: path)).run()
        }
        #expect(try folder.read("there.vmdk") == [1, 2, 3])
    }

    /// Overwriting replaces everything, zeros included.
    @Test func overwrites() throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        for row in Self.made where row.format == "raw" || row.child != nil {
            var image = NewImage(path: folder.file(row.file("old")))
            image.size = (20 << 20) + 3 * 512
            try image.create()
            let options = row.options(isWritable: true)
            let disk = try Disk.open(image.path, options: options)
            let junk = [UInt8](repeating: 0xee, count: 1 << 20)
            for step in 0..<20 { try disk.write(junk, at: UInt64(step) << 20) }
            try disk.close()
            image.format = row.format
            image.size = nil
            var conversion = ImageConversion(from: source, options: DiskOptions(format: "raw"), to: image)
            conversion.overwritesTarget = true
            try conversion.run()
            let back = NewImage(path: folder.file("back-\(row.format).raw"))
            try ImageConversion(from: image.path, options: row.options(isWritable: false), to: back).run()
            try Peer.run("cmp", source, back.path)
        }
    }

    /// A device is written as the disk itself, whatever it held before; a file is what it is recognised as, and one
    /// that is not is only taken for a raw disk if its name says so.
    @Test func overwritesWhatIsThere() throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        let sourceOptions = DiskOptions(format: "raw")
        func overwrite(_ path: String) throws(DiskError) {
            var conversion = ImageConversion(from: source, options: sourceOptions, to: NewImage(path: path))
            conversion.overwritesTarget = true
            conversion.verifies = true
            try conversion.run()
        }
        let junk = [UInt8](repeating: 0xee, count: (20 << 20) + 3 * 512)
        let image = try folder.write(junk, to: "there.img")
        try overwrite(image)
        try Peer.run("cmp", source, image)
        let unknown = try folder.write(junk, to: "there.vmdk")
        expectRefused(.unknownFormat, "--to raw") { () throws(DiskError) in try overwrite(unknown) }
        #expect(try folder.read("there.vmdk") == junk)
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow2", folder.file("really.img"), "\(junk.count)")
        try overwrite(folder.file("really.img"))
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", source, folder.file("really.img"))

        guard getuid() == 0, try FileMover.exists("/dev/loop-control") else { return }
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow2", folder.file("device.bin"), "64M")
        try Peer.run("truncate", "-s", "\(junk.count)", folder.file("device.bin"))
        let loop = try Peer.run("losetup", "--find", "--show", folder.file("device.bin")).filter { $0 != "\n" }
        defer { _ = try? Subprocess.run(["losetup", "-d", loop]) }
        try overwrite(loop)
        try Peer.run("cmp", source, loop)
    }

    /// At whatever point it is stopped, nothing is left.
    @Test func cancelledLeavesNothing() throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        let before = try folder.snapshotOfAll()
        for target in Self.targets {
            for fraction in [0.0, 0.3, 0.9] {
                let holder = Locked<OperationControl?>(nil)
                let control = OperationControl { progress in
                    if progress.fraction >= fraction { holder.withLock { $0?.cancel() } }
                }
                holder.withLock { $0 = control }
                if fraction == 0 { control.cancel() }
                let conversion = ImageConversion(
                    from: source, options: DiskOptions(format: "raw"),
                    to: target.image(at: folder.file(target.row.file("new"))))
                do throws(DiskError) {
                    try conversion.run(control)
                    Issue.record("\(target) was not stopped")
                } catch {
                    #expect(error.kind == .cancelled, "\(error)")
                }
                holder.withLock { $0 = nil }
                #expect(try folder.snapshotOfAll() == before, "\(target) left something, stopped at \(fraction)")
            }
        }
    }

    /// Cancelling the task cancels the operation.
    @Test func composesWithTasks() async throws {
        let folder = try TemporaryFolder()
        let source = try Self.mixedDisk(folder)
        let conversion = ImageConversion(
            from: source, options: DiskOptions(format: "raw"), to: NewImage(path: folder.file("new.vhdx")))
        let seen = Locked<[Double]>([])
        let control = OperationControl { progress in seen.withLock { $0.append(progress.fraction) } }
        try await control.perform { (control) throws(DiskError) in try conversion.run(control) }
        #expect(seen.withLock { $0.contains(1) })
        let second = Task {
            while !Task.isCancelled { await Task.yield() }
            let other = ImageConversion(
                from: source, options: DiskOptions(format: "raw"), to: NewImage(path: folder.file("other.vhdx")))
            try await OperationControl().perform { (control) throws(DiskError) in try other.run(control) }
        }
        second.cancel()
        do {
            try await second.value
            Issue.record("a cancelled task's operation went on")
        } catch {
            #expect((error as? DiskError)?.kind == .cancelled, "\(error)")
        }
        #expect(throws: DiskError.self) { try FileStorage(path: folder.file("other.vhdx"), isWritable: false) }
    }
}

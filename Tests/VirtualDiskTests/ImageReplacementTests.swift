import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// An image that is made anew in its own place shows the same, is smaller where it could be, and still belongs to its
/// parents and children; whenever it is stopped, one of the two images is there as a whole.
struct ImageReplacementTests {
    private static let size = (5 << 20) + 3 * 512
    private static let pool = RandomPool(seed: 23)
    static let formats = FormatRow.all.filter { !$0.ours.isEmpty && $0.child != nil }

    /// In the middle of a chain, in the same format: its children do not notice.
    @Test(arguments: formats) func compactsInTheMiddleOfAChain(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        var image = try MatrixImage.base(row, in: folder, size: Self.size, pool: Self.pool)
        try image.weWrite("the base")
        try image.makeSnapshot(row)
        try image.weWrite("the middle")
        let middle = image.path
        try image.makeSnapshot(row)
        try image.weWrite("the top")
        for path in [middle, image.path] {
            let before = try #require(try ImageInformation.read(path).first)
            var replacement = ImageReplacement(path)
            replacement.verifies = true
            try replacement.run()
            try image.weRead("\(row.format), after \(path) was made anew")
            let after = try #require(try ImageInformation.read(path).first)
            #expect(after.identity == before.identity)
            #expect(after.blockSize == before.blockSize)
            let report = try ImageCheck.run(path)
            #expect(report.findings.allSatisfy { $0.severity == .note }, "\(report.findings)")
        }
        #expect(try Peer.run("ls", "-A", folder.path).contains(".new") == false)
        let judges = try Judge.compare(row, image.path, over: [row, row], with: image.model, in: folder)
        #expect(judges > 0 || row.reader != nil || row.format == "vmdk")
    }

    /// Zeros that are stored take no space in the new image.
    @Test(arguments: formats) func getsSmaller(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file(row.file("disk")))
        image.size = 16 << 20
        image.format = row.format
        try image.create()
        var generator = SeededGenerator(seed: 5)
        let disk = try Disk.open(image.path, options: row.options(isWritable: true))
        for place in 0..<12 { try disk.write(Self.pool.bytes(1 << 20, using: &generator), at: UInt64(place) << 20) }
        try disk.flush()
        for place in 2..<12 { try disk.write([UInt8](repeating: 0, count: 1 << 20), at: UInt64(place) << 20) }
        try disk.close()
        let before = try #require(try ImageInformation.read(image.path).first).allocatedBytes
        try ImageReplacement(image.path).run()
        let after = try #require(try ImageInformation.read(image.path).first).allocatedBytes
        // (A VDI drops such blocks when they are written.)
        #expect(after <= before && after < 6 << 20, "\(row.format): \(before) bytes before, \(after) now")
    }

    /// To another format: the name stays, the extents of the old one go.
    @Test(arguments: formats) func convertsInPlace(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        var split = NewImage(path: folder.file("disk.vmdk"))
        split.size = UInt64(Self.size)
        split.variant = "split"
        split.options = ["split-size": "1048576"]
        try split.create()
        var generator = SeededGenerator(seed: 3)
        var model = DiskModel(size: Self.size)
        let data = Self.pool.bytes(700_000, using: &generator)
        model.write(data, at: 900_000)
        let disk = try Disk.open(split.path, options: DiskOptions(isWritable: true))
        try disk.write(data, at: 900_000)
        try disk.close()
        var replacement = ImageReplacement(split.path)
        replacement.format = row.format
        replacement.verifies = true
        try replacement.run()
        #expect(try Peer.run("ls", "-A", folder.path) == "disk.vmdk\n")
        let target = ConversionTests.Target(row: row, making: .init())
        try ConversionTests.judge(target, split.path, model, folder, "in place, to \(row.format)")
    }

    /// Stopped anywhere, the old image is as it was.
    @Test(arguments: formats) func cancelled(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        var image = try MatrixImage.base(row, in: folder, size: Self.size, pool: Self.pool)
        try image.weWrite("the base")
        let before = try folder.snapshotOfAll()
        for fraction in [0.0, 0.5] {
            let holder = Locked<OperationControl?>(nil)
            let control = OperationControl { progress in
                if progress.fraction >= fraction { holder.withLock { $0?.cancel() } }
            }
            holder.withLock { $0 = control }
            do throws(DiskError) {
                try ImageReplacement(image.path).run(control)
                Issue.record("\(row.format) was not stopped")
            } catch {
                #expect(error.kind == .cancelled, "\(error)")
            }
            holder.withLock { $0 = nil }
            #expect(try folder.snapshotOfAll() == before)
        }
    }

    /// What cannot be put in place in one step, or would lose something, is refused.
    @Test func refusals() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.qcow2"))
        image.size = 1 << 20
        try image.create()
        try Peer.run("qemu-img", "snapshot", "-c", "one", image.path)
        let before = try folder.snapshotOfAll()
        #expect(throws: DiskError.self) { try ImageReplacement(image.path).run() }
        var several = ImageReplacement(image.path)
        several.format = "vmdk"
        several.variant = "split-fixed"
        #expect(throws: DiskError.self) { try several.run() }
        // Nor does another format, or another variant, have its internal snapshots.
        for (format, variant) in [("vmdk", nil), ("raw", nil), ("qcow2", "metadata"), (nil, "fixed")] {
            var other = ImageReplacement(image.path)
            (other.format, other.variant) = (format, variant)
            expectRefused(.losesData, "snapshot") { () throws(DiskError) in try other.run() }
        }
        #expect(try folder.snapshotOfAll() == before)
        #expect(try Peer.run("ls", "-A", folder.path) == "disk.qcow2\n")
    }

    /// A device stays one: no file takes its name.
    @Test func devicesStay() throws {
        guard getuid() == 0, try FileMover.exists("/dev/loop-control") else { return }
        let folder = try TemporaryFolder()
        let file = try folder.write([UInt8](repeating: 5, count: 1 << 20), to: "disk.raw")
        let loop = try Peer.run("losetup", "--find", "--show", file).filter { $0 != "\n" }
        defer { _ = try? Subprocess.run(["losetup", "-d", loop]) }
        // Another node of the same device, so that none in /dev is lost if this goes wrong.
        let number = try Peer.run("stat", "-c", "%Hr %Lr", loop).split(whereSeparator: \.isWhitespace).map(String.init)
        let node = folder.file("device")
        try Peer.run("mknod", node, "b", number[0], number[1])
        for format in ["qcow2", "raw", nil] {
            var replacement = ImageReplacement(node)
            replacement.format = format
            expectRefused(.unsupported, "no regular file") { () throws(DiskError) in try replacement.run() }
        }
        expectRefused(.invalidArgument, "no regular file") { () throws(DiskError) in
            _ = try ImageSnapshot(of: node).create()
        }
        #expect(try Peer.run("stat", "-c", "%F", node) == "block special file\n")
        #expect(try Peer.run("ls", "-A", folder.path) == "device\ndisk.raw\n")
    }

    /// What a killed run has left is cleared away by the next.
    @Test func leftoversGo() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.qed"))
        image.size = 1 << 20
        try image.create()
        try Peer.run("mkdir", folder.file(".disk.qed.new"))
        _ = try folder.write([1, 2, 3], to: ".disk.qed.new/disk.qed")
        try ImageReplacement(image.path).run()
        #expect(try Peer.run("ls", "-A", folder.path) == "disk.qed\n")
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// Disks of all formats get larger and smaller, alone and over parents, and everybody who can read them agrees on what
/// they hold.
struct ResizeTests {
    private static let size = (5 << 20) + 3 * 512

    @Test(arguments: ResizedImage.cases) func growsAndShrinks(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 5)
        var image = try ResizedImage(test, in: folder, size: Self.size, using: &generator)
        try image.resize(to: Self.size + 512)
        try image.expectSound("\(test.testDescription), a sector larger", judges: false)
        try image.resize(to: Self.size + (3 << 20) + 1024)
        try image.expectSound("\(test.testDescription), larger")
        try image.write(300_000, at: Self.size - 100_000, using: &generator)
        try image.write(512, at: image.model.size - 512, using: &generator)
        try image.expectSound("\(test.testDescription), written across the former end")
        try image.discard(from: (4 << 20) + 512)
        try image.resize(to: (4 << 20) + 512)
        try image.expectSound("\(test.testDescription), smaller")
        try image.resize(to: 7 << 20)
        try image.expectSound("\(test.testDescription), larger again")
        try image.write(70_000, at: (4 << 20) - 20_000, using: &generator)
        try image.expectSound("\(test.testDescription), written again")
    }

    @Test(arguments: ResizedImage.cases) func cutsDataOffOnlyWhereAsked(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 6)
        var image = try ResizedImage(test, in: folder, size: Self.size, using: &generator)
        try image.discard(from: 3 << 20)
        let last = (4 << 20) + 1000
        try image.write(1, at: last, using: &generator)
        let before = try folder.snapshotOfAll()
        var resize = ImageResize(
            path: image.path, size: .exactly(3 << 20), options: test.row.options(isWritable: true))
        #expect { try resize.run() } throws: { ($0 as? DiskError)?.kind == .losesData }
        resize.allowsShrinking = true
        #expect { try resize.run() } throws: { error in
            let error = error as? DiskError
            return error?.kind == .losesData && error?.message.contains("byte \(last),") == true
        }
        #expect(try folder.snapshotOfAll() == before, "\(test.testDescription): a refused resize changed a file")
        try image.resize(to: 3 << 20, discardsData: true)
        try image.expectSound("\(test.testDescription), cut off")
        try image.resize(to: 6 << 20)
        try image.expectSound("\(test.testDescription), larger after that")
    }

    /// (Extents of a mebibyte would be more than a descriptor can list.)
    @Test(arguments: ResizedImage.cases.filter { $0.making.variant?.hasPrefix("split") != true })
    func growsByALot(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 7)
        let image = try ResizedImage(test, in: folder, size: Self.size, using: &generator)
        let large = Self.largeSize(test)
        _ = try ImageResize(
            path: image.path, size: .exactly(large), options: test.row.options(isWritable: true)
        ).run()
        let last = ResizedImage.pool.bytes(512, using: &generator)
        let disk = try Disk.open(image.path, options: test.row.options(isWritable: true))
        #expect(disk.size == large)
        if let mistake = try image.model.mistake(of: disk, in: 0..<Self.size) {
            Issue.record("\(test.testDescription): \(mistake)")
        }
        #expect(try disk.read(at: UInt64(Self.size), count: 1 << 20).allSatisfy { $0 == 0 })
        #expect(try disk.read(at: large - 512, count: 512).allSatisfy { $0 == 0 })
        try disk.write(last, at: large - 512)
        try disk.write(last, at: UInt64(Self.size) + 1_000_000)
        try disk.close()
        let report = try ImageCheck.run(image.path, options: test.row.options(isWritable: false))
        #expect(
            report.remaining(.loss) + report.remaining(.repairable) == 0,
            "\(test.testDescription): \(report.findings.prefix(3))")
        guard let peer = test.row.peer else { return }
        if test.row.isCheckedByPeer { try Peer.run("qemu-img", "check", "-q", "-f", peer, image.path) }
        // (Whole disks of such sizes it reads for hours where it knows nothing of holes.)
        for (value, offset) in [(image.model.bytes.slice(0, 1 << 20), 0 as UInt64), (last, large - 512)] {
            let part = folder.file("part.raw")
            unsafe unlink(part)
            try Peer.run(
                "qemu-img", "dd", "-f", peer, "-O", "raw", "bs=\(value.count)", "skip=\(offset / UInt64(value.count))",
                "count=\(offset / UInt64(value.count) + 1)", "if=\(image.path)", "of=\(part)")
            #expect(try folder.read("part.raw") == value, "\(test.testDescription): QEMU at byte \(offset)")
        }
        if let reader = test.row.reader, reader != "vdi.py" {
            let script = #filePath.replacing("VirtualDiskTests/ResizeTests.swift", with: "Readers/" + reader)
            try Peer.run("python3", script, "check", image.path)
        }
    }

    /// So large that tables do not stay where they are.
    private static func largeSize(_ test: ResizedImage.Case) -> UInt64 {
        if test.isFlat { return 40 << 20 }
        switch test.row.format {
        // The L1 table is what it was made as.
        case "qed": return 3 << 30
        case "vhdx": return 300 << 30
        default: return 64 << 30
        }
    }

    // MARK: - Chains

    static let chains = ResizedImage.rows.flatMap(ResizedImage.chains(of:))

    /// What the parent holds behind the child's end is not seen when the child becomes larger.
    @Test(arguments: chains) func growsOverALargerParent(_ test: ResizedImage.Case) throws {
        for size in [(2 << 20) + 3 * 512, 3 << 20] {
            let folder = try TemporaryFolder()
            var generator = SeededGenerator(seed: 8)
            var image = try ResizedImage(
                test, in: folder, size: size, parentSize: (6 << 20) + 512, using: &generator)
            try image.expectSound("\(test.testDescription), \(size) bytes", judges: false)
            try image.resize(to: 5 << 20)
            try image.expectSound("\(test.testDescription), \(size) bytes, larger")
            try image.resize(to: 9 << 20)
            try image.expectSound("\(test.testDescription), \(size) bytes, larger than its parent")
            try image.write(5000, at: (6 << 20) - 300, using: &generator)
            try image.expectSound("\(test.testDescription), \(size) bytes, written")
            try image.discard(from: 1 << 20)
            try image.resize(to: (1 << 20) + 512)
            try image.expectSound("\(test.testDescription), \(size) bytes, smaller")
            try image.resize(to: 8 << 20)
            try image.expectSound("\(test.testDescription), \(size) bytes, larger again")
        }
    }

    @Test(arguments: chains) func growsOverASmallerParent(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 9)
        var image = try ResizedImage(
            test, in: folder, size: Self.size, parentSize: (1 << 20) + 512, using: &generator)
        try image.resize(to: 8 << 20)
        try image.expectSound("\(test.testDescription), larger")
        try image.discard(from: 2 << 20)
        try image.resize(to: 2 << 20)
        try image.expectSound("\(test.testDescription), smaller")
    }

    // MARK: - Partitions

    @Test func partitionsAreNotCutOff() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.qcow2"))
        new.size = 64 << 20
        try new.create()
        let raw = folder.file("table.raw")
        try Peer.run("truncate", "-s", "64M", raw)
        try Peer.run("sgdisk", "-n", "1:2048:+20M", raw)
        try Peer.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, new.path)
        var resize = ImageResize(path: new.path, size: .exactly(16 << 20))
        resize.allowsShrinking = true
        #expect { try resize.run() } throws: { ($0 as? DiskError)?.message.contains("partition 1") == true }
        // The table's backup is no obstacle.
        resize.size = .exactly(32 << 20)
        #expect(try resize.run() == .init(oldSize: 64 << 20, newSize: 32 << 20, hasStrayBackupTable: true))
        resize.size = .larger(by: 16 << 20)
        #expect(try resize.run().newSize == 48 << 20)
        let disk = try Disk.open(new.path)
        #expect(try disk.read(at: 32 << 20, count: 16 << 20).allSatisfy { $0 == 0 })
        try disk.close()
    }

    @Test func sizesThatCannotBe() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.vhd"))
        new.size = 4 << 20
        try new.create()
        for size in [.exactly(0), .exactly(1000), .smaller(by: 5 << 20), .larger(by: .max)] as [ImageResize.Size] {
            var resize = ImageResize(path: new.path, size: size)
            resize.allowsShrinking = true
            #expect { try resize.run() } throws: { ($0 as? DiskError)?.kind == .invalidArgument }
        }
        #expect { try ImageResize(path: new.path, size: .exactly(3 << 40)).run() } throws: {
            ($0 as? DiskError)?.kind == .unsupported
        }
        #expect(try ImageInformation.read(new.path)[0].virtualSize == 4 << 20)
    }
}

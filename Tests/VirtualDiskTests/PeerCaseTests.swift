import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// The cases of QEMU's own test of its VMDK driver (iotest 059), on images that qemu-img makes.
struct PeerCaseTests {
    private static func create(_ path: String, _ size: String, _ options: String) throws {
        try Peer.run("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, path, size)
    }

    private static func io(_ path: String, format: String = "vmdk", _ commands: String...) throws {
        var words = ["qemu-io", "-f", format]
        for command in commands { words += ["-c", command] }
        let result = try Subprocess.run(words + [path])
        guard result.status == 0, !result.outputText.contains("failed") else {
            throw DiskError(.system, "\(words): \(result.outputText)\(result.errorText)")
        }
    }

    /// Fields with all bits set: the header's grain size, entries of a table, capacity, descriptor size, directory.
    @Test(arguments: [20, 44, 12, 36, 56], ["monolithicSparse", "twoGbMaxExtentSparse"])
    func absurdFieldIsRefused(_ offset: Int, _ subformat: String) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vmdk")
        try Self.create(path, "64M", "subformat=\(subformat)")
        let extent = subformat == "monolithicSparse" ? path : folder.file("disk-s001.vmdk")
        let width = offset == 44 ? 4 : 8
        try FileStorage(path: extent, isWritable: true).write(
            [UInt8](repeating: 0xff, count: width), at: UInt64(offset), for: .header)
        let start = ContinuousClock.now
        // A descriptor's size in the extent of a split image means nothing: there is none.
        if offset == 36, subformat != "monolithicSparse" { return }
        #expect { try Disk.open(path) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        #expect(ContinuousClock.now - start < .seconds(20))
    }

    @Test func malformedVMFSLineIsRefused() throws {
        let folder = try TemporaryFolder()
        try folder.write([UInt8](repeating: 0, count: 1 << 20), to: "dummy.vmdk")
        for line in [
            "RW 12582912 VMFS \"dummy.vmdk\" 1", "RW 2048 VMFS", "RW 2048 VMFS dummy.vmdk", "RW VMFS \"dummy.vmdk\"",
            "RW 2048 VMFS \"dummy.vmdk", "RW 2048 \"dummy.vmdk\"", "RW -1 VMFS \"dummy.vmdk\"", "RW",
            "RW 2048 VMFS \"dummy.vmdk\" x",
        ] {
            let path = try folder.write(Array(HostileDescriptorTests.descriptor(line).utf8), to: "disk.vmdk")
            #expect { try Disk.open(path) } throws: {
                [.invalidImage, .unsupported].contains(($0 as? DiskError)?.kind)
            }
            try Peer.run("rm", path)
        }
    }

    @Test func truncatedSparseFileIsRefused() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vmdk")
        try Self.create(path, "100G", "subformat=monolithicSparse")
        try FileStorage(path: path, isWritable: true).setLength(10 << 20)
        #expect { try Disk.open(path) } throws: { error in
            (error as? DiskError)?.kind == .invalidImage && "\(error)".contains("cut short")
        }
    }

    /// A hundred pieces of 512 bytes, 640 KiB and a sector apart, in a version 3 file.
    @Test(arguments: ["streamOptimized", "monolithicSparse"]) func versionThreeIsRead(_ subformat: String) throws {
        let folder = try TemporaryFolder()
        let size = 128 << 20
        var model = DiskModel(size: size)
        for number in 0..<100 {
            model.write([UInt8](repeating: UInt8(0x30 + number % 10), count: 512), at: number * ((640 << 10) + 512))
        }
        let source = try folder.write(model.bytes, to: "source.raw")
        let path = folder.file("disk.vmdk")
        try Peer.run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=\(subformat)", source, path)
        try FileStorage(path: path, isWritable: true).write([3], at: 4, for: .header)
        let disk = try Disk.open(path)
        #expect(try model.mistake(of: disk, in: 0..<size) == nil)
        try disk.close()
    }

    /// From a source with clusters of 4 KiB, scattered.
    @Test func streamFromSmallClustersIsRead() throws {
        let folder = try TemporaryFolder()
        let source = folder.file("source.qcow2")
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", source, "1G")
        let places: [(UInt8, UInt64, Int)] = [
            (0xa, 0, 512), (0xb, 16 << 10, 8192), (0xc, 64 << 10, 512), (0xd, (64 << 10) - 4096, 4096),
            (0xe, 512 << 20, 65_536), (0xf, (1 << 30) - 512, 512),
        ]
        for (value, offset, count) in places {
            try Self.io(source, format: "qcow2", "write -P \(value) \(offset) \(count)")
        }
        let path = folder.file("disk.vmdk")
        try Peer.run("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", source, path)
        let disk = try Disk.open(path)
        #expect(disk.size == 1 << 30)
        for (value, offset, count) in places {
            #expect(try disk.read(at: offset, count: count) == [UInt8](repeating: value, count: count))
        }
        #expect(try disk.read(at: 1024, count: 4096) == [UInt8](repeating: 0, count: 4096))
        try disk.close()
    }

    /// 1000 GiB in files of 2 GiB, by either program; written across the edges of files by one, read by the other.
    @Test func thousandGibibytesInFlatFiles() throws {
        let folder = try TemporaryFolder()
        let theirs = folder.file("theirs.vmdk")
        try Self.create(theirs, "1000G", "subformat=twoGbMaxExtentFlat")
        try Self.io(theirs, "write -P 7 \((2 << 30) - 512) 1024", "write -P 8 \((1000 << 30) - 512) 512")
        let disk = try Disk.open(theirs, options: DiskOptions(isWritable: true))
        #expect(disk.size == 1000 << 30)
        #expect(try disk.read(at: (2 << 30) - 512, count: 1024) == [UInt8](repeating: 7, count: 1024))
        #expect(try disk.read(at: (1000 << 30) - 512, count: 512) == [UInt8](repeating: 8, count: 512))
        try disk.write([UInt8](repeating: 9, count: 1024), at: (500 << 30) - 512)
        try disk.close()
        try Self.io(theirs, "read -P 9 \((500 << 30) - 512) 1024", "read -P 7 \((2 << 30) - 512) 1024")
    }

    @Test func thousandGibibytesOfOurs() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("ours.vmdk"))
        image.size = 1000 << 30
        image.variant = "split-fixed"
        image.options = ["preallocation": "off"]
        try image.create()
        try Self.io(image.path, "write -P 7 \((2 << 30) - 512) 1024", "write -P 8 \((1000 << 30) - 512) 512")
        let information = try Peer.run("qemu-img", "info", image.path)
        #expect(information.contains("1073741824000"))
        let disk = try Disk.open(image.path)
        #expect(try disk.read(at: (2 << 30) - 512, count: 1024) == [UInt8](repeating: 7, count: 1024))
        try disk.close()
    }

    /// 4 TiB in one flat file, written at 900 GiB.
    @Test func fourTebibytesInOneFlatFile() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vmdk")
        try Self.create(path, "4T", "subformat=monolithicFlat")
        try Self.io(path, "write -P 0xa 900G 512")
        let disk = try Disk.open(path)
        #expect(disk.size == 4 << 40)
        #expect(try disk.read(at: 900 << 30, count: 512) == [UInt8](repeating: 10, count: 512))
        #expect(try disk.read(at: 900 << 30 + 512, count: 512) == [UInt8](repeating: 0, count: 512))
        // The holes are the file's own: qemu-img may have written its first block.
        let flat = try FileStorage(path: folder.file("disk-flat.vmdk"), isWritable: false)
        #expect(try disk.nextData(from: 0) == flat.nextData(from: 0)?.lowerBound)
        #expect(try disk.nextData(from: 1 << 20) == 900 << 30)
        #expect(try disk.nextHole(from: 900 << 30) == flat.nextData(from: 900 << 30)?.upperBound)
        #expect(try disk.nextData(from: 901 << 30) == nil)
        try disk.close()
    }

    /// The map of a disk of 31 GiB with data on both sides of its files' edges.
    @Test func mapAcrossSplitFiles() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vmdk")
        try Self.create(path, "31G", "subformat=twoGbMaxExtentSparse")
        try Self.io(path, "write 65024 1k", "write 2147483136 1k", "write 5G 1k")
        let disk = try Disk.open(path)
        var found: [[UInt64]] = []
        try disk.forEachExtent(offset: 0, length: disk.size) { (extent) throws(DiskError) in
            if extent.isAllocated { found.append([extent.offset, extent.length]) }
            return true
        }
        let grain: UInt64 = 65_536
        #expect(found == [[0, 2 * grain], [(2 << 30) - grain, grain], [2 << 30, grain], [5 << 30, grain]])
        try disk.close()
    }
}

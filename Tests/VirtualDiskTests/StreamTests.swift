import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// A whole chain written front to back as a streamOptimized VMDK is what other tools read.
struct StreamTests {
    @Test func streamOfAChainReadsEqualElsewhere() throws {
        let folder = try TemporaryFolder()
        var base = NewImage(path: folder.path + "/base.vmdk")
        base.size = (40 << 20) + 512
        try base.create()
        var generator = SeededGenerator(seed: 11)
        let bottom = try Disk.open(base.path, options: DiskOptions(isWritable: true))
        try bottom.write((0..<300_000).map { _ in UInt8(truncatingIfNeeded: generator.next()) }, at: 1_000_000)
        try bottom.write([1, 2, 3], at: bottom.size - 3)
        try bottom.close()
        var child = NewImage(path: folder.path + "/child.vmdk")
        child.parent = base.path
        try child.create()
        let disk = try Disk.open(child.path, options: DiskOptions(isWritable: true))
        try disk.write([UInt8](repeating: 7, count: 100_000), at: 1_100_000)
        let file = try FileStorage(creating: folder.path + "/out.vmdk")
        var position: UInt64 = 0
        try disk.writeStream(format: "vmdk", name: "out.vmdk") { (bytes) throws(DiskError) in
            try file.write(bytes, at: position, for: .guestData)
            position += UInt64(bytes.count)
        }
        let content = try disk.read(at: 0, count: Int(disk.size))
        try disk.close()

        let raw = try Subprocess.run(
            ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", folder.path + "/out.vmdk", folder.path + "/out.raw"])
        #expect(raw.status == 0, "\(raw.errorText)")
        #expect(try Array(folder.read("out.raw").prefix(content.count)) == content)
        let own = try Disk.open(folder.path + "/out.vmdk")
        #expect(try own.read(at: 0, count: Int(own.size)) == content)
        try own.close()
        #expect(throws: DiskError.self) { try own.writeStream(format: "vdi", name: "x") { _ in } }
    }

    /// Larger and smaller than the disk; what a stream cannot be is an error, and not ignored.
    @Test func streamsOfAnotherSize() throws {
        let folder = try TemporaryFolder()
        let data = [UInt8](repeating: 7, count: 100_000)
        let path = try folder.write(data + [UInt8](repeating: 0, count: 948_576), to: "disk.raw")
        let disk = try Disk.open(path)
        func stream(_ change: (inout NewImage) -> Void) throws(DiskError) -> [UInt8] {
            let file = try FileStorage(temporaryIn: folder.path)
            var image = NewImage(path: "out.vmdk")
            change(&image)
            try disk.writeStream(image) { (bytes) throws(DiskError) in
                try file.write(bytes, at: try file.length(), for: .guestData)
            }
            return try file.bytes(at: 0, count: Int(try file.length()), for: .guestData, "the stream")
        }
        let zeros = [UInt8](repeating: 0, count: 2 << 20)
        #expect(try stream { ($0.format, $0.size) = ("raw", 3 << 20) } == folder.read("disk.raw") + zeros)
        #expect(try stream { ($0.format, $0.size) = ("raw", 100_000) } == data)
        for (size, expected) in [(3 << 20, try folder.read("disk.raw") + zeros), (100_352, data + zeros.prefix(352))] {
            let bytes = try stream { image in
                (image.size, image.variant, image.comment) = (UInt64(size), "stream", "of another size")
                image.options = ["adapter-type": "lsilogic"]
            }
            let image = try folder.write(bytes, to: "out-\(size).vmdk")
            let raw = folder.file("out-\(size).raw")
            try Peer.run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, raw)
            #expect(try folder.read("out-\(size).raw") == expected)
            let information = try ImageInformation.read(image)[0]
            #expect(information.metadata.comment == "of another size")
            #expect(information.properties.contains { $0.value == "lsilogic" })
        }
        let refused: [(inout NewImage) -> Void] = [
            { ($0.format, $0.size) = ("raw", 99_999) }, { ($0.format, $0.variant) = ("raw", "fixed") },
            { ($0.format, $0.blockSize) = ("raw", 4096) }, { ($0.format, $0.options) = ("raw", ["a": "b"]) },
            { $0.size = 99_840 }, { $0.variant = "fixed" }, { $0.options = ["no-such": "1"] },
            { $0.blockSize = 3000 }, { $0.format = "qcow2" }, { $0.format = "qed" }, { $0.parent = path },
        ]
        for (index, change) in refused.enumerated() {
            #expect(throws: DiskError.self, "\(index)") { try stream(change) }
        }
        try disk.close()
    }
}

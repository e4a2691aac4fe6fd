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
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// Raw files may end anywhere, and all their bytes are the disk: none is lost when they become something else.
struct OddSizeTests {
    private static let sizes = [1, 511, 513, 1000, 65_537, (1 << 20) + 1, (5 << 20) + 100]

    /// A raw file of which no byte is zero.
    private static func source(_ size: Int, _ folder: TemporaryFolder) throws -> String {
        var generator = SeededGenerator(seed: UInt64(size))
        return try folder.write((0..<size).map { _ in UInt8.random(in: 1...255, using: &generator) }, to: "odd.raw")
    }

    /// What a raw file is converted to has all of it, and zeros to the end of its last sector.
    @Test(arguments: sizes) func everyByteIsConverted(_ size: Int) throws {
        for target in ConversionTests.targets {
            let folder = try TemporaryFolder()
            let source = try Self.source(size, folder)
            let bytes = try folder.read("odd.raw")
            let new = target.image(at: folder.file(target.row.file("base")))
            var conversion = ImageConversion(from: source, to: new)
            conversion.verifies = true
            try conversion.run()
            let disk = try Disk.open(new.path, options: target.row.options(isWritable: false))
            let whole = target.row.format == "raw" ? size : (size + 511) / 512 * 512
            #expect(disk.size == UInt64(whole), "\(target)")
            let found = try disk.read(at: 0, count: whole)
            try disk.close()
            #expect(found == bytes + [UInt8](repeating: 0, count: whole - size), "\(target)")
            guard let peer = target.row.peer, target.making.variant != "esx-sparse" else { continue }
            // (QEMU rounds a raw file's size up, too.)
            try Peer.run("truncate", "-s", "\(whole)", source)
            try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", peer, source, new.path)
        }
    }

    /// In its own place, through a pipe, as a stream, and back by the size that it had.
    @Test(arguments: sizes) func otherWays(_ size: Int) throws {
        let folder = try TemporaryFolder()
        let source = try Self.source(size, folder)
        let bytes = try folder.read("odd.raw")
        let disk = try Disk.open(source)
        let stream = try FileStorage(creating: folder.file("stream"))
        try disk.writeStream(format: "raw", name: "x") { (bytes) throws(DiskError) in
            try stream.write(bytes, at: try stream.length(), for: .guestData)
        }
        #expect(try folder.read("stream") == bytes)
        try disk.close()
        var replacement = ImageReplacement(source)
        replacement.format = "qcow2"
        try replacement.run()
        var back = NewImage(path: folder.file("back.raw"))
        back.size = UInt64(size)
        try ImageConversion(from: source, to: back).run()
        #expect(try folder.read("back.raw") == bytes)
    }

    /// Images over such a file show all of it, and what is written to the end of the last sector.
    @Test(arguments: sizes) func imagesOverIt(_ size: Int) throws {
        let folder = try TemporaryFolder()
        let source = try Self.source(size, folder)
        let bytes = try folder.read("odd.raw")
        let whole = (size + 511) / 512 * 512
        func expectShown(_ disk: Disk, _ context: String) throws {
            #expect(disk.size == UInt64(whole), "\(context)")
            let before = try disk.read(at: 0, count: whole)
            #expect(before == bytes + [UInt8](repeating: 0, count: whole - size), "\(context)")
            try disk.write([77], at: UInt64(whole - 1))
            let after = try disk.read(at: 0, count: whole)
            #expect(after == before.dropLast() + [77], "\(context)")
        }
        var options = DiskOptions(isWritable: true, format: "raw")
        options.overlay = .temporary(folder: folder.path)
        let overlaid = try Disk.open(source, options: options)
        try expectShown(overlaid, "an overlay")
        try overlaid.close()
        for format in ["qcow2", "qed", "vmdk"] {
            var snapshot = ImageSnapshot(of: source, image: NewImage(path: folder.file("child.\(format)")))
            snapshot.format = "raw"
            let path = try snapshot.create()
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            try expectShown(disk, format)
            try disk.close()
        }
        #expect(try folder.read("odd.raw") == bytes)
        // Merged into it, the file gets what the child shows.
        for format in ["qed", "vmdk"] { try Peer.run("rm", folder.file("child.\(format)")) }
        _ = try ChainMerge(top: folder.file("child.qcow2")).run()
        let merged = try folder.read("odd.raw")
        let expected = bytes + [UInt8](repeating: 0, count: whole - size)
        #expect(merged == expected.dropLast() + [77])
    }

    /// Read and written in place, at its very end too.
    @Test(arguments: sizes) func readAndWritten(_ size: Int) throws {
        let folder = try TemporaryFolder()
        let source = try Self.source(size, folder)
        var bytes = try folder.read("odd.raw")
        let disk = try Disk.open(source, options: DiskOptions(isWritable: true, format: "raw"))
        #expect(disk.size == UInt64(size))
        let start = max(0, size - 700)
        try disk.write([UInt8](repeating: 9, count: size - start), at: UInt64(start))
        bytes.replaceSubrange(start..., with: [UInt8](repeating: 9, count: size - start))
        try disk.discard(offset: UInt64(size - 1), length: 1)
        bytes[size - 1] = 0
        #expect(throws: DiskError.self) { try disk.write([1], at: UInt64(size)) }
        #expect(try disk.read(at: 0, count: size) == bytes)
        try disk.close()
        #expect(try folder.read("odd.raw") == bytes)
        let check = try ImageCheck.run(source)
        #expect(check.findings.map(\.severity) == [.note])
    }
}

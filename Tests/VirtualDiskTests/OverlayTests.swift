import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// A scratch overlay makes any disk writable and leaves its images alone. What holds for every writable image is tested
/// with the others (conformance, power cuts, failing storage); here is what is its own.
struct OverlayTests {
    private static let size = 3 << 20 + 512

    private func makeBase(_ folder: TemporaryFolder, _ name: String = "base.vmdk") throws -> String {
        var base = NewImage(path: folder.file(name))
        base.size = UInt64(Self.size)
        try base.create()
        let disk = try Disk.open(
            base.path, options: DiskOptions(isWritable: true, format: base.path.hasSuffix("raw") ? "raw" : nil))
        try disk.write([UInt8](repeating: 7, count: 1 << 20), at: 512)
        try disk.close()
        return base.path
    }

    private func open(_ path: String, _ overlay: DiskOverlay?) throws -> Disk {
        var options = DiskOptions()
        options.overlay = overlay
        return try Disk.open(path, options: options)
    }

    @Test(arguments: ["base.vmdk", "base.raw"]) func writesGoToAFileThatIsGone(_ name: String) throws {
        let folder = try TemporaryFolder()
        let base = try makeBase(folder, name)
        let before = try folder.read(name)
        let disk = try open(base, .temporary(folder: folder.path))
        try disk.write([UInt8](repeating: 9, count: 70_000), at: 1000)
        try disk.discard(offset: 1 << 19, length: 1 << 18)
        try disk.flush()
        #expect(try disk.read(at: 999, count: 70_002) == [7] + [UInt8](repeating: 9, count: 70_000) + [7])
        #expect(try disk.read(at: 1 << 19, count: 1 << 18).allSatisfy { $0 == 0 })
        try disk.close()
        #expect(try folder.read(name) == before)
        #expect(try Peer.run("ls", "-A", folder.path) == name + "\n")
    }

    @Test(arguments: ["base.vmdk", "base.raw"]) func aFileIsKeptAndUsedAgain(_ name: String) throws {
        let folder = try TemporaryFolder()
        let base = try makeBase(folder, name)
        let before = try folder.read(name)
        let overlay = DiskOverlay.file(folder.file("kept"))
        for round in 1...3 as ClosedRange<UInt8> {
            let disk = try open(base, overlay)
            if round > 1 {
                #expect(
                    try disk.read(at: UInt64(round - 1) << 18, count: 5000)
                        == [UInt8](repeating: round - 1, count: 5000))
            }
            try disk.write([UInt8](repeating: round, count: 5000), at: UInt64(round) << 18)
            try disk.close()
        }
        #expect(try folder.read(name) == before)
        // It says what it is, and opens by itself: the image below lies beside it.
        let information = try ImageInformation.read(folder.file("kept"), wholeChain: true)
        #expect(information.map(\.format) == ["overlay", name == "base.raw" ? "raw" : "vmdk"])
        let disk = try Disk.open(folder.file("kept"))
        #expect(try disk.read(at: 3 << 18, count: 1) == [3] && disk.read(at: 512, count: 1) == [7])
        try disk.close()
    }

    @Test func belongsToOneImage() throws {
        let folder = try TemporaryFolder()
        let base = try makeBase(folder)
        let raw = try makeBase(folder, "base.raw")
        try open(base, .file(folder.file("of-vmdk"))).close()
        try open(raw, .file(folder.file("of-raw"))).close()
        #expect(throws: DiskError.self) { try open(raw, .file(folder.file("of-vmdk"))) }
        #expect(throws: DiskError.self) { try open(base, .file(folder.file("of-raw"))) }
        // The images are changed behind the overlays' backs.
        for (path, kept) in [(base, "of-vmdk"), (raw, "of-raw")] {
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true, format: path == raw ? "raw" : nil))
            try disk.write([1], at: 0)
            try disk.close()
            #expect { try open(path, .file(folder.file(kept))) } throws: { error in
                "\(error)".contains("was changed since")
            }
        }
    }

    @Test func anotherFileIsNotTouched() throws {
        let folder = try TemporaryFolder()
        let base = try makeBase(folder)
        for bytes in [[], [UInt8](repeating: 3, count: 5000), try folder.read("base.vmdk")] {
            let path = folder.file("other")
            try replace(path, bytes)
            #expect { try open(base, .file(path)) } throws: { "\($0)".contains("is no overlay") }
            #expect(try folder.read("other") == bytes)
        }
        // One that cannot come about leaves nothing.
        #expect(throws: DiskError.self) { try open(base, .file(folder.file("none/overlay"))) }
        #expect(throws: DiskError.self) { try open(base, .temporary(folder: folder.file("none"))) }
        #expect(try Peer.run("ls", "-A", folder.path) == "base.vmdk\nother\n")
    }

    /// Each byte of the header set to anything, entries to anything, the file cut anywhere: an error or a disk.
    @Test func hostileBytes() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let base = try makeBase(folder)
        let path = folder.file("kept")
        let disk = try open(base, .file(path))
        try disk.write([UInt8](repeating: 9, count: 300_000), at: 1 << 20)
        try disk.close()
        let good = try folder.read("kept")
        for round in 0..<600 {
            var bytes = good
            switch round % 3 {
            case 0:
                // With a right checksum, so that the fields are looked at.
                bytes[16 + round / 3 % 120] =
                    [0, 1, 0x7f, 0x80, 0xff, .random(in: 0...255, using: &generator)].randomElement(using: &generator)
                    ?? 0
                let sum = crc32(bytes[..<4092])
                for index in 0..<4 { bytes[4092 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(index * 8)) }
            case 1:
                for _ in 0..<20 {
                    bytes[4096 + Int.random(in: 0..<200, using: &generator)] = .random(in: 0...255, using: &generator)
                }
            default: bytes.removeLast(Int.random(in: 1...bytes.count, using: &generator))
            }
            try replace(path, bytes)
            do {
                let disk = try open(base, .file(path))
                _ = try? disk.read(at: 0, count: Int(min(disk.size, 4 << 20)))
                try? disk.write([UInt8](repeating: 1, count: 200_000), at: 5000)
                try? disk.discard(offset: 0, length: min(disk.size, 2 << 20))
                try? disk.close()
            } catch is DiskError {}
            _ = try? ImageCheck.run(path)
            _ = try? ImageCheck.run(path, repair: true)
            _ = try? ImageInformation.read(path)
        }
    }

    @Test func checkFindsAndRepairs() throws {
        let folder = try TemporaryFolder()
        let base = try makeBase(folder)
        let path = folder.file("kept")
        let disk = try open(base, .file(path))
        try disk.write([UInt8](repeating: 9, count: 300_000), at: 1 << 20)
        try disk.close()
        #expect(try ImageCheck.run(path).remaining(.loss) == 0)
        var bytes = try folder.read("kept")
        // Block 16 where block 17 lies, block 18 outside the file.
        bytes.replaceSubrange(4096 + 64..<4096 + 68, with: bytes[4096 + 68..<4096 + 72])
        bytes.replaceSubrange(4096 + 72..<4096 + 76, with: [0xff, 0xff, 0xff, 0xff])
        try replace(path, bytes)
        #expect(try ImageCheck.run(path).remaining(.loss) == 2)
        #expect(try ImageCheck.run(path, repair: true).remaining(.loss) == 0)
        #expect(try ImageCheck.run(path).remaining(.loss) == 0)
    }

    private func replace(_ path: String, _ bytes: [UInt8]) throws {
        unsafe unlink(path)
        try FileStorage(creating: path).write(bytes, at: 0, for: .guestData)
    }

    /// CRC-32, bit by bit.
    private func crc32(_ bytes: ArraySlice<UInt8>) -> UInt32 {
        var sum = UInt32.max
        for byte in bytes {
            sum ^= UInt32(byte)
            for _ in 0..<8 { sum = sum & 1 == 0 ? sum >> 1 : (sum >> 1) ^ 0xedb8_8320 }
        }
        return ~sum
    }
}

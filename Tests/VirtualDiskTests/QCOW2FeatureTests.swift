import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Feature bits, header extensions and names that QCOW2 images have, and what follows from them.
struct QCOW2FeatureTests {
    private static func header(_ path: String, _ offset: UInt64, _ count: Int = 8) throws -> [UInt8] {
        try FileStorage(path: path, isWritable: false).bytes(at: offset, count: count, for: .header, "the header")
    }

    private static func poke(_ bytes: [UInt8], at offset: UInt64, _ path: String) throws {
        try FileStorage(path: path, isWritable: true).write(bytes, at: offset, for: .header)
    }

    private static func make(_ folder: TemporaryFolder, _ options: String = "compat=1.1") throws -> String {
        let path = folder.file("disk.qcow2")
        try QCOW2PeerTests.create(path, "4M", options)
        try QCOW2PeerTests.io(path, "write -P 1 0 1M")
        return path
    }

    // MARK: - Incompatible features

    /// An image whose writer was killed with refcounts that were put off: read as it is, repaired when it is written.
    @Test func lazyRefcountsAreMadeAnew() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try QCOW2PeerTests.create(path, "4M", "lazy_refcounts=on")
        try QCOW2PeerTests.io(path, "write -P 1 0 1M")
        _ = try Subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", "-c", "flush", "-c", "abort", path])
        #expect(try Self.header(path, 72)[7] & 1 == 1, "the dirty bit is set")
        #expect(try QCOW2PeerTests.verdict(path) == 2)
        let before = try folder.read("disk.qcow2")
        let reader = try QCOW2PeerTests.open(path, isWritable: false)
        #expect(try reader.read(at: 1 << 20, count: 1 << 20) == QCOW2PeerTests.pattern(2, 1 << 20))
        try reader.close()
        #expect(try folder.read("disk.qcow2") == before)
        let disk = try QCOW2PeerTests.open(path)
        #expect(try Self.header(path, 72)[7] & 1 == 0, "the dirty bit is cleared")
        try disk.write(QCOW2PeerTests.pattern(3, 1 << 20), at: 2 << 20)
        #expect(
            try disk.read(at: 0, count: 2 << 20)
                == QCOW2PeerTests.pattern(1, 1 << 20) + QCOW2PeerTests.pattern(2, 1 << 20))
        try disk.close()
        try QCOW2PeerTests.expectSound(path)
    }

    @Test func corruptImageIsOnlyRead() throws {
        let folder = try TemporaryFolder()
        let path = try Self.make(folder)
        try Self.poke([0, 0, 0, 0, 0, 0, 0, 2], at: 72, path)
        let disk = try QCOW2PeerTests.open(path, isWritable: false)
        #expect(try disk.read(at: 0, count: 100) == QCOW2PeerTests.pattern(1, 100))
        try disk.close()
        #expect { try QCOW2PeerTests.open(path) } throws: { ($0 as? DiskError)?.kind == .needsRepair }
        let report = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.remaining(.loss) == 0)
        try QCOW2PeerTests.open(path).close()
        try QCOW2PeerTests.io(path, "read -P 1 0 1M", "write 0 1M")
    }

    @Test func unknownFeatureIsNamed() throws {
        let folder = try TemporaryFolder()
        let path = try Self.make(folder)
        try Self.poke([0, 0, 0, 0, 0, 0, 1, 0], at: 72, path)
        #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: { error in
            (error as? DiskError)?.kind == .unsupported && "\(error)".contains("number 8")
        }
        // The name of bit 0 in the feature name table becomes that of bit 8.
        var bytes = try folder.read("disk.qcow2")
        let name = Array("dirty bit".utf8)
        let place = try #require((0..<4096).first { bytes.slice($0, name.count) == name })
        bytes[place - 1] = 8
        try Self.poke([8], at: UInt64(place - 1), path)
        #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: { "\($0)".contains("'dirty bit'") }
    }

    @Test func encryptedImageIsRefused() throws {
        let folder = try TemporaryFolder()
        // QEMU's own LUKS images need a measured key derivation, which a loaded machine refuses; AES ones do not.
        let aes = folder.file("aes.qcow2")
        try Peer.run(
            "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o",
            "encrypt.format=aes,encrypt.key-secret=s", aes, "1M")
        let luks = try Self.make(folder)
        try Self.poke([0, 0, 0, 2], at: 32, luks)
        for (path, method) in [(aes, "AES"), (luks, "LUKS")] {
            #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: { error in
                (error as? DiskError)?.kind == .unsupported && "\(error)".contains(method)
            }
        }
    }

    // MARK: - Autoclear features

    /// Bitmaps are not kept up: before the first change they are marked as such; without one, nothing is touched.
    @Test func bitmapsAreMarkedAsInconsistent() throws {
        let folder = try TemporaryFolder()
        let path = try Self.make(folder)
        try Peer.run("qemu-img", "bitmap", "--add", path, "changes")
        #expect(try Self.header(path, 88)[7] == 1)
        #expect(try ImageCheck.run(path).findings.isEmpty)
        let before = try folder.read("disk.qcow2")
        try QCOW2PeerTests.open(path).close()
        #expect(try folder.read("disk.qcow2") == before)
        let disk = try QCOW2PeerTests.open(path)
        try disk.write([1], at: 3 << 20)
        #expect(try Self.header(path, 88)[7] == 0, "before the change is on the disk")
        try disk.close()
        #expect([0, 3].contains(try QCOW2PeerTests.verdict(path)))
        #expect(try !Peer.run("qemu-img", "info", path).contains("changes"))
        _ = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        try QCOW2PeerTests.expectSound(path)
    }

    @Test func unknownAutoclearBitsAreCleared() throws {
        let folder = try TemporaryFolder()
        let path = try Self.make(folder)
        try Self.poke([0x80, 0, 0, 0, 0, 0, 0, 0x10], at: 88, path)
        let disk = try QCOW2PeerTests.open(path)
        #expect(try Self.header(path, 88)[0] == 0x80)
        try disk.discard(offset: 0, length: 65_536)
        #expect(try Self.header(path, 88) == [UInt8](repeating: 0, count: 8))
        try disk.close()
    }

    // MARK: - External data files

    /// A raw data file is the disk also without the image, whatever is written and discarded.
    @Test func rawDataFileIsTheDisk() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.qcow2"))
        new.size = 2 << 20
        new.options = ["data-file": "disk.data", "data-file-raw": "on"]
        try new.create()
        var model = DiskModel(size: 2 << 20)
        let disk = try QCOW2PeerTests.open(new.path)
        var generator = SeededGenerator(seed: 2)
        for round in 0..<40 {
            let start = Int.random(in: 0..<model.size, using: &generator)
            let count = min(model.size - start, 150_000)
            if round % 3 == 2 {
                try disk.discard(offset: UInt64(start), length: UInt64(count))
                model.zero(start..<start + count)
            } else {
                let data = QCOW2PeerTests.pool.bytes(count, using: &generator)
                try disk.write(data, at: UInt64(start))
                model.write(data, at: start)
            }
        }
        try disk.close()
        #expect(model.mistake(in: try folder.read("disk.data"), at: 0) == nil)
        try QCOW2PeerTests.expectSound(new.path)
        #expect(try Peer.run("qemu-img", "info", new.path).contains("data file raw: true"))
    }

    /// A data file is opened like anything else that an image names: from the image's folder alone.
    @Test func dataFileElsewhereIsRefused() throws {
        let folder = try TemporaryFolder()
        let other = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try QCOW2PeerTests.create(path, "1M", "data_file=\(other.file("disk.data"))")
        #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: { error in
            (error as? DiskError)?.kind == .refused && "\(error)".contains("--allow-dir")
        }
        let disk = try Disk.open(path, options: DiskOptions(allowedFolders: [other.path]))
        #expect(disk.size == 1 << 20)
        try disk.close()
        #expect(try ImageInformation.read(path, options: DiskOptions(allowedFolders: [other.path]))[0].files.count == 2)
    }

    // MARK: - Backing files

    @Test(arguments: [
        "json:{\"driver\":\"raw\",\"file\":{\"filename\":\"/etc/passwd\"}}", "nbd:localhost:10809",
        "http://example.com/disk", "ssh:host/disk", "nbd+unix:///x?socket=y",
    ])
    func backingFileThatIsNoFileIsRefused(_ name: String) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try Peer.run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
        #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: { error in
            (error as? DiskError)?.kind == .unsupported && "\(error)".contains("backing file")
        }
        #expect(try ImageInformation.read(path)[0].properties.contains { $0.value == name })
    }

    /// Names are relative to the folder of the image; `file:` is no more than a word in front; a colon is no protocol
    /// where a slash comes first.
    @Test func backingNamesLeadToFiles() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try folder.write(QCOW2PeerTests.pattern(5, 1 << 20), to: "base:one.img")
        for name in ["./base:one.img", "file:base:one.img", folder.file("base:one.img")] {
            try Peer.run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
            let disk = try QCOW2PeerTests.open(path, isWritable: false)
            #expect(try disk.read(at: 1000, count: 10) == QCOW2PeerTests.pattern(5, 10), "\(name)")
            try disk.close()
        }
        // And what we make over such a file, QEMU finds.
        var new = NewImage(path: folder.file("child.qcow2"))
        new.parent = folder.file("base:one.img")
        new.parentFormat = "raw"
        try new.create()
        try QCOW2PeerTests.io(new.path, "read -P 5 0 1M")
    }

    /// A backing file whose format is recorded as raw is raw, whatever a guest has written to its beginning.
    @Test func recordedRawFormatIsNotProbed() throws {
        let folder = try TemporaryFolder()
        try folder.write([UInt8]("root".utf8), to: "secret")
        let trap = folder.file("trap.raw")
        try Peer.run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "secret", "-F", "raw", trap, "1M")
        let path = folder.file("disk.qcow2")
        try Peer.run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "trap.raw", "-F", "raw", path, "64k")
        let disk = try QCOW2PeerTests.open(path, isWritable: false)
        #expect(disk.layers.map(\.format) == ["qcow2", "raw"])
        #expect(try disk.read(at: 0, count: 4) == [0x51, 0x46, 0x49, 0xfb])
        try disk.close()
    }

    @Test func unknownBackingFormatIsSaid() throws {
        let folder = try TemporaryFolder()
        try folder.write(QCOW2PeerTests.pattern(5, 65_536), to: "base.img")
        let path = folder.file("disk.qcow2")
        try Peer.run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "base.img", "-F", "bochs", path, "64k")
        #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: { "\($0)".contains("bochs") }
    }
}

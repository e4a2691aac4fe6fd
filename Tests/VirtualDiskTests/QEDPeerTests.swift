import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// QED beside QEMU, which defines it: the cases of its own tests, and images that either program made, or left behind
/// when it was killed, in the hands of the other.
struct QEDPeerTests {
    private static let size = (9 << 20) + 512

    private static func create(_ path: String, _ size: Int = size, _ options: String = "cluster_size=4096") throws {
        try Peer.run("qemu-img", "create", "-q", "-f", "qed", "-o", options, path, "\(size)")
    }

    private static func io(_ path: String, _ commands: String...) throws {
        var words = ["qemu-io", "-f", "qed"]
        for command in commands { words += ["-c", command] }
        let result = try Subprocess.run(words + [path])
        guard result.status == 0, !result.outputText.contains("failed") else {
            throw DiskError(.system, "\(words): \(result.outputText)\(result.errorText)")
        }
    }

    /// The bits of the header's field at `offset`.
    private static func bits(_ path: String, at offset: UInt64) throws -> UInt64 {
        let file = try FileStorage(path: path, isWritable: false)
        return try FieldReader(file.bytes(at: offset, count: 8, for: .header, "bits")).littleEndian(at: 0)
    }

    private static func set(_ path: String, _ bytes: [UInt8], at offset: UInt64) throws {
        try FileStorage(path: path, isWritable: true).write(bytes, at: offset, for: .header)
    }

    private static func open(_ path: String, isWritable: Bool = false) throws -> Disk {
        var options = DiskOptions(isWritable: isWritable)
        options.lazyFlushInterval = 0
        return try Disk.open(path, options: options)
    }

    // MARK: - QEMU's own cases (iotest 116)

    @Test(
        arguments: [
            ("magic", 0, Array("QEDX".utf8)), ("cluster size", 4, [255, 255, 255, 255]),
            ("table size", 8, [255, 255, 255, 255]), ("header size", 12, [255, 255, 255, 255]),
            ("L1 table offset", 40, [255, 255, 255, 255, 255, 255, 255, 255]),
            ("image size", 48, [255, 255, 255, 255, 255, 255, 255, 255]),
        ] as [(String, UInt64, [UInt8])])
    func absurdFieldIsRefused(_ name: String, _ offset: UInt64, _ bytes: [UInt8]) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        try Self.create(path, 128 << 20, "cluster_size=65536")
        try Self.set(path, bytes, at: offset)
        // Without its magic nothing says what it is: to be read, if anything, as the raw file that the user named.
        if name == "magic" {
            #expect { try Self.open(path, isWritable: true) } throws: { ($0 as? DiskError)?.kind == .unknownFormat }
        } else {
            for isWritable in [false, true] {
                #expect { try Self.open(path, isWritable: isWritable) } throws: {
                    ($0 as? DiskError)?.kind == .invalidImage
                }
            }
        }
        #expect(throws: DiskError.self) { try Disk.open(path, options: DiskOptions(format: "qed")) }
    }

    @Test func truncatedHeaderIsRefused() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        try Self.create(path, 128 << 20, "cluster_size=65536")
        for length in [32 << 10, 512, 63, 4] as [UInt64] {
            try FileStorage(path: path, isWritable: true).setLength(length)
            #expect { try Self.open(path) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        }
    }

    /// A file that ends before its L1 table does is described, and refused.
    @Test func lostL1TableIsDescribed() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        try Self.create(path, 128 << 20, "cluster_size=65536")
        try FileStorage(path: path, isWritable: true).setLength(200 << 10)
        #expect { try Self.open(path) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        let image = try #require(try ImageInformation.read(path).first)
        #expect(image.virtualSize == 128 << 20)
        #expect(image.properties.contains { $0.key == "damage" && $0.value.contains("L1 table") })
        for repair in [false, true] { #expect(try ImageCheck.run(path, repair: repair).remaining(.loss) == 1) }
        #expect(try FileStorage(path: path, isWritable: false).length() == 200 << 10)
    }

    /// What follows the last whole cluster is kept, and nothing is put there; where an entry leads there, the image is
    /// not written to before it was repaired.
    @Test func bytesBehindTheLastClusterAreKept() throws {
        let folder = try TemporaryFolder()
        var builder = QEDBuilder(imageSize: 1 << 20, clusterCount: 5)
        builder.l1 = [0: 2]
        builder.l2 = [2: [0: 3 * 4096]]
        builder.data = [3: 0x33, 4: 0x44]
        let path = try folder.write(builder.encode(), to: "disk.qed")
        try FileStorage(path: path, isWritable: true).setLength(4 * 4096 + 700)
        let disk = try Self.open(path, isWritable: true)
        try disk.write([9], at: 8192)
        #expect(try disk.read(at: 0, count: 2) == [0x33, 0x33])
        try disk.close()
        let after = try folder.read("disk.qed")
        #expect(after.count == 6 * 4096)
        #expect(after.slice(4 * 4096, 700) == [UInt8](repeating: 0x44, count: 700))
        try Peer.run("rm", path)

        builder.l2[2]?[1] = 4 * 4096
        try folder.write(builder.encode(), to: "disk.qed")
        try FileStorage(path: path, isWritable: true).setLength(4 * 4096 + 700)
        #expect { try Self.open(path, isWritable: true) } throws: { ($0 as? DiskError)?.kind == .needsRepair }
        let reader = try Self.open(path)
        #expect { try reader.read(at: 4096, count: 1) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        try reader.close()
        #expect(try ImageCheck.run(path, repair: true).remaining(.loss) == 0)
        try Self.open(path, isWritable: true).close()
    }

    // MARK: - All geometries

    /// QEMU writes, we read, write and discard, QEMU checks and compares: with every cluster and table size.
    /// (QEMU refuses tables of one cluster, also those that it makes.)
    @Test(arguments: [4 << 10, 16 << 10, 64 << 10, 1 << 20, 64 << 20] as [UInt64], [1, 2, 4, 8, 16])
    func everyGeometryIsSharedWithQEMU(_ cluster: UInt64, _ table: Int) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        // Above 2^31 bytes of tables, QEMU wants more memory than tests should take.
        let isPeer = table > 1 && cluster < 64 << 20
        if isPeer {
            try Self.create(path, Self.size, "cluster_size=\(cluster),table_size=\(table)")
            try Self.io(path, "write -P 7 5000 70000", "write -P 8 \(Self.size - 512) 512", "write -z 2M 2M")
        } else {
            var image = NewImage(path: path)
            image.size = UInt64(Self.size)
            image.blockSize = cluster
            image.options = ["table-size": "\(table)"]
            try image.create()
            let disk = try Self.open(path, isWritable: true)
            try disk.write([UInt8](repeating: 7, count: 70_000), at: 5000)
            try disk.write([UInt8](repeating: 8, count: 512), at: UInt64(Self.size - 512))
            try disk.close()
        }
        var model = DiskModel(size: Self.size)
        model.write([UInt8](repeating: 7, count: 70_000), at: 5000)
        model.write([UInt8](repeating: 8, count: 512), at: Self.size - 512)
        var disk = try Self.open(path, isWritable: true)
        #expect(try model.mistake(of: disk, in: 0..<Self.size) == nil)
        let data = [UInt8](repeating: 9, count: 300_001)
        for offset in [3, 3 << 20, (8 << 20) - 100] {
            try disk.write(data, at: UInt64(offset))
            model.write(data, at: offset)
        }
        try disk.discard(offset: 3 << 20, length: 200_000)
        model.zero(3 << 20..<(3 << 20) + 200_000)
        try disk.close()
        disk = try Self.open(path)
        #expect(try model.mistake(of: disk, in: 0..<Self.size) == nil)
        try disk.close()
        let report = try ImageCheck.run(path)
        #expect(report.counts.isEmpty, "\(report.findings)")
        guard isPeer else { return }
        try Peer.run("qemu-img", "check", "-q", "-f", "qed", path)
        let raw = try folder.write(model.bytes, to: "model.raw")
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qed", raw, path)
    }

    /// A file made by us and one made by QEMU, with the same choices, are the same bytes.
    @Test(arguments: [false, true]) func newImageIsTheSameAsQEMUs(_ hasParent: Bool) throws {
        let folder = try TemporaryFolder()
        try folder.write([UInt8](repeating: 1, count: 1 << 20), to: "base.raw")
        var image = NewImage(path: folder.file("ours.qed"))
        image.size = 1 << 20
        image.blockSize = 16 << 10
        image.options = ["table-size": "8"]
        if hasParent { (image.parent, image.parentFormat) = (folder.file("base.raw"), "raw") }
        try image.create()
        let parent = hasParent ? ["-b", "base.raw", "-F", "raw"] : []
        let command =
            ["qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=16384,table_size=8"] + parent
            + [folder.file("theirs.qed"), "1M"]
        let result = try Subprocess.run(command)
        #expect(result.status == 0, "\(result.errorText)")
        #expect(try folder.read("ours.qed") == folder.read("theirs.qed"))
    }

    /// The largest disk that usual tables reach, by either program; written at its end by one, read there by the other.
    @Test func sixtyFourTebibytes() throws {
        let folder = try TemporaryFolder()
        let end: UInt64 = 64 << 40
        for path in [folder.file("theirs.qed"), folder.file("ours.qed")] {
            if path.hasSuffix("theirs.qed") {
                try Peer.run("qemu-img", "create", "-q", "-f", "qed", path, "64T")
            } else {
                var image = NewImage(path: path)
                image.size = end
                try image.create()
            }
            try Self.io(path, "write -P 7 \(end - 512) 512", "write -P 8 32T 512")
            let disk = try Self.open(path, isWritable: true)
            #expect(disk.size == end)
            #expect(
                try disk.read(at: end - 1024, count: 1024) == [UInt8](repeating: 0, count: 512)
                    + [UInt8](repeating: 7, count: 512))
            #expect(try disk.nextData(from: 0) == 32 << 40)
            #expect(try disk.nextHole(from: 32 << 40) == (32 << 40) + 65_536)
            #expect(try disk.nextData(from: (32 << 40) + 65_536) == end - 65_536)
            try disk.write([9, 9], at: 10 << 40)
            try disk.close()
            try Self.io(path, "read -P 7 \(end - 512) 512", "read -P 0 \((10 << 40) + 512) 512", "read -P 8 32T 512")
            try Peer.run("qemu-img", "check", "-q", "-f", "qed", path)
            #expect(try FileStorage(path: path, isWritable: false).allocatedBytes() < 4 << 20)
        }
    }

    // MARK: - Zero clusters and backing files

    @Test func zeroClustersMaskTheBackingFileForBoth() throws {
        let folder = try TemporaryFolder()
        let base = try folder.write([UInt8](repeating: 5, count: 1 << 20), to: "base.raw")
        var image = NewImage(path: folder.file("top.qed"))
        (image.parent, image.parentFormat, image.blockSize) = (base, "raw", 4096)
        try image.create()
        let disk = try Self.open(image.path, isWritable: true)
        try disk.discard(offset: 8192, length: 400_000)
        try disk.close()
        try Self.io(image.path, "read -P 5 0 8192", "read -P 0 8192 400000", "read -P 5 408192 512", "write -z 900k 8k")
        let again = try Self.open(image.path)
        #expect(try again.read(at: 900 << 10, count: 8192) == [UInt8](repeating: 0, count: 8192))
        #expect(try again.read(at: 908 << 10, count: 512) == [UInt8](repeating: 5, count: 512))
        try again.close()
        // Zero clusters take no space: header, L1 table, one L2 table and the clusters at the range's edges.
        #expect(try FileStorage(path: image.path, isWritable: false).length() <= (1 + 4 + 4 + 2) * 4096)
        try Peer.run("qemu-img", "check", "-q", "-f", "qed", image.path)
    }

    /// A discarded cluster keeps its place, so that nothing leaks, and gives its space back.
    @Test func discardLeaksNothingAndGivesSpaceBack() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.qed"))
        image.size = 64 << 20
        try image.create()
        let disk = try Self.open(image.path, isWritable: true)
        try disk.write([UInt8](repeating: 3, count: 32 << 20), at: 0)
        try disk.flush()
        let full = try disk.allocatedBytes()
        try disk.discard(offset: 0, length: 64 << 20)
        try disk.flush()
        #expect(try disk.allocatedBytes() < full - (30 << 20))
        #expect(try disk.nextData(from: 0) == nil)
        let length = try FileStorage(path: image.path, isWritable: false).length()
        try disk.write([UInt8](repeating: 4, count: 32 << 20), at: 0)
        try disk.close()
        #expect(try FileStorage(path: image.path, isWritable: false).length() == length)
        #expect(try ImageCheck.run(image.path).counts.isEmpty)
        try Peer.run("qemu-img", "check", "-q", "-f", "qed", image.path)
    }

    /// The no-probe bit: what a guest has written into a raw base is never taken for a format.
    @Test func rawBaseThatLooksLikeAFormatIsNotProbed() throws {
        let folder = try TemporaryFolder()
        let secret = try folder.write(Array("secret".utf8) + [UInt8](repeating: 0, count: 1 << 20), to: "secret.raw")
        var trap = NewImage(path: folder.file("base.raw"))
        (trap.format, trap.parent, trap.parentFormat) = ("qed", secret, "raw")
        try trap.create()
        let content = try folder.read("base.raw")
        for path in ["ours.qed", "theirs.qed"] {
            if path == "ours.qed" {
                var image = NewImage(path: folder.file(path))
                (image.parent, image.parentFormat) = (trap.path, "raw")
                try image.create()
            } else {
                try Peer.run(
                    "qemu-img", "create", "-q", "-f", "qed", "-b", "base.raw", "-F", "raw", folder.file(path))
            }
            let disk = try Self.open(folder.file(path))
            #expect(disk.layers.map(\.format) == ["qed", "raw"])
            #expect(try disk.read(at: 0, count: content.count & ~511) == content.prefixArray(content.count & ~511))
            try disk.close()
            #expect(try Self.bits(folder.file(path), at: 16) == 5)
        }
    }

    /// Without the bit the format is probed. What no format recognises is taken as raw only if it is called so.
    @Test func probedBackingFile() throws {
        let folder = try TemporaryFolder()
        try folder.write([UInt8](repeating: 5, count: 8192), to: "base.raw")
        try folder.write([UInt8](repeating: 5, count: 8192), to: "base.unknown")
        try Peer.run("qemu-img", "create", "-q", "-f", "vmdk", folder.file("base.vmdk"), "1M")
        for (base, isOpened) in [("base.raw", true), ("base.unknown", false), ("base.vmdk", true)] {
            let path = folder.file("top-\(base).qed")
            var builder = QEDBuilder(imageSize: 1 << 20, clusterCount: 2)
            (builder.features, builder.backingFilename) = (1, base)
            try folder.write(builder.encode(), to: "top-\(base).qed")
            if isOpened {
                let disk = try Self.open(path)
                #expect(try disk.read(at: 0, count: 1)[0] == (base == "base.raw" ? 5 : 0))
                try disk.close()
            } else {
                #expect { try Self.open(path) } throws: { ($0 as? DiskError)?.kind == .unknownFormat }
            }
        }
    }

    /// Each relative name counts from the folder of the image that holds it.
    @Test func relativeNamesCountFromTheImageThatHoldsThem() throws {
        let folder = try TemporaryFolder()
        try Peer.run("mkdir", "-p", folder.file("a/b"))
        let base = folder.file("a/b/base.qed")
        try Self.create(base)
        try Self.io(base, "write -P 6 0 64k")
        let command = ["qemu-img", "create", "-q", "-f", "qed", "-F", "qed", "-b"]
        for (name, path) in [("b/base.qed", "a/middle.qed"), ("a/middle.qed", "top.qed")] {
            #expect(try Subprocess.run(command + [name, folder.file(path)]).status == 0)
        }
        let disk = try Self.open(folder.file("top.qed"))
        #expect(disk.layers.count == 3)
        #expect(try disk.read(at: 100, count: 3) == [6, 6, 6])
        try disk.close()
    }

    /// What QEMU would take for a protocol is named so that it does not.
    @Test func colonsInNames() throws {
        for name in ["host:base.qed", "json:{}.qed", "file:x.qed"] {
            let folder = try TemporaryFolder()
            let base = folder.file(name)
            try Self.create(folder.file("plain.qed"))
            try Self.io(folder.file("plain.qed"), "write -P 6 0 64k")
            try Peer.run("mv", folder.file("plain.qed"), base)
            var child = NewImage(path: folder.file("child.qed"))
            child.parent = base
            try child.create()
            try Self.io(child.path, "read -P 6 0 64k")
            // And where the name is changed.
            try Peer.run("mv", base, folder.file("x-\(name)"))
            var rebase = ChainRebase(child.path, parent: folder.file("x-\(name)"))
            rebase.isUnsafe = true
            try rebase.run()
            try Self.io(child.path, "read -P 6 0 64k")
        }
    }

    // MARK: - Bits of features

    @Test func unknownBitsAreHandledAsTheirKindSays() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        try Self.create(path)
        let compat: [UInt8] = [1, 2, 3, 4, 5, 6, 7, 8]
        try Self.set(path, compat, at: 24)
        try Self.set(path, [0, 0, 0, 0, 0, 0, 0, 0x80], at: 32)
        // Opening, for reading or writing, changes nothing; the first write clears what is not known.
        for isWritable in [false, true] {
            let before = try folder.read("disk.qed")
            try Self.open(path, isWritable: isWritable).close()
            #expect(try folder.read("disk.qed") == before)
        }
        let disk = try Self.open(path, isWritable: true)
        try disk.write([1], at: 0)
        #expect(try Self.bits(path, at: 32) == 0)
        #expect(try Self.bits(path, at: 24) == 0x0807_0605_0403_0201)
        try disk.close()
        try Self.set(path, [8], at: 16)
        for mode in [false, true] {
            #expect { try Self.open(path, isWritable: mode) } throws: { ($0 as? DiskError)?.kind == .unsupported }
        }
    }

    /// The bits change on stable storage before anything else does, and last.
    @Test func bitsAreDurableBeforeWhatTheyAnnounce() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        try Self.create(path, Self.size, "cluster_size=4096")
        try Self.set(path, [1], at: 32)
        let log = CrashLog()
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { log.record($0) }
        let disk = try Disk.open(path, options: options)
        #expect(log.count == 0, "opening wrote")
        try disk.write([1], at: 0)
        let afterWrite = log.count
        try disk.flush()
        let afterFlush = log.count
        try disk.close()
        var generator = SeededGenerator(seed: 1)
        var replay = log.replay()
        var entriesWereThere = false
        for cut in 0...log.count {
            let bytes = try #require(replay.files(at: cut, .none, using: &generator)[path])
            let hasBit = bytes.number(at: 16, width: 8) & 2 != 0
            let hasEntry = bytes.number(at: 4096, width: 8) != 0
            entriesWereThere = entriesWereThere || hasEntry
            if hasEntry {
                #expect(bytes.number(at: 32, width: 8) == 0, "cut \(cut)")
                #expect(hasBit || cut == log.count, "cut \(cut) of \(log.count)")
            }
            if cut == afterFlush { #expect(hasEntry && hasBit) }
            if cut == afterWrite { #expect(!hasEntry && hasBit) }
        }
        #expect(entriesWereThere)
        #expect(try Self.bits(path, at: 16) == 0)
    }

    // MARK: - Images that were not closed

    /// Entries that lead out of the file, and two for one cluster, as a killed writer may leave them.
    private static func unclean(_ folder: TemporaryFolder) throws -> (path: String, model: DiskModel) {
        var builder = QEDBuilder(imageSize: 5 << 20, clusterCount: 14)
        builder.tableSize = 2
        builder.features = 2
        builder.l1 = [0: 3, 1: 40]
        // Cluster 0 is whole, 1 lies outside, 2 shares its place with 0, 3 is zeros, 4 was put into a table.
        builder.l2 = [3: [0: 5 * 4096, 1: 30 * 4096, 2: 5 * 4096, 3: 1, 4: 4096, 1023: 6 * 4096]]
        for cluster in 5..<14 as Range<UInt64> { builder.data[cluster] = UInt8(cluster) }
        var model = DiskModel(size: 5 << 20)
        model.write([UInt8](repeating: 5, count: 4096), at: 0)
        model.write([UInt8](repeating: 6, count: 4096), at: 1023 * 4096)
        return (try folder.write(builder.encode(), to: "disk.qed"), model)
    }

    @Test func uncleanImageIsRepairedInMemoryWhenReadOnly() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try Self.unclean(folder)
        let before = try folder.read("disk.qed")
        let disk = try Self.open(path)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try ConformanceTests.expectHonestExtents(disk, model, "unclean")
        try disk.close()
        #expect(try folder.read("disk.qed") == before)
        // As a parent too.
        var child = NewImage(path: folder.file("child.qed"))
        child.parent = path
        try child.create()
        let top = try Self.open(child.path, isWritable: true)
        #expect(try model.mistake(of: top, in: 0..<model.size) == nil)
        try top.write([1, 2, 3], at: 4096)
        try top.close()
        #expect(try folder.read("disk.qed") == before)
    }

    @Test func uncleanImageIsRepairedOnDiskWhenWritten() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try Self.unclean(folder)
        let disk = try Self.open(path, isWritable: true)
        // New clusters fill the file up to and beyond the places that the bad entries led to.
        for offset in stride(from: 2 << 20, to: 3 << 20, by: 4096) {
            let data = [UInt8](repeating: UInt8(offset >> 12 & 127) + 1, count: 4096)
            try disk.write(data, at: UInt64(offset))
            model.write(data, at: offset)
        }
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
        #expect(try Self.bits(path, at: 16) == 0)
        let again = try Self.open(path)
        #expect(try model.mistake(of: again, in: 0..<model.size) == nil)
        try again.close()
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.loss) == 0 && report.remaining(.repairable) == 0)
        let raw = try folder.write(model.bytes, to: "model.raw")
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qed", raw, path)
    }

    /// The power fails at any moment of a session that begins with a repair.
    @Test func repairSurvivesEveryCut() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try Self.unclean(folder)
        let log = CrashLog()
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        let disk = try Disk.open(path, options: options)
        let written = 4096..<40 * 4096
        try disk.write([UInt8](repeating: 0x77, count: written.count), at: UInt64(written.lowerBound))
        try disk.flush()
        let flushed = log.count
        try disk.close()
        var after = model
        after.write([UInt8](repeating: 0x77, count: written.count), at: written.lowerBound)
        var generator = SeededGenerator(seed: 8)
        for mode in [.all, .none, .some(percent: 50), .some(percent: 20)] as [CrashReplay.CutMode] {
            var replay = log.replay()
            for cut in 0...log.count {
                let files = replay.files(at: cut, mode, using: &generator)
                for isWritable in [false, true] {
                    var options = DiskOptions(isWritable: isWritable)
                    options.lazyFlushInterval = 0
                    options.locksImages = false
                    options.wrapStorage = { MemoryStorage(files[$0.name] ?? [], name: $0.name) }
                    let disk = try Disk.open(path, options: options)
                    let content = try disk.read(at: 0, count: model.size)
                    try disk.close()
                    let wrong = stride(from: 0, to: model.size, by: 512).first { start in
                        let sector = content.slice(start, 512)
                        let isOld = cut < flushed && model.mistake(in: sector, at: start) == nil
                        return !isOld && after.mistake(in: sector, at: start) != nil
                    }
                    #expect(
                        wrong == nil, "cut \(cut) of \(log.count), \(mode), writable \(isWritable): byte \(wrong ?? 0)")
                }
            }
        }
    }

    /// A disk that cannot be had, for its parent is missing, leaves its top image as it is.
    @Test func uncleanChildOfAMissingParentIsNotChanged() throws {
        let folder = try TemporaryFolder()
        var builder = QEDBuilder(imageSize: 1 << 20, clusterCount: 4)
        (builder.features, builder.backingFilename) = (3, "gone.qed")
        builder.l1 = [0: 2]
        builder.l2 = [2: [0: 50 * 4096]]
        let path = try folder.write(builder.encode(), to: "disk.qed")
        let before = try folder.read("disk.qed")
        #expect { try Self.open(path, isWritable: true) } throws: { ($0 as? DiskError)?.kind == .notFound }
        #expect(try folder.read("disk.qed") == before)
    }

    @Test func checkRepairsAndQEMUFindsNothing() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try Self.unclean(folder)
        let found = try ImageCheck.run(path)
        #expect(found.remaining(.loss) == 2)
        #expect(found.remaining(.repairable) == 3)
        let repaired = try ImageCheck.run(path, repair: true)
        #expect(repaired.remaining(.loss) == 0 && repaired.remaining(.repairable) == 0)
        #expect(try ImageCheck.run(path).remaining(.leak) == 1)
        // 3: nothing but leaked clusters.
        #expect(try Subprocess.run(["qemu-img", "check", "-q", "-f", "qed", path]).status == 3)
    }

    /// QEMU is killed in the middle; what it had flushed is there, read-only and after repair.
    @Test(arguments: [false, true]) func imageOfAKilledQEMU(_ isWritable: Bool) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        try Self.create(path)
        let result = try Subprocess.run([
            "qemu-io", "-f", "qed", "-c", "write -P 1 0 100k", "-c", "flush", "-c", "write -P 2 5M 1M", "-c",
            "sigraise 9", path,
        ])
        try #require(result.status == 128 + 9)
        try #require(try Self.bits(path, at: 16) & 2 == 2)
        var model = DiskModel(size: Self.size)
        model.write([UInt8](repeating: 1, count: 100 << 10), at: 0)
        model.write([UInt8](repeating: 2, count: 1 << 20), at: 5 << 20)
        let before = try folder.read("disk.qed")
        let disk = try Self.open(path, isWritable: isWritable)
        #expect(try model.mistake(of: disk, in: 0..<Self.size) == nil)
        try disk.close()
        #expect(try Self.bits(path, at: 16) == (isWritable ? 0 : 2))
        if !isWritable { #expect(try folder.read("disk.qed") == before) }
        if isWritable { try Peer.run("qemu-img", "check", "-q", "-f", "qed", path) }
    }

    /// We are killed in the middle (the files as they were then): QEMU repairs, and has what we had flushed.
    @Test func imageOfAKilledWriterOfOurs() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qed")
        try Self.create(path)
        let disk = try Self.open(path, isWritable: true)
        let data = [UInt8](repeating: 0x11, count: 200_000)
        try disk.write(data, at: 0)
        try disk.flush()
        try disk.write([UInt8](repeating: 0x22, count: 200_000), at: 5 << 20)
        try Peer.run("cp", "--sparse=always", path, folder.file("killed.qed"))
        try disk.close()
        let killed = folder.file("killed.qed")
        #expect(try Self.bits(killed, at: 16) & 2 == 2)
        let status = try Subprocess.run(["qemu-img", "check", "-q", "-f", "qed", killed]).status
        #expect(status == 0 || status == 3)
        try Self.io(killed, "read -P 0x11 0 200000", "write -P 3 8M 64k")
        #expect(try Self.bits(killed, at: 16) == 0)
        let again = try Self.open(killed)
        #expect(try again.read(at: 0, count: data.count) == data)
        try again.close()
    }

    /// What `vdimg info` tells.
    @Test func propertiesTellTheHeader() throws {
        let folder = try TemporaryFolder()
        var builder = QEDBuilder(imageSize: 1 << 20, clusterCount: 6)
        (builder.features, builder.backingFilename, builder.headerSize) = (7, "gone.raw", 2)
        (builder.compatFeatures, builder.autoclearFeatures) = (16, 32)
        let path = try folder.write(builder.encode(), to: "disk.qed")
        let image = try #require(try ImageInformation.read(path).first)
        #expect(image.format == "qed" && image.virtualSize == 1 << 20 && image.blockSize == 4096)
        let properties = Dictionary(uniqueKeysWithValues: image.properties.map { ($0.key, $0.value) })
        #expect(properties["table-size"] == "1 clusters")
        #expect(properties["header-size"] == "2 clusters")
        #expect(properties["l1-table-offset"] == "8192")
        #expect(properties["features"] == "0x7")
        #expect(properties["compat-features"] == "0x10")
        #expect(properties["autoclear-features"] == "0x20")
        #expect(properties["parent-name"] == "gone.raw")
        #expect(properties["parent-format"] == "raw")
        #expect(properties["unclean"]?.hasPrefix("yes") == true)
    }

    /// What creation refuses, before it makes anything.
    @Test func impossibleImageIsNotCreated() throws {
        let folder = try TemporaryFolder()
        let base = folder.file("base.qed")
        try Self.create(base)
        let attempts: [@Sendable (inout NewImage) -> Void] = [
            { $0.size = 1000 }, { $0.size = 0 }, { $0.blockSize = 2048 }, { $0.blockSize = 12_288 },
            { $0.blockSize = 128 << 20 }, { $0.options = ["table-size": "3"] }, { $0.options = ["table-size": "32"] },
            { $0.options = ["table-size": "x"] }, { $0.options = ["cluster-size": "4096"] }, { $0.variant = "fixed" },
            { $0.comment = "text" }, { $0.uuid = .random() }, { $0.size = 1 << 63 },
            { image in
                image.size = (1 << 30) + 512
                image.blockSize = 4096
                image.options = ["table-size": "1"]
            },
        ]
        for (number, change) in attempts.enumerated() {
            var image = NewImage(path: folder.file("\(number).qed"))
            image.size = 1 << 20
            change(&image)
            #expect(throws: DiskError.self, "attempt \(number)") { try image.create() }
            #expect(throws: DiskError.self, "attempt \(number) left a file") { try folder.read("\(number).qed") }
        }
        // A disk too large for usual tables gets larger ones.
        var image = NewImage(path: folder.file("large.qed"))
        image.size = 500 << 40
        try image.create()
        #expect(try Peer.run("qemu-img", "info", image.path).contains("549755813888000"))
    }
}

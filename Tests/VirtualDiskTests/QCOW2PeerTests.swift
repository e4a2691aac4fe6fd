import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// QCOW2 with QEMU's tools and libqcow's, in both directions: what one side makes and changes, the other reads, and its
/// checker finds nothing wrong.
struct QCOW2PeerTests {
    static let pool = RandomPool(seed: 3)

    static func create(_ path: String, _ size: String, _ options: String = "compat=1.1") throws {
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    }

    @discardableResult
    static func io(_ path: String, format: String = "qcow2", _ commands: String...) throws -> String {
        var words = ["qemu-io", "-f", format]
        for command in commands { words += ["-c", command] }
        let result = try Subprocess.run(words + [path])
        guard result.status == 0, !result.outputText.contains("failed") else {
            throw DiskError(.system, "\(words): \(result.outputText)\(result.errorText)")
        }
        return result.outputText
    }

    /// qemu-img's verdict: 0 nothing is wrong, 2 corrupt, 3 leaks.
    static func verdict(_ path: String) throws -> Int32 {
        try Subprocess.run(["qemu-img", "check", "-f", "qcow2", path]).status
    }

    /// qemu-img finds neither damage nor leaks.
    static func expectSound(_ path: String, _ context: String = "") throws {
        let result = try Subprocess.run(["qemu-img", "check", "-f", "qcow2", path])
        #expect(result.status == 0, "\(context): \(result.outputText)\(result.errorText)")
    }

    static func open(_ path: String, isWritable: Bool = true, snapshot: String? = nil) throws -> Disk {
        var options = DiskOptions(isWritable: isWritable)
        options.lazyFlushInterval = 0
        options.snapshot = snapshot
        return try Disk.open(path, options: options)
    }

    static func pattern(_ byte: UInt8, _ count: Int) -> [UInt8] { [UInt8](repeating: byte, count: count) }

    /// The options with which qemu-img makes images, of each kind that it knows.
    static let options = [
        "compat=0.10", "compat=0.10,cluster_size=512", "compat=1.1", "cluster_size=512", "cluster_size=4096",
        "cluster_size=2M", "refcount_bits=1", "refcount_bits=2,cluster_size=1024", "refcount_bits=4",
        "refcount_bits=8,cluster_size=4096", "refcount_bits=32", "refcount_bits=64,cluster_size=512",
        "lazy_refcounts=on", "extended_l2=on", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M",
        "preallocation=metadata", "preallocation=falloc", "preallocation=full,cluster_size=4096",
        "preallocation=metadata,extended_l2=on", "data_file=DATA", "data_file=DATA,data_file_raw=on",
        "data_file=DATA,extended_l2=on,cluster_size=32k", "compression_type=zstd",
    ]

    /// qemu-io writes, discards and zeroes; we read, write and discard; qemu-io and qemu-img look at what comes of it.
    @Test(arguments: options) func imageOfQEMUIsReadAndWritten(_ options: String) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        let size = 5 << 20
        try Self.create(path, "5M", options.replacing("DATA", with: folder.file("disk.data")))
        var model = DiskModel(size: size)
        var commands: [String] = []
        func write(_ byte: UInt8, _ offset: Int, _ count: Int) {
            commands.append("write -P \(byte) \(offset) \(count)")
            model.write(Self.pattern(byte, count), at: offset)
        }
        func zero(_ command: String, _ offset: Int, _ count: Int) {
            commands.append("\(command) \(offset) \(count)")
            model.zero(offset..<offset + count)
        }
        write(0x11, 0, 1 << 20)
        write(0x22, 1_234_432, 70_000)
        write(0x33, 3 << 20, 1 << 20)
        zero("write -z", 100_352, 300_032)
        zero("write -z -u", 3_200_000, 262_144)
        // A discard leaves what it likes; with the option it is zeros where there is no parent.
        zero("write -z -u", 512, 65_536)
        write(0x44, size - 512, 512)
        for command in commands { try Self.io(path, command) }

        let disk = try Self.open(path)
        if let mistake = try model.mistake(of: disk, in: 0..<size) { Issue.record("\(options): \(mistake)") }
        var generator = SeededGenerator(seed: 5)
        for round in 0..<60 {
            let start = Int.random(in: 0..<size, using: &generator)
            let count = min(size - start, Int.random(in: 1...200_000, using: &generator))
            if round % 3 == 2 {
                try disk.discard(offset: UInt64(start), length: UInt64(count))
                model.zero(start..<start + count)
            } else {
                let data = Self.pool.bytes(count, using: &generator)
                try disk.write(data, at: UInt64(start))
                model.write(data, at: start)
            }
            if round % 7 == 6 { try disk.flush() }
        }
        if let mistake = try model.mistake(of: disk, in: 0..<size) { Issue.record("\(options): \(mistake)") }
        try disk.close()
        try Self.expectSound(path, "\(options)")
        try Peer.expectAgreement(DiskKind("", DiskKind.Image(file: "disk.qcow2", size: size)), path, model, options)
        #expect(try ImageCheck.run(path).findings.isEmpty, "\(options)")
        // And QEMU goes on with it.
        try Self.io(path, "write -P 0x55 \(2 << 20) 300k", "write -z -u 0 128k")
        model.write(Self.pattern(0x55, 300 << 10), at: 2 << 20)
        model.zero(0..<128 << 10)
        try Self.expectSound(path, "\(options)")
        let again = try Self.open(path, isWritable: false)
        #expect(try model.mistake(of: again, in: 0..<size) == nil, "\(options)")
        try again.close()
    }

    /// What libqcow, which shares no line with QEMU, reads in images that we make and write.
    @Test(arguments: ["", "compat=0.10", "4096", "refcount-bits=64"]) func libqcowReadsWhatWeWrite(
        _ option: String
    ) throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.qcow2"))
        new.size = 8 << 20
        if let size = UInt64(option) { new.blockSize = size }
        let parts = option.split(separator: "=").map(String.init)
        if parts.count == 2 { new.options = [parts[0]: parts[1]] }
        try new.create()
        var model = DiskModel(size: 8 << 20)
        var generator = SeededGenerator(seed: 11)
        let disk = try Self.open(new.path)
        for _ in 0..<30 {
            let start = Int.random(in: 0..<model.size, using: &generator)
            let data = Self.pool.bytes(min(model.size - start, 100_000), using: &generator)
            try disk.write(data, at: UInt64(start))
            model.write(data, at: start)
        }
        try disk.close()
        let mountpoint = folder.file("mnt")
        try Peer.run("mkdir", mountpoint)
        try Peer.run("qcowmount", new.path, mountpoint)
        defer { _ = try? Subprocess.run(["fusermount3", "-u", mountpoint]) }
        let seen = try FileStorage(path: mountpoint + "/qcow1", isWritable: false)
        #expect(try seen.length() == 8 << 20)
        let bytes = try seen.availableBytes(at: 0, count: 8 << 20, for: .guestData)
        #expect(model.mistake(in: bytes, at: 0) == nil)
    }

    // MARK: - Refcounts

    /// Rewriting, discarding and rewriting again takes no more space than the disk has: clusters that were given up are
    /// used again, by the same session and by the next.
    @Test(arguments: ["cluster_size=4096", "cluster_size=64k", "cluster_size=512,refcount_bits=64", "extended_l2=on"])
    func clustersAreUsedAgain(_ options: String) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try Self.create(path, "2M", options)
        var longest: UInt64 = 0
        for session in 0..<3 {
            let disk = try Self.open(path)
            for round in 0..<10 {
                try disk.write(Self.pattern(UInt8(round + 1), 2 << 20), at: 0)
                try disk.flush()
                try disk.discard(offset: 0, length: 2 << 20)
                try disk.flush()
            }
            try disk.write(Self.pattern(0x77, 1 << 20), at: 1 << 19)
            try disk.close()
            try Self.expectSound(path, "\(options), session \(session)")
            let length = try FileStorage(path: path, isWritable: false).length()
            longest = max(longest, length)
        }
        // Data twice, since what is given up waits for a flush; and tables.
        #expect(longest < 5 << 20, "\(options): \(longest) bytes")
    }

    /// The refcount table grows, and moves, as often as it takes.
    @Test(arguments: ["cluster_size=512,refcount_bits=64", "cluster_size=512", "cluster_size=1024,refcount_bits=32"])
    func refcountTableGrows(_ options: String) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try Self.create(path, "40M", options)
        let before = try folder.read("disk.qcow2").slice(48, 12)
        var model = DiskModel(size: 40 << 20)
        var generator = SeededGenerator(seed: 1)
        let disk = try Self.open(path)
        for start in stride(from: 0, to: 40 << 20, by: 1 << 20).shuffled(using: &generator) {
            let data = Self.pool.bytes(1 << 20, using: &generator)
            try disk.write(data, at: UInt64(start))
            model.write(data, at: start)
        }
        try disk.close()
        let after = try FileStorage(path: path, isWritable: false).bytes(at: 48, count: 12, for: .header, "the header")
        #expect(before != after, "it had to grow")
        try Self.expectSound(path)
        try Peer.expectAgreement(
            DiskKind("", DiskKind.Image(file: "disk.qcow2", size: 40 << 20)), path, model, options)
    }

    /// A compressed cluster that is written to moves, and gives up the host clusters that it shared with others, one by
    /// one.
    @Test(arguments: [
        "compression_type=zlib", "compression_type=zstd", "compression_type=zlib,cluster_size=4096",
        "compat=0.10", "extended_l2=on", "extended_l2=on,compression_type=zstd,cluster_size=16k",
    ])
    func compressedClustersAreRewritten(_ options: String) throws {
        let folder = try TemporaryFolder()
        let size = 3 << 20
        var model = DiskModel(size: size)
        for start in stride(from: 0, to: size, by: 5000) {
            model.write(Self.pattern(UInt8(truncatingIfNeeded: start / 5000), min(3000, size - start)), at: start)
        }
        let source = try folder.write(model.bytes, to: "source.raw")
        let path = folder.file("disk.qcow2")
        try Peer.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
        var disk = try Self.open(path)
        var encoded = 0
        try disk.forEachExtent(offset: 0, length: disk.size) { (extent) throws(DiskError) in
            if case .encoded = extent.source { encoded += 1 }
            return true
        }
        #expect(encoded > 0)
        #expect(try model.mistake(of: disk, in: 0..<size) == nil)
        var generator = SeededGenerator(seed: 9)
        for round in 0..<40 {
            let start = Int.random(in: 0..<size, using: &generator)
            let count = min(size - start, Int.random(in: 1...50_000, using: &generator))
            if round % 4 == 3 {
                try disk.discard(offset: UInt64(start), length: UInt64(count))
                model.zero(start..<start + count)
            } else {
                let data = Self.pool.bytes(count, using: &generator)
                try disk.write(data, at: UInt64(start))
                model.write(data, at: start)
            }
        }
        #expect(try model.mistake(of: disk, in: 0..<size) == nil)
        try disk.close()
        try Self.expectSound(path)
        disk = try Self.open(path)
        try disk.write(Self.pattern(1, size), at: 0)
        try disk.close()
        try Self.expectSound(path)
    }

    /// A discard goes extent by extent: where the stored part of a cluster lies over zeros and may be forgotten, the
    /// part that masks the backing file's data may not.
    @Test func discardKeepsZeroSubclustersOverABase() throws {
        let folder = try TemporaryFolder()
        try Self.create(folder.file("base.qcow2"), "1M")
        try Self.io(folder.file("base.qcow2"), "write -P 7 0 32k")
        var new = NewImage(path: folder.file("disk.qcow2"))
        new.parent = folder.file("base.qcow2")
        new.options = ["extended-l2": "on"]
        try new.create()
        let disk = try Self.open(new.path)
        try disk.discard(offset: 0, length: 65_536)
        try disk.write(Self.pattern(1, 4096), at: 40_960)
        try disk.discard(offset: 0, length: 65_536)
        #expect(try disk.read(at: 0, count: 65_536) == Self.pattern(0, 65_536))
        try disk.write(Self.pattern(2, 4096), at: 40_960)
        try disk.discard(offset: 40_960, length: 65_536)
        #expect(try disk.read(at: 0, count: 65_536) == Self.pattern(0, 65_536))
        try disk.close()
        try Self.expectSound(new.path)
    }

    // MARK: - Snapshots

    /// Snapshots that qemu-img made are listed and shown; the present state is written beside them, and they stay what
    /// they are.
    @Test(arguments: [
        "compat=1.1", "compat=0.10", "cluster_size=512,refcount_bits=8", "extended_l2=on", "cluster_size=2M",
    ])
    func snapshotsStayWhatTheyAre(_ options: String) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        let size = 3 << 20
        try Self.create(path, "3M", options)
        var model = DiskModel(size: size)
        var generator = SeededGenerator(seed: 21)
        var kept: [DiskModel] = []
        for number in 0..<3 {
            let disk = try Self.open(path)
            for round in 0..<20 {
                let start = Int.random(in: 0..<size, using: &generator)
                let count = min(size - start, Int.random(in: 1...120_000, using: &generator))
                if round % 4 == 3 {
                    try disk.discard(offset: UInt64(start), length: UInt64(count))
                    model.zero(start..<start + count)
                } else {
                    let data = Self.pool.bytes(count, using: &generator)
                    try disk.write(data, at: UInt64(start))
                    model.write(data, at: start)
                }
                if round == 10 { try disk.flush() }
            }
            #expect(try model.mistake(of: disk, in: 0..<size) == nil, "\(options), round \(number)")
            try disk.close()
            try Self.expectSound(path, "\(options), round \(number)")
            for (index, old) in kept.enumerated() {
                let snapshot = try Self.open(path, isWritable: false, snapshot: index == 0 ? "1" : "state \(index)")
                #expect(try old.mistake(of: snapshot, in: 0..<size) == nil, "\(options): snapshot \(index)")
                try snapshot.close()
            }
            try Peer.run("qemu-img", "snapshot", "-c", "state \(number)", path)
            kept.append(model)
        }
        let information = try #require(try ImageInformation.read(path).first)
        #expect(information.snapshots.map(\.name) == ["state 0", "state 1", "state 2"])
        #expect(information.snapshots.map(\.id) == ["1", "2", "3"])
        #expect(information.snapshots.allSatisfy { $0.virtualSize == UInt64(size) && $0.date > 1_500_000_000 })
        // QEMU deletes one, and takes the disk back to another.
        try Peer.run("qemu-img", "snapshot", "-d", "state 1", path)
        let disk = try Self.open(path)
        try disk.write(Self.pattern(9, 70_000), at: 1000)
        try disk.close()
        try Self.expectSound(path)
        try Peer.run("qemu-img", "snapshot", "-a", "state 0", path)
        try Self.expectSound(path)
        let back = try Self.open(path, isWritable: false)
        #expect(try kept[0].mistake(of: back, in: 0..<size) == nil)
        try back.close()
    }

    @Test func snapshotOfAnotherSizeIsShownAsItWas() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try Self.create(path, "1M")
        try Self.io(path, "write -P 7 0 1M")
        try Peer.run("qemu-img", "snapshot", "-c", "small", path)
        try Peer.run("qemu-img", "resize", "-q", path, "600M")
        try Self.io(path, "write -P 8 0 2M")
        let disk = try Self.open(path, isWritable: false, snapshot: "small")
        #expect(disk.size == 1 << 20)
        #expect(try disk.read(at: 0, count: 1 << 20) == Self.pattern(7, 1 << 20))
        try disk.close()
        #expect { try Self.open(path, isWritable: false, snapshot: "large") } throws: { error in
            (error as? DiskError)?.kind == .notFound && "\(error)".contains("'small'")
        }
        #expect { try Self.open(path, snapshot: "small") } throws: { ($0 as? DiskError)?.kind == .invalidArgument }
    }

    /// An overlay over a snapshot knows which one it lies over, whatever becomes of the image's present state.
    @Test func overlayOverASnapshot() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try Self.create(path, "1M")
        try Self.io(path, "write -P 7 0 1M")
        try Peer.run("qemu-img", "snapshot", "-c", "a", path)
        try Peer.run("qemu-img", "snapshot", "-c", "b", path)
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.snapshot = "a"
        options.overlay = .file(folder.file("disk.overlay"))
        let disk = try Disk.open(path, options: options)
        try disk.write([1, 2, 3], at: 5000)
        try disk.close()
        try Self.io(path, "write -P 8 0 1M")
        let again = try Disk.open(path, options: options)
        #expect(try again.read(at: 4999, count: 5) == [7, 1, 2, 3, 7])
        try again.close()
        options.snapshot = "b"
        #expect { try Disk.open(path, options: options) } throws: { ($0 as? DiskError)?.kind == .brokenLink }
        options.snapshot = nil
        #expect { try Disk.open(path, options: options) } throws: { ($0 as? DiskError)?.kind == .brokenLink }
    }

    @Test func formatWithoutSnapshotsSaysSo() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.vmdk"))
        new.size = 1 << 20
        try new.create()
        #expect { try Self.open(new.path, isWritable: false, snapshot: "a") } throws: {
            ($0 as? DiskError)?.kind == .unsupported
        }
    }
}

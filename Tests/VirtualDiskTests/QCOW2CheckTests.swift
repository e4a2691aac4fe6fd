import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Damage of each kind: our check and qemu-img's come to the same verdict, nothing is changed without repair, and what
/// repair makes of it both find sound.
struct QCOW2CheckTests {
    /// An image with known content, and where its tables lie.
    private struct Sample {
        let folder: TemporaryFolder
        let path: String
        let model: DiskModel
        let clusterSize: UInt64
        let hasSubclusters: Bool

        init(_ options: String, hasSnapshot: Bool = false) throws {
            folder = try TemporaryFolder()
            path = folder.file("disk.qcow2")
            try QCOW2PeerTests.create(path, "4M", options)
            var model = DiskModel(size: 4 << 20)
            for (byte, start, count) in [(1, 0, 1 << 20), (2, 2 << 20, 300_000), (3, 3_500_000, 4096)]
                as [(UInt8, Int, Int)]
            {
                try QCOW2PeerTests.io(path, "write -P \(byte) \(start / 512 * 512) \(count / 512 * 512)")
                model.write(QCOW2PeerTests.pattern(byte, count / 512 * 512), at: start / 512 * 512)
            }
            if hasSnapshot {
                try Peer.run("qemu-img", "snapshot", "-c", "one", path)
                try QCOW2PeerTests.io(path, "write -P 9 65536 65536")
                model.write(QCOW2PeerTests.pattern(9, 65_536), at: 65_536)
            }
            self.model = model
            clusterSize = 1 << UInt64(try Self.number(path, 20, 4))
            hasSubclusters = try Self.number(path, 72, 8) & 16 != 0
        }

        static func number(_ path: String, _ offset: UInt64, _ width: Int) throws -> UInt64 {
            let file = try FileStorage(path: path, isWritable: false)
            return try file.bytes(at: offset, count: width, for: .table, "a number").reduce(0) { $0 << 8 | UInt64($1) }
        }

        func number(_ offset: UInt64) throws -> UInt64 { try Self.number(path, offset, 8) }

        func set(_ value: UInt64, at offset: UInt64, width: Int = 8) throws {
            let bytes = (0..<width).map { UInt8(truncatingIfNeeded: value >> UInt64((width - 1 - $0) * 8)) }
            try FileStorage(path: path, isWritable: true).write(bytes, at: offset, for: .table)
        }

        var l1: UInt64 { get throws { try number(40) } }
        var refcountTable: UInt64 { get throws { try number(48) } }
        var refcountBlock: UInt64 { get throws { try number(refcountTable) } }
        var l2: UInt64 { get throws { try number(l1) & 0x00ff_ffff_ffff_fe00 } }
        /// Where the L2 entry of a cluster lies.
        func entry(_ cluster: UInt64) throws -> UInt64 { try l2 + cluster * (hasSubclusters ? 16 : 8) }
        /// The host cluster of a guest cluster.
        func host(_ cluster: UInt64) throws -> UInt64 {
            try (number(entry(cluster)) & 0x00ff_ffff_ffff_fe00) / clusterSize
        }
        /// Where the 16-bit refcount of a host cluster lies.
        func refcount(_ host: UInt64) throws -> UInt64 { try refcountBlock + host * 2 }
        var clusterCount: UInt64 {
            get throws { try FileStorage(path: path, isWritable: false).length() / clusterSize }
        }
    }

    private struct Damage: Sendable, CustomTestStringConvertible {
        let name: String
        /// Whether the content is what it was after the repair.
        var keepsContent = true
        /// Whether qemu-img finds nothing after more writes.
        var staysSound = true
        let harm: @Sendable (Sample) throws -> Void
        var testDescription: String { name }
    }

    private static let damages = [
        Damage(name: "refcount too low") { try $0.set(0, at: $0.refcount($0.host(3)), width: 2) },
        Damage(name: "refcount too high") { try $0.set(5, at: $0.refcount($0.host(3)), width: 2) },
        Damage(name: "refcount of the L2 table too low") {
            try $0.set(0, at: $0.refcount($0.l2 / $0.clusterSize), width: 2)
        },
        Damage(name: "refcount of the header too low") { try $0.set(0, at: $0.refcount(0), width: 2) },
        Damage(name: "a leak") { sample in
            let file = try FileStorage(path: sample.path, isWritable: true)
            try file.setLength((sample.clusterCount + 2) * sample.clusterSize)
            try sample.set(1, at: sample.refcount(sample.clusterCount - 1), width: 2)
        },
        Damage(name: "the last L2 entry is gone", keepsContent: false) {
            // What it led to is a leak then.
            try $0.set(0, at: $0.entry(3_500_000 / $0.clusterSize))
        },
        Damage(name: "an L2 entry without its mark") {
            try $0.set($0.number($0.entry(1)) & ~(1 << 63), at: $0.entry(1))
        },
        Damage(name: "an L1 entry without its mark") { try $0.set($0.number($0.l1) & ~(1 << 63), at: $0.l1) },
        Damage(name: "an L2 entry within a cluster", keepsContent: false) {
            try $0.set($0.number($0.entry(2)) + 512, at: $0.entry(2))
        },
        Damage(name: "an L2 entry outside the file", keepsContent: false) {
            try $0.set(1 << 63 | 1 << 40, at: $0.entry(2))
        },
        Damage(name: "an L1 entry within a cluster", keepsContent: false) {
            try $0.set($0.number($0.l1) + 512, at: $0.l1)
        },
        Damage(name: "an L1 entry outside the file", keepsContent: false) { try $0.set(1 << 63 | 1 << 40, at: $0.l1) },
        Damage(name: "reserved bits in an L2 entry") { try $0.set($0.number($0.entry(2)) | 1 << 58, at: $0.entry(2)) },
        Damage(name: "reserved bits in an L1 entry") { try $0.set($0.number($0.l1) | 1 << 58, at: $0.l1) },
        // The cluster is shared by both then. When one of them moves, the other is not found to be marked: like QEMU.
        Damage(name: "two entries for one cluster", keepsContent: false, staysSound: false) {
            try $0.set($0.number($0.entry(2)), at: $0.entry(4))
        },
        Damage(name: "no refcount block") { try $0.set(0, at: $0.refcountTable) },
        Damage(name: "a refcount block within a cluster") {
            try $0.set($0.refcountBlock + 512, at: $0.refcountTable)
        },
        Damage(name: "a refcount block outside the file") { try $0.set(1 << 40, at: $0.refcountTable) },
        Damage(name: "a refcount block where data is") {
            try $0.set($0.host(3) * $0.clusterSize, at: $0.refcountTable)
        },
        Damage(name: "a refcount block twice") { try $0.set($0.refcountBlock, at: $0.refcountTable + 8) },
    ]

    @Test(arguments: damages, ["compat=1.1", "compat=0.10", "cluster_size=16k,extended_l2=on", "snapshot"])
    private func damageIsFoundAndRepaired(_ damage: Damage, _ options: String) throws {
        let isSnapshot = options == "snapshot"
        let sample = try Sample(isSnapshot ? "cluster_size=64k" : options, hasSnapshot: isSnapshot)
        #expect(try ImageCheck.run(sample.path).findings.isEmpty)
        try damage.harm(sample)
        let before = try sample.folder.read("disk.qcow2")
        let context = "\(damage.name), \(options)"
        let report = try ImageCheck.run(sample.path)
        #expect(try sample.folder.read("disk.qcow2") == before, "\(context): a check changed something")
        let found =
            report.remaining(.loss) + report.remaining(.repairable) > 0 ? 2 : report.remaining(.leak) > 0 ? 3 : 0
        // (1: qemu-img gives up.)
        let verdict = try QCOW2PeerTests.verdict(sample.path)
        #expect(verdict == found || verdict == 1 && found == 2, "\(context): \(verdict), \(report.findings)")
        #expect(found != 0, "\(context)")

        let repaired = try ImageCheck.run(sample.path, options: DiskOptions(isWritable: true), repair: true)
        #expect(
            repaired.remaining(.loss) + repaired.remaining(.repairable) + repaired.remaining(.leak) == 0,
            "\(context): \(repaired.findings)")
        let result = try Subprocess.run(["qemu-img", "check", "-f", "qcow2", sample.path])
        #expect(result.status == 0, "\(context): after repair: \(result.outputText)\(result.errorText)")
        let again = try ImageCheck.run(sample.path)
        #expect(again.findings.isEmpty, "\(context): after repair: \(again.findings)")
        var model = sample.model
        let disk = try QCOW2PeerTests.open(sample.path)
        if damage.keepsContent {
            let mistake = try model.mistake(of: disk, in: 0..<model.size)
            #expect(mistake == nil, "\(context): \(mistake ?? "")")
        } else {
            let content = try disk.read(at: 0, count: model.size)
            model = DiskModel(size: model.size)
            model.write(content, at: 0)
        }
        // And it can be written: nothing that is used is given away.
        var generator = SeededGenerator(seed: 8)
        for _ in 0..<20 {
            let start = Int.random(in: 0..<model.size, using: &generator)
            let data = QCOW2PeerTests.pool.bytes(min(model.size - start, 90_000), using: &generator)
            try disk.write(data, at: UInt64(start))
            model.write(data, at: start)
        }
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil, "\(context): written after the repair")
        try disk.close()
        if damage.staysSound {
            try QCOW2PeerTests.expectSound(sample.path, "\(context): written after the repair")
        }
    }

    /// A repair that is cut off at any moment leaves an image that another one repairs.
    @Test func repairMayBeCutOff() throws {
        let sample = try Sample("cluster_size=4096")
        for cluster in [3, 5, 9, 520] as [UInt64] {
            try sample.set(0, at: sample.refcount(sample.host(cluster % 256)), width: 2)
        }
        try sample.set(sample.number(sample.entry(6)) & ~(1 << 63), at: sample.entry(6))
        let log = CrashLog()
        var options = DiskOptions(isWritable: true)
        options.wrapStorage = { log.record($0) }
        _ = try ImageCheck.run(sample.path, options: options, repair: true)
        var generator = SeededGenerator(seed: 4)
        var replay = log.replay()
        for cut in 0...log.count {
            for mode in [.none, .all, .some(percent: 50)] as [CrashReplay.CutMode] {
                let files = replay.files(at: cut, mode, using: &generator)
                var options = DiskOptions(isWritable: true)
                options.locksImages = false
                options.lazyFlushInterval = 0
                options.wrapStorage = { MemoryStorage(files[$0.name] ?? [], name: $0.name) }
                let repaired = try ImageCheck.run(sample.path, options: options, repair: true)
                #expect(repaired.remaining(.loss) + repaired.remaining(.repairable) == 0)
                let disk = try Disk.open(sample.path, options: options)
                #expect(try sample.model.mistake(of: disk, in: 0..<sample.model.size) == nil, "cut \(cut)")
                try disk.close()
            }
        }
    }
}

import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// What ``HostileVMDKTests`` say, for QCOW2 and QCOW: whatever a field holds and wherever the file ends, the answer is
/// an error or a disk.
struct HostileQCOW2Tests {
    @Test(arguments: HostileQCOW2.allCases) func anyFieldHoldsAnything(_ kind: HostileQCOW2) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileQCOW2, seed = seed as UInt64, path = folder.path as String] in
            try HostileQCOW2Session(kind, seed: seed, notes: path).changeFields()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    @Test(arguments: HostileQCOW2.allCases) func fileEndsAnywhere(_ kind: HostileQCOW2) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileQCOW2, seed = seed as UInt64, path = folder.path as String] in
            try HostileQCOW2Session(kind, seed: seed, notes: path).truncate()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    /// Tables that are well formed one by one and absurd together: each is opened, read, written, checked and repaired
    /// in little time and memory.
    @Test func absurdTables() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            alarm(300)
            let progress = try Progress(folder: path)
            for (name, bytes, length) in HostileQCOW2.absurdImages() {
                progress.note(name)
                let folder = try TemporaryFolder()
                var image = try HostileImage([("disk.qcow2", bytes)], folder: folder)
                image.length = length
                if let problem = image.exercise() { Issue.record("\(name): \(problem)") }
            }
        }
        HostileVMDKTests.explain(result, "absurd tables", folder)
    }
}

/// The kinds of images that are harmed.
enum HostileQCOW2: String, Sendable, Codable, CaseIterable, CustomTestStringConvertible {
    case version3
    case version2
    case smallClusters
    case subclusters
    case compressed
    case zstd
    case snapshots
    case bitmaps
    case dirty
    case child
    case qcow

    var testDescription: String { rawValue }

    /// Makes an image in `folder`; answers its files, the one that is harmed first.
    func make(in folder: TemporaryFolder) throws -> [String] {
        let name = self == .qcow ? "disk.qcow" : "disk.qcow2"
        let path = folder.file(name)
        var model = DiskModel(size: 200 << 10)
        for start in stride(from: 0, to: model.size - 2000, by: 30_000) {
            model.write(QCOW2PeerTests.pattern(UInt8(start / 1000), 1500), at: start)
        }
        let source = try folder.write(model.bytes, to: "source.raw")
        let options =
            switch self {
            case .version2: "compat=0.10,cluster_size=4096"
            case .smallClusters: "cluster_size=512,refcount_bits=1"
            case .subclusters: "cluster_size=16k,extended_l2=on"
            case .zstd: "cluster_size=4096,compression_type=zstd"
            case .dirty: "cluster_size=4096,lazy_refcounts=on"
            default: "cluster_size=4096"
            }
        if self == .child {
            try Peer.run(
                "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", "source.raw", "-F", "raw", path)
            try QCOW2PeerTests.io(path, "write -P 3 5000 9000")
            return [name, "source.raw"]
        }
        if self == .qcow {
            try Peer.run("python3", "-c", QCOWTests.writer, source, path)
            return [name]
        }
        let isCompressed = [.compressed, .zstd].contains(self)
        try Subprocess.expectSuccess(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options] + (isCompressed ? ["-c"] : [])
                + [source, path])
        switch self {
        case .snapshots:
            try Peer.run("qemu-img", "snapshot", "-c", "one", path)
            try QCOW2PeerTests.io(path, "write -P 3 5000 9000")
            try Peer.run("qemu-img", "snapshot", "-c", "two", path)
        case .bitmaps: try Peer.run("qemu-img", "bitmap", "--add", path, "changes")
        case .dirty: try FileStorage(path: path, isWritable: true).write([1], at: 79, for: .header)
        default: try QCOW2PeerTests.io(path, "write -P 5 20000 9000", "write -z 40000 20000")
        }
        return [name]
    }

    /// A number in the file, the most significant byte first.
    struct Field {
        let name: String
        let offset: Int
        let width: Int
    }

    /// The fields of its header, extensions and tables.
    func fields(_ bytes: [UInt8]) -> [Field] {
        func big(_ offset: Int, _ width: Int) -> Int {
            guard offset >= 0, offset + width <= bytes.count else { return 0 }
            return Int(truncatingIfNeeded: bytes.slice(offset, width).reduce(UInt64(0)) { $0 << 8 | UInt64($1) })
        }
        if self == .qcow {
            let header = [(8, 8), (16, 4), (24, 8), (32, 1), (33, 1), (36, 4), (40, 8)]
            var fields = header.map { Field(name: "header+\($0.0)", offset: $0.0, width: $0.1) }
            let l1 = big(40, 8)
            fields.append(Field(name: "L1", offset: l1, width: 8))
            for entry in [0, 1, 7, 8] { fields.append(Field(name: "L2", offset: big(l1, 8) + entry * 8, width: 8)) }
            return fields.filter { $0.offset + $0.width <= bytes.count }
        }
        var fields: [Field] = []
        for (offset, width) in [
            (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8),
            (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (112, 4), (116, 4),
        ] { fields.append(Field(name: "header+\(offset)", offset: offset, width: width)) }
        let mask = 0x00ff_ffff_ffff_fe00
        let l1 = big(40, 8)
        let l2 = big(l1, 8) & mask
        fields.append(Field(name: "L1", offset: l1, width: 8))
        for entry in [0, 1, 2, 5, 8, 9, 10, 11, 16] {
            fields.append(Field(name: "L2 entry \(entry)", offset: l2 + entry * 8, width: 8))
        }
        let table = big(48, 8)
        fields.append(Field(name: "refcount table", offset: table, width: 8))
        fields.append(Field(name: "refcount table, second", offset: table + 8, width: 8))
        for word in [0, 1, 2] { fields.append(Field(name: "refcounts", offset: big(table, 8) + word * 8, width: 8)) }
        let snapshots = big(64, 8)
        if big(60, 4) > 0 {
            for (offset, width) in [(0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4), (40, 8), (48, 8)] {
                fields.append(Field(name: "snapshot+\(offset)", offset: snapshots + offset, width: width))
            }
        }
        if self == .bitmaps, let place = (0..<600).first(where: { big($0 * 8, 4) == 0x2385_2875 }) {
            let start = place * 8 + 8
            for (offset, width) in [(0, 4), (8, 8), (16, 8)] {
                fields.append(Field(name: "bitmaps+\(offset)", offset: start + offset, width: width))
            }
            let directory = big(start + 16, 8)
            for (offset, width) in [(0, 8), (8, 4), (12, 4), (18, 2), (20, 4)] {
                fields.append(Field(name: "bitmap+\(offset)", offset: directory + offset, width: width))
            }
            fields.append(Field(name: "bitmap table", offset: big(directory, 8), width: 8))
        }
        return fields.filter { $0.offset >= 0 && $0.offset + $0.width <= bytes.count }
    }

    // MARK: - Absurd tables

    /// A header with tables where they are said to be: the L1 table at cluster 2, the refcount table at cluster 1.
    private static func header(
        clusterBits: UInt32, l1Size: Int, size: UInt64, tableClusters: UInt32 = 1, snapshots: UInt32 = 0,
        snapshotsOffset: UInt64 = 0, l1Cluster: UInt64 = 2
    ) -> FieldWriter {
        var header = FieldWriter(count: 1 << Int(clusterBits))
        header.bytes([0x51, 0x46, 0x49, 0xfb], at: 0)
        header.bigEndian(UInt32(3), at: 4)
        header.bigEndian(clusterBits, at: 20)
        header.bigEndian(size, at: 24)
        header.bigEndian(UInt32(l1Size), at: 36)
        header.bigEndian(l1Cluster << UInt64(clusterBits), at: 40)
        header.bigEndian(UInt64(1) << UInt64(clusterBits), at: 48)
        header.bigEndian(tableClusters, at: 56)
        header.bigEndian(snapshots, at: 60)
        header.bigEndian(snapshotsOffset, at: 64)
        header.bigEndian(UInt32(4), at: 96)
        header.bigEndian(UInt32(104), at: 100)
        return header
    }

    /// `count` 64-bit words.
    private static func words(_ count: Int, _ word: (Int) -> UInt64) -> [UInt8] {
        var bytes = [UInt8]()
        bytes.reserveCapacity(count * 8)
        for index in 0..<count {
            let value = word(index)
            for shift in stride(from: 56, through: 0, by: -8) {
                bytes.append(UInt8(truncatingIfNeeded: value >> UInt64(shift)))
            }
        }
        return bytes
    }

    /// Names, files, and how long they are said to be.
    static func absurdImages() -> [(String, [UInt8], UInt64?)] {
        let copied: UInt64 = 1 << 63
        let cluster = 1 << 16
        let most = 1 << 20
        let size = UInt64(most) << 29
        let empty = [UInt8](repeating: 0, count: cluster)
        let head = header(clusterBits: 16, l1Size: most, size: size).bytes + empty
        let afterL1 = UInt64(2 * cluster + most * 8)
        return [
            (
                "all L1 entries for one full L2 table",
                head + words(most) { _ in afterL1 | copied }
                    + words(cluster / 8) { UInt64($0 + 3) << 16 | copied }, nil
            ),
            (
                "all L1 entries for the L1 table", head + words(most) { _ in UInt64(2 * cluster) | copied }, nil
            ),
            (
                "L1 entries all over a long hole",
                header(clusterBits: 16, l1Size: 1 << 14, size: 1 << 43).bytes + empty
                    + words(1 << 14) { UInt64($0 + 1000) << 28 | copied }, 1 << 43
            ),
            (
                "refcount blocks all over a long hole",
                header(clusterBits: 16, l1Size: 1, size: 1 << 20, tableClusters: 128, l1Cluster: 129).bytes
                    + words(1 << 20) { UInt64($0 + 1000) << 20 } + empty, 1 << 43
            ),
            (
                "many snapshots of one L1 table",
                header(clusterBits: 16, l1Size: 1, size: 1 << 20, snapshots: 65_536, snapshotsOffset: 3 << 16).bytes
                    + empty + empty
                    + (0..<65_536).flatMap { _ in words(5) { $0 == 0 ? 2 << 16 : $0 == 1 ? 1 << 32 : 0 } },
                nil
            ),
            (
                "a long file of small clusters",
                header(clusterBits: 9, l1Size: 64, size: 1 << 20).bytes + [UInt8](repeating: 0, count: 512)
                    + words(64) { UInt64($0 + 1) << 37 | copied }, 1 << 43
            ),
        ]
    }
}

/// Attempts on one kind of image, one after the other.
struct HostileQCOW2Session {
    private let image: HostileImage
    private let kind: HostileQCOW2
    private let seed: UInt64
    private let progress: Progress
    private let folder: TemporaryFolder

    /// Attempts of one sort at most, picked at random; torture makes them all.
    private static let limit = unsafe getenv("VDMOUNT_TORTURE") != nil ? Int.max : 500

    init(_ kind: HostileQCOW2, seed: UInt64, notes: String) throws {
        alarm(300)  // whatever goes on for ever ends here
        self.kind = kind
        self.seed = seed
        folder = try TemporaryFolder()
        progress = try Progress(folder: notes)
        let names = try kind.make(in: folder)
        image = try HostileImage(path: folder.file(names[0]), folder: folder, names: names)
        try #require(image.exercise() == nil)
    }

    private func make(_ attempts: [(what: String, harmed: HostileImage)], _ generator: inout SeededGenerator) {
        for attempt in attempts.shuffled(using: &generator).prefix(Self.limit) {
            progress.note(attempt.what)
            if let problem = attempt.harmed.exercise() {
                Issue.record("\(kind), \(attempt.what), seed \(seed): \(problem)")
            }
        }
    }

    private func setting(_ bytes: [UInt8], _ field: HostileQCOW2.Field, _ value: UInt64) -> [UInt8] {
        bytes.setting(value.byteSwapped >> UInt64(64 - field.width * 8), at: field.offset, width: field.width)
    }

    /// Sets each field to many values, then several at once.
    func changeFields() throws {
        var generator = SeededGenerator(seed: seed)
        let bytes = image.files[image.path] ?? []
        let fields = kind.fields(bytes)
        var attempts: [(String, HostileImage)] = []
        for field in fields {
            let old = bytes.slice(field.offset, field.width).reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
            for value in hostileValues(width: field.width, was: old, using: &generator) where value != old {
                var harmed = image
                harmed.files[image.path] = setting(bytes, field, value)
                attempts.append(("\(field.name) = \(value)", harmed))
            }
        }
        make(attempts, &generator)
        var several: [(String, HostileImage)] = []
        for _ in 0..<60 {
            var harmed = bytes
            var what = "at once"
            for _ in 0..<Int.random(in: 2...4, using: &generator) {
                guard let field = fields.randomElement(using: &generator) else { break }
                let values = hostileValues(width: field.width, was: 1 << 16, using: &generator)
                let value = values.randomElement(using: &generator) ?? 0
                harmed = setting(harmed, field, value)
                what += ", \(field.name) = \(value)"
            }
            var image = image
            image.files[image.path] = harmed
            several.append((what, image))
        }
        make(several, &generator)
    }

    /// Ends the file at many places.
    func truncate() throws {
        var generator = SeededGenerator(seed: seed)
        let bytes = image.files[image.path] ?? []
        var attempts: [(String, HostileImage)] = []
        var ends = Set((0...min(130, bytes.count)).map { $0 })
        for start in stride(from: 0, through: bytes.count, by: 512) { ends.formUnion([start, start + 7]) }
        for end in ends where end < bytes.count {
            var harmed = image
            harmed.files[image.path] = bytes.slice(0, end)
            attempts.append(("cut at \(end)", harmed))
        }
        make(attempts, &generator)
    }
}

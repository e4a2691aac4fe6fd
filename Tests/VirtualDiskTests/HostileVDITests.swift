import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Every byte of a VDI is hostile, as ``HostileVMDKTests`` has it for VMDK.
struct HostileVDITests {
    /// What is harmed.
    enum Kind: String, Sendable, Codable, CaseIterable {
        case dynamic, child, parent, version0, extra, fixed
    }

    @Test(arguments: Kind.allCases) func anyFieldHoldsAnything(_ kind: Kind) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as Kind, seed = seed as UInt64, path = folder.path as String] in
            try Session(kind, seed: seed, notes: path).changeFields()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    @Test(arguments: Kind.allCases) func fileEndsAnywhere(_ kind: Kind) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as Kind, seed = seed as UInt64, path = folder.path as String] in
            try Session(kind, seed: seed, notes: path).truncate()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    /// Headers that claim much, in files that are sparse and longer than any file system makes them.
    @Test func hugeClaims() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            alarm(300)
            let progress = try Progress(folder: path)
            let files = try TemporaryFolder()
            for (blocks, blockShift, length) in [
                (1 << 28, 20, 44), (1 << 29, 9, 44), (0xffff_ffff, 9, 44), (0x3fff_0000, 30, 44), (1 << 20, 9, 44),
                (1 << 25, 12, 43), (16, 9, 44), (0xffff_ffff, 30, 35),
            ] as [(UInt64, UInt64, UInt64)] {
                for entries in [[0], [.max], [.max - 1], [1, 2, .max - 2], [0, 0x7fff_fff0]] as [[UInt32]] {
                    progress.note("\(blocks) blocks of 2^\(blockShift), 2^\(length) bytes, entries \(entries)")
                    var fields = FieldWriter(count: 512)
                    for (offset, value) in [
                        (64, 0xbeda_107f), (68, 0x10001), (72, 400), (76, 1), (340, 512),
                        (344, min(512 + blocks * 4, 0xffff_fe00)), (360, 512), (376, 1 << blockShift), (384, blocks),
                    ] as [(Int, UInt64)] { fields.littleEndian(UInt32(truncatingIfNeeded: value), at: offset) }
                    fields.littleEndian(blocks << blockShift, at: 368)
                    var map = FieldWriter(count: entries.count * 4)
                    for (index, entry) in entries.enumerated() { map.littleEndian(entry, at: index * 4) }
                    var image = try HostileImage([("disk.vdi", fields.bytes + map.bytes)], folder: files)
                    image.length = 1 << length
                    if let problem = image.exercise() {
                        Issue.record("\(blocks), \(blockShift), \(entries): \(problem)")
                    }
                }
            }
        }
        HostileVMDKTests.explain(result, "", folder)
    }

    /// Attempts on one kind of image, one after the other.
    private struct Session {
        private static let block = 4096
        private let image: HostileImage
        private let harmed: String
        private let seed: UInt64
        private let kind: Kind
        private let progress: Progress
        private let folder: TemporaryFolder

        init(_ kind: Kind, seed: UInt64, notes: String) throws {
            alarm(300)  // whatever goes on for ever ends here
            self.kind = kind
            self.seed = seed
            folder = try TemporaryFolder()
            progress = try Progress(folder: notes)
            try Self.make(kind, folder)
            let names = [.child, .parent].contains(kind) ? ["disk.vdi", "base.vdi"] : ["disk.vdi"]
            harmed = folder.file(kind == .parent ? "base.vdi" : "disk.vdi")
            image = try HostileImage(path: folder.file("disk.vdi"), folder: folder, names: names)
            try #require(image.exercise() == nil)
        }

        private static func make(_ kind: Kind, _ folder: TemporaryFolder) throws {
            var content = [UInt8](repeating: 0, count: 25 * block + 512)
            for index in content.indices where index / 10_000 % 2 == 0 { content[index] = UInt8(index / 10_000 + 1) }
            try folder.write(content, to: "content.raw")
            var arguments = ["make", folder.file("content.raw"), folder.file("disk.vdi"), "--block", String(block)]
            switch kind {
            case .dynamic: break
            case .version0: arguments += ["--version", "0.0"]
            case .extra: arguments += ["--extra", "512"]
            case .fixed: arguments += ["--type", "2"]
            case .child, .parent:
                let ids = (0..<2).map { _ in DiskUUID.random().description }
                try VDIReader.run([
                    "make", folder.file("content.raw"), folder.file("base.vdi"), "--block", "8192", "--uuid", ids[0],
                    "--modification", ids[1],
                ])
                try folder.write(content.map { $0 > 5 ? 0 : $0 &* 3 }, to: "changed.raw")
                arguments[1] = folder.file("changed.raw")
                arguments += [
                    "--over", folder.file("content.raw"), "--type", "4", "--parent", ids[0], "--parent-modification",
                    ids[1],
                ]
            }
            try VDIReader.run(arguments)
        }

        private var bytes: [UInt8] { image.files[harmed] ?? [] }

        /// Offset and width of each field of the header, and some entries.
        private var fields: [(offset: Int, width: Int)] {
            let isOld = kind == .version0
            var fields: [(Int, Int)] = [(64, 4), (68, 4)]
            if isOld {
                fields += [(72, 4), (76, 4), (348, 4), (352, 8), (360, 4), (364, 4), (368, 4), (404, 8)]
            } else {
                fields += [72, 76, 80, 340, 344, 348, 360, 376, 380, 384, 388].map { ($0, 4) }
                fields += [(368, 8), (392, 8), (424, 8), (440, 8), (468, 4)]
            }
            let map = isOld ? 420 : Int(bytes.number(at: 340, width: 4))
            for entry in [0, 1, 2, 7, 13, 25] { fields.append((map + entry * 4, 4)) }
            return fields.filter { $0.0 + $0.1 <= bytes.count }
        }

        private func attempt(_ what: String, _ bytes: [UInt8]) {
            progress.note(what)
            var attempt = image
            attempt.files[harmed] = bytes
            if let problem = attempt.exercise() { Issue.record("\(kind), \(what), seed \(seed): \(problem)") }
        }

        /// Sets each field to many values; then several at once.
        func changeFields() throws {
            var generator = SeededGenerator(seed: seed)
            for field in fields {
                let old = bytes.number(at: field.offset, width: field.width)
                for value in hostileValues(width: field.width, was: old, using: &generator) where value != old {
                    attempt(
                        "\(field.width) bytes at \(field.offset) = \(value)",
                        bytes.setting(value, at: field.offset, width: field.width))
                }
            }
            for _ in 0..<40 {
                var harmed = bytes
                var what = "at once"
                for _ in 0..<Int.random(in: 2...4, using: &generator) {
                    guard let field = fields.randomElement(using: &generator) else { break }
                    let old = harmed.number(at: field.offset, width: field.width)
                    let value =
                        hostileValues(width: field.width, was: old, using: &generator)
                        .randomElement(using: &generator) ?? 0
                    harmed = harmed.setting(value, at: field.offset, width: field.width)
                    what += ", \(field.offset) = \(value)"
                }
                attempt(what, harmed)
            }
        }

        /// Cuts the file off at every sector, and at odd places.
        func truncate() throws {
            let count = bytes.count
            let odd = [
                1, 3, 64, 71, 419, 420, 421, 455, 457, 511, 513, 523, 1023, count / 2 + 1, count - 511, count - 1,
            ]
            for length in Array(stride(from: 0, to: count, by: 512)) + odd where 0..<count ~= length {
                attempt("ends after \(length) of \(count) bytes", bytes.prefixArray(length))
            }
        }
    }
}

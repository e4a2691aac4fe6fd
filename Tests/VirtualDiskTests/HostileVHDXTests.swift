import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Every byte of a VHDX is hostile, as ``HostileVMDKTests`` has it for VMDK. Checksums are put right, so that what is
/// behind them is reached.
struct HostileVHDXTests {
    @Test(arguments: HostileVHDX.allCases) func anyFieldHoldsAnything(_ kind: HostileVHDX) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileVHDX, seed = seed as UInt64, path = folder.path as String] in
            try HostileVHDXSession(kind, seed: seed, notes: path).changeFields()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    @Test(arguments: HostileVHDX.allCases) func fileEndsAnywhere(_ kind: HostileVHDX) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileVHDX, seed = seed as UInt64, path = folder.path as String] in
            try HostileVHDXSession(kind, seed: seed, notes: path).truncate()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    /// A log with as many changes as are believed, and with more: each of them is a page in another place.
    @Test func logOfManyChanges() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            try HostileVHDXSession(.dynamic, seed: 1, notes: path).fillLog()
        }
        HostileVMDKTests.explain(result, "", folder)
    }

    /// Disks, tables and logs as large as can be, in files that are as long as no file system has them.
    @Test func hugeImages() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            try HostileVHDXSession(.child, seed: 1, notes: path).makeHuge()
        }
        HostileVMDKTests.explain(result, "", folder)
    }
}

/// The kinds of images that are harmed.
enum HostileVHDX: String, Sendable, Codable, CaseIterable, CustomTestStringConvertible {
    case dynamic
    case child
    case unclean

    var testDescription: String { rawValue }

    static let size = 5 << 19

    /// Makes an image in `folder`; answers its files, of which the first one is harmed.
    func make(in folder: TemporaryFolder) throws -> [String] {
        switch self {
        case .dynamic: try VHD.create(folder, "disk.vhdx", size: Self.size, blockSize: 1 << 20)
        case .child:
            try VHD.create(folder, "base.vhdx", size: Self.size, blockSize: 2 << 20)
            try Self.fill(folder.file("base.vhdx"))
            try VHD.create(folder, "disk.vhdx", blockSize: 1 << 20, parent: "base.vhdx")
        case .unclean:
            let path = try VHD.create(folder, "open.vhdx", size: Self.size, blockSize: 1 << 20)
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            try disk.write([1, 2, 3], at: 5000)
            try disk.flush()
            try disk.write([4, 5, 6], at: 2 << 20)
            try disk.flush()
            try Peer.run("cp", "--sparse=always", path, folder.file("disk.vhdx"))
            try disk.close()
            return ["disk.vhdx"]
        }
        try Self.fill(folder.file("disk.vhdx"))
        return self == .child ? ["disk.vhdx", "base.vhdx"] : ["disk.vhdx"]
    }

    private static func fill(_ path: String) throws {
        try VHD.write(path, [(1, 100, 600), (3, 1 << 20, 66_000), (4, UInt64(size) - 700, 700)])
    }

    /// A number in the file.
    struct Field {
        let name: String
        let offsets: [Int]
        let width: Int
    }

    /// The fields of headers and region tables (in both copies at once), of the log, the metadata and the table.
    func fields(_ bytes: [UInt8]) throws -> [Field] {
        var fields: [Field] = []
        for (place, width) in [(8, 8), (48, 8), (64, 2), (66, 2), (68, 4), (72, 8)] {
            fields.append(Field(name: "header+\(place)", offsets: VHDX.headers.map { $0 + place }, width: width))
        }
        for (place, width) in [(8, 4), (16, 8), (32, 8), (40, 4), (44, 4), (64, 8), (72, 4)] {
            fields.append(Field(name: "regions+\(place)", offsets: VHDX.regionTables.map { $0 + place }, width: width))
        }
        let metadata = Int(bytes.number(at: VHDX.regionTables[0] + 32, width: 8))
        for (place, width) in [(10, 2), (32, 8), (48, 4), (52, 4), (56, 4), (80, 4), (176, 4)] {
            fields.append(Field(name: "metadata+\(place)", offsets: [metadata + place], width: width))
        }
        for (place, width) in [(0, 4), (4, 4), (8, 8), (32, 4), (36, 4)] {
            fields.append(Field(name: "item+\(place)", offsets: [metadata + (64 << 10) + place], width: width))
        }
        if self == .child {
            let locator = metadata + Int(bytes.number(at: metadata + 32 + 5 * 32 + 16, width: 4))
            for (place, width) in [(0, 4), (18, 2), (20, 4), (24, 4), (28, 2), (30, 2), (36, 4)] {
                fields.append(Field(name: "locator+\(place)", offsets: [locator + place], width: width))
            }
        }
        if self == .unclean {
            let starts = stride(from: VHDX.log, to: VHDX.metadata, by: 4096).filter {
                bytes.slice($0, 4).elementsEqual("loge".utf8)
            }
            for start in starts {
                for (place, width) in [
                    (8, 4), (12, 4), (16, 8), (24, 4), (48, 8), (56, 8), (64, 4), (72, 8), (80, 8), (88, 8),
                    (4096 + 4, 4), (4096 + 8, 8),
                ] { fields.append(Field(name: "log \(start)+\(place)", offsets: [start + place], width: width)) }
            }
        }
        let table = Int(bytes.number(at: VHDX.regionTables[0] + 64, width: 8))
        for entry in [0, 1, 2, 4096] where entry < 3 || self == .child {
            fields.append(Field(name: "entry \(entry)", offsets: [table + entry * 8], width: 8))
        }
        return fields
    }
}

/// Attempts on one kind of image, one after the other.
struct HostileVHDXSession {
    private let image: HostileImage
    private let kind: HostileVHDX
    private let seed: UInt64
    private let progress: Progress
    private let bytes: [UInt8]
    private let folder: TemporaryFolder

    init(_ kind: HostileVHDX, seed: UInt64, notes: String) throws {
        alarm(600)  // whatever goes on for ever ends here
        self.kind = kind
        self.seed = seed
        folder = try TemporaryFolder()
        progress = try Progress(folder: notes)
        let names = try kind.make(in: folder)
        image = try HostileImage(path: folder.file(names[0]), folder: folder, names: names)
        bytes = image.files[image.path] ?? []
        try #require(image.exercise() == nil)
    }

    private func attempt(_ what: String, _ changed: [UInt8], length: UInt64? = nil) {
        progress.note(what)
        var harmed = image
        harmed.files[image.path] = changed
        harmed.length = length
        if let problem = harmed.exercise() { Issue.record("\(kind), \(what), seed \(seed): \(problem)") }
    }

    private func setting(_ bytes: [UInt8], _ value: UInt64, _ field: HostileVHDX.Field) -> [UInt8] {
        field.offsets.reduce(bytes) { $0.setting(value, at: $1, width: field.width) }
    }

    /// Sets each field to many values, the checksum right or wrong; then several at once.
    func changeFields() throws {
        var generator = SeededGenerator(seed: seed)
        let fields = try kind.fields(bytes)
        for field in fields {
            let old = bytes.number(at: field.offsets[0], width: field.width)
            // Each attempt goes over many MiB: a part of the values at a time.
            let values = hostileValues(width: field.width, was: old, using: &generator)
            for value in values.shuffled(using: &generator).prefix(12) where value != old {
                let changed = setting(bytes, value, field)
                attempt("\(field.name) = \(value)", VHDX.withChecksums(changed))
                if value % 17 == 0 { attempt("\(field.name) = \(value), wrong checksum", changed) }
            }
        }
        for _ in 0..<60 {
            var changed = bytes
            var what = "at once"
            for _ in 0..<Int.random(in: 2...4, using: &generator) {
                guard let field = fields.randomElement(using: &generator) else { break }
                let old = bytes.number(at: field.offsets[0], width: field.width)
                let values = hostileValues(width: field.width, was: old, using: &generator)
                let value = values.randomElement(using: &generator) ?? 0
                changed = setting(changed, value, field)
                what += ", \(field.name) = \(value)"
            }
            attempt(what, VHDX.withChecksums(changed))
        }
    }

    /// Cuts the file off in each structure and at odd places.
    func truncate() throws {
        let pieces =
            Array(stride(from: 0, to: 512 << 10, by: 16 << 10))
            + stride(from: 512 << 10, to: bytes.count, by: 128 << 10)
        let odd = [1, 7, 8, 519, 520, 4097, (64 << 10) + 4095, bytes.count / 2 + 1, bytes.count - 1, bytes.count - 511]
        for length in pieces + odd where 0..<bytes.count ~= length {
            attempt("ends after \(length) of \(bytes.count)", bytes.prefixArray(length))
        }
    }

    /// Puts a log of 16 MiB behind everything, with one entry of zeros that are to be written page by page.
    func fillLog() throws {
        for count in [1 << 17, 1 << 17 + 1, 1 << 19 - 2] {
            let sectors = (64 + 32 * count + 4095) / 4096
            var entry = FieldWriter(count: sectors * 4096)
            entry.bytes("loge".utf8, at: 0)
            entry.littleEndian(UInt32(sectors * 4096), at: 8)
            entry.littleEndian(UInt64(1), at: 16)
            entry.littleEndian(UInt32(count), at: 24)
            entry.bytes([UInt8](1...16), at: 32)
            let place = bytes.count
            let free = UInt64(place + (32 << 20))
            for number in 0..<count {
                let start = 64 + 32 * number
                entry.bytes("zero".utf8, at: start)
                entry.littleEndian(UInt64(4096), at: start + 8)
                entry.littleEndian(free + UInt64(number) * 8192, at: start + 16)
                entry.littleEndian(UInt64(1), at: start + 24)
            }
            let end = free + UInt64(count) * 8192
            entry.littleEndian(UInt64(place), at: 48)
            entry.littleEndian(end, at: 56)
            var log = entry.bytes
            VHDX.putChecksum(&log, 0..<log.count)
            var changed = bytes
            for start in VHDX.headers {
                changed.replaceSubrange(start + 48..<start + 64, with: [UInt8](1...16))
                changed = changed.setting(16 << 20, at: start + 68, width: 4)
                changed = changed.setting(UInt64(place), at: start + 72, width: 8)
            }
            changed = VHDX.withChecksums(changed) + log
            attempt("\(count) changes", changed, length: UInt64(place + (48 << 20)))
        }
    }

    /// Sizes, tables and logs as large as the fields can say, with a file that is as long.
    func makeHuge() throws {
        let metadata = Int(bytes.number(at: VHDX.regionTables[0] + 32, width: 8)) + (64 << 10)
        for size in [1 << 40, 64 << 40] as [UInt64] {
            for blockShift in [20, 25, 28] as [UInt64] {
                for fileShift in [31, 41, 46, 63] as [UInt64] {
                    for logLength in [1 << 20, 0xfff0_0000] as [UInt64] {
                        var changed = bytes.setting(size, at: metadata + 8, width: 8)
                        changed = changed.setting(1 << blockShift, at: metadata, width: 4)
                        for start in VHDX.regionTables {
                            changed = changed.setting(0xfff0_0000, at: start + 72, width: 4)
                            if logLength > 1 << 20 { changed = changed.setting(6 << 30, at: start + 64, width: 8) }
                        }
                        for start in VHDX.headers {
                            changed = changed.setting(logLength, at: start + 68, width: 4)
                            if logLength > 1 << 20 { changed = changed.setting(1 << 30, at: start + 72, width: 8) }
                            if blockShift == 25 { changed[start + 48] = 1 }
                        }
                        attempt(
                            "size \(size), blocks 2^\(blockShift), file 2^\(fileShift), log \(logLength)",
                            VHDX.withChecksums(changed), length: 1 << fileShift)
                    }
                }
            }
        }
    }
}

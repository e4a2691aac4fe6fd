import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Every byte of a VHD is hostile, as ``HostileVMDKTests`` has it for VMDK. Checksums are put right, so that what is
/// behind them is reached.
struct HostileVHDTests {
    @Test(arguments: HostileVHD.allCases) func anyFieldHoldsAnything(_ kind: HostileVHD) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileVHD, seed = seed as UInt64, path = folder.path as String] in
            try HostileVHDSession(kind, seed: seed, notes: path).changeFields()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    @Test(arguments: HostileVHD.allCases) func fileEndsAnywhere(_ kind: HostileVHD) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileVHD, seed = seed as UInt64, path = folder.path as String] in
            try HostileVHDSession(kind, seed: seed, notes: path).truncate()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    /// Images that say they are as large as can be, in files that are as long as no file system has them.
    @Test func hugeImages() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            try HostileVHDSession(.child, seed: 1, notes: path).makeHuge()
        }
        HostileVMDKTests.explain(result, "", folder)
    }
}

/// The kinds of images that are harmed.
enum HostileVHD: String, Sendable, Codable, CaseIterable, CustomTestStringConvertible {
    case fixed
    case dynamic
    case smallBlocks
    case child

    var testDescription: String { rawValue }

    static let size = (200 << 10) + 512

    /// Makes an image in `folder`; answers its files, of which the first one is harmed.
    func make(in folder: TemporaryFolder) throws -> [String] {
        switch self {
        case .fixed: try VHD.create(folder, size: Self.size, variant: "fixed")
        case .dynamic: try VHD.create(folder, size: Self.size, blockSize: 64 << 10)
        case .smallBlocks: try VHD.create(folder, size: Self.size, blockSize: 4096)
        case .child:
            try VHD.create(folder, "base.vhd", size: Self.size, blockSize: 16 << 10)
            try Self.fill(folder.file("base.vhd"))
            try VHD.create(folder, blockSize: 64 << 10, parent: "base.vhd")
        }
        try Self.fill(folder.file("disk.vhd"))
        return self == .child ? ["disk.vhd", "base.vhd"] : ["disk.vhd"]
    }

    private static func fill(_ path: String) throws {
        try VHD.write(path, [(1, 100, 600), (2, 40_000, 600), (3, 66_000, 600), (4, UInt64(size) - 700, 700)])
    }

    /// A number in the file, with the structure whose checksum it changes.
    struct Field {
        let name: String
        let offset: Int
        let width: Int
    }

    /// The fields of footers, header, locators, table and a bitmap.
    func fields(_ bytes: [UInt8]) -> [Field] {
        var fields: [Field] = []
        let footer = [(8, 4), (12, 4), (16, 8), (24, 4), (28, 4), (40, 8), (48, 8), (56, 4), (60, 4), (68, 4), (84, 1)]
        for start in self == .fixed ? [bytes.count - 512] : [0, bytes.count - 512] {
            fields += footer.map { Field(name: "footer at \(start)+\($0.0)", offset: start + $0.0, width: $0.1) }
        }
        guard self != .fixed else { return fields }
        let header = [(8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (40, 4), (56, 4), (64, 2)]
        fields += header.map { Field(name: "header+\($0.0)", offset: 512 + $0.0, width: $0.1) }
        if self == .child {
            for (place, width) in [(0, 4), (4, 4), (8, 4), (16, 8)] {
                fields.append(Field(name: "locator+\(place)", offset: 512 + 576 + place, width: width))
            }
        }
        for entry in 0..<3 { fields.append(Field(name: "entry \(entry)", offset: 1536 + entry * 4, width: 4)) }
        let start = bytes.slice(1536, 4).reduce(0) { $0 << 8 | Int($1) } * 512
        if start + 8 < bytes.count { fields.append(Field(name: "bitmap", offset: start, width: 8)) }
        return fields
    }
}

/// Attempts on one kind of image, one after the other.
struct HostileVHDSession {
    private let image: HostileImage
    private let kind: HostileVHD
    private let seed: UInt64
    private let progress: Progress
    private let bytes: [UInt8]
    private let folder: TemporaryFolder

    init(_ kind: HostileVHD, seed: UInt64, notes: String) throws {
        alarm(300)  // whatever goes on for ever ends here
        self.kind = kind
        self.seed = seed
        folder = try TemporaryFolder()
        progress = try Progress(folder: notes)
        let names = try kind.make(in: folder)
        image = try HostileImage(path: folder.file(names[0]), folder: folder, names: names)
        bytes = image.files[image.path] ?? []
        try #require(image.exercise() == nil)
    }

    private func attempt(_ what: String, _ changed: [UInt8]) {
        progress.note(what)
        var harmed = image
        harmed.files[image.path] = changed
        if let problem = harmed.exercise() { Issue.record("\(kind), \(what), seed \(seed): \(problem)") }
    }

    /// Sets each field to many values, the checksum right or wrong; then several at once.
    func changeFields() throws {
        var generator = SeededGenerator(seed: seed)
        let fields = kind.fields(bytes)
        for field in fields {
            let old = Self.number(bytes, field)
            for value in hostileValues(width: field.width, was: old, using: &generator) where value != old {
                let changed = Self.setting(bytes, value, field)
                attempt("\(field.name) = \(value)", Self.withChecksums(changed))
                if value % 5 == 0 { attempt("\(field.name) = \(value), wrong checksum", changed) }
            }
        }
        for _ in 0..<60 {
            var changed = bytes
            var what = "at once"
            // Both footers alike, so that neither stands in for the other.
            let isInFooters = Bool.random(using: &generator)
            for _ in 0..<Int.random(in: 2...4, using: &generator) {
                guard let field = fields.randomElement(using: &generator) else { break }
                let values = hostileValues(width: field.width, was: Self.number(bytes, field), using: &generator)
                let value = values.randomElement(using: &generator) ?? 0
                changed = Self.setting(changed, value, field)
                what += ", \(field.name) = \(value)"
            }
            if isInFooters, kind != .fixed {
                changed.replaceSubrange(changed.count - 512..<changed.count, with: changed[0..<512])
            }
            attempt(what, Self.withChecksums(changed))
        }
    }

    /// Cuts the file off at every sector and at odd places.
    func truncate() throws {
        let odd = [1, 3, 7, 8, 511, 513, 1023, bytes.count / 2 + 1, bytes.count - 1, bytes.count - 511]
        for length in Array(stride(from: 0, to: bytes.count, by: 512)) + odd where 0..<bytes.count ~= length {
            attempt("ends after \(length) of \(bytes.count)", bytes.prefixArray(length))
        }
    }

    /// Sizes and tables as large as the fields can say, with a file that is as long.
    func makeHuge() throws {
        for shift in [32, 40, 41, 44, 50, 54, 62] as [UInt64] {
            for blockShift in [12, 21, 31] as [UInt64] {
                for fileShift in [31, 41, 44, 63] as [UInt64] {
                    var changed = Self.setting(bytes, 1 << shift, .init(name: "", offset: 48, width: 8))
                    let entries = min(UInt64(UInt32.max), (1 << shift) >> blockShift)
                    changed = Self.setting(changed, entries, .init(name: "", offset: 512 + 28, width: 4))
                    changed = Self.setting(changed, 1 << blockShift, .init(name: "", offset: 512 + 32, width: 4))
                    changed.replaceSubrange(changed.count - 512..<changed.count, with: changed[0..<512])
                    let what = "size 2^\(shift), blocks 2^\(blockShift), file 2^\(fileShift)"
                    progress.note(what)
                    var harmed = image
                    harmed.files[image.path] = Self.withChecksums(changed)
                    harmed.length = 1 << fileShift
                    if let problem = harmed.exercise() { Issue.record("\(what): \(problem)") }
                }
            }
        }
    }

    // MARK: - Bytes

    private static func number(_ bytes: [UInt8], _ field: HostileVHD.Field) -> UInt64 {
        bytes.slice(field.offset, field.width).reduce(0) { $0 << 8 | UInt64($1) }
    }

    private static func setting(_ bytes: [UInt8], _ value: UInt64, _ field: HostileVHD.Field) -> [UInt8] {
        var changed = bytes
        for index in 0..<field.width {
            changed[field.offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * (field.width - 1 - index)))
        }
        return changed
    }

    /// Puts the checksums of whatever looks like a footer or a header right.
    private static func withChecksums(_ bytes: [UInt8]) -> [UInt8] {
        var result = bytes
        for (start, count, place, cookie) in [
            (0, 512, 64, "conectix"), (bytes.count - 512, 512, 64, "conectix"), (512, 1024, 36, "cxsparse"),
        ] where start >= 0 && start + count <= bytes.count && bytes[start..<start + 8].elementsEqual(cookie.utf8) {
            for index in 0..<4 { result[start + place + index] = 0 }
            let sum = ~result[start..<start + count].reduce(UInt32(0)) { $0 &+ UInt32($1) }
            for index in 0..<4 {
                result[start + place + index] = UInt8(truncatingIfNeeded: sum >> UInt32(24 - 8 * index))
            }
        }
        return result
    }
}

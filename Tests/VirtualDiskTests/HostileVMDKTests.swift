import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Every byte of an image is hostile: whatever a field holds and wherever the file ends, the answer is an error or a
/// disk, in little time and memory, and never the end of the process.
///
/// The attempts run in a process of their own, which says what it was at when it died of something.
struct HostileVMDKTests {
    @Test(arguments: HostileKind.allCases) func anyFieldHoldsAnything(_ kind: HostileKind) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileKind, seed = seed as UInt64, path = folder.path as String] in
            try HostileSession(kind, seed: seed, notes: path).changeFields()
        }
        Self.explain(result, "seed \(seed)", folder)
    }

    @Test(arguments: HostileKind.allCases) func fileEndsAnywhere(_ kind: HostileKind) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as HostileKind, seed = seed as UInt64, path = folder.path as String] in
            try HostileSession(kind, seed: seed, notes: path).truncate()
        }
        Self.explain(result, "seed \(seed)", folder)
    }

    /// What the process was at when it died.
    static func explain(_ result: ExitTest.Result?, _ context: String, _ folder: TemporaryFolder) {
        guard result == nil else { return }
        let words = String(decoding: ((try? folder.read("errors")) ?? []).prefix(3000), as: UTF8.self)
        Issue.record("\(context): died of \(Progress.last(in: folder, "progress")): \(words)")
    }
}

/// The kinds of images that are harmed.
enum HostileKind: String, Sendable, Codable, CaseIterable, CustomTestStringConvertible {
    case zeroGrains
    case child
    case unclean
    case esxSparse
    case split
    case flat
    case stream
    case streamOfOurs
    case seSparse

    var testDescription: String { rawValue }

    /// Bytes of the disk.
    private static let size = (100 << 10) + 512

    /// Makes an image in `folder`; answers its files, of which the first is the image and the last is harmed too.
    func make(in folder: TemporaryFolder) throws -> [String] {
        var new = NewImage(path: folder.file("disk.vmdk"))
        new.size = UInt64(Self.size)
        new.blockSize = 4096
        switch self {
        case .unclean: break
        case .zeroGrains: new.options = ["zeroed-grain": "on"]
        case .child:
            try HostileKind.fill(try Self.newBase(folder))
            new.parent = folder.file("base.vmdk")
        case .esxSparse: new.variant = "esx-sparse"
        case .split:
            new.variant = "split"
            new.options = ["split-size": "65536"]
        case .flat: (new.variant, new.blockSize) = ("fixed", nil)
        case .stream, .streamOfOurs: return try makeStream(folder)
        case .seSparse:
            var builder = SESparseBuilder(sectorCount: Self.size / 512)
            for grain in [0, 2, 24, 25] { builder.grains[grain] = .data([UInt8](repeating: 7, count: 4096)) }
            (builder.grains[3], builder.grains[4]) = (.zero, .unmapped)
            try folder.write(builder.encode(), to: "disk-sesparse.vmdk")
            try folder.write(Array(builder.descriptor(naming: "disk-sesparse.vmdk").utf8), to: "disk.vmdk")
            return ["disk.vmdk", "disk-sesparse.vmdk"]
        }
        try new.create()
        try Self.fill(new.path)
        return try names(folder)
    }

    private func names(_ folder: TemporaryFolder) throws -> [String] {
        switch self {
        case .zeroGrains: return ["disk.vmdk"]
        case .unclean:
            let file = try FileStorage(path: folder.file("disk.vmdk"), isWritable: true)
            try file.write([1], at: 72, for: .header)
            return ["disk.vmdk"]
        case .child: return ["disk.vmdk", "base.vmdk"]
        case .esxSparse: return ["disk-delta.vmdk"]
        case .split: return ["disk.vmdk", "disk-s001.vmdk", "disk-s002.vmdk"]
        case .flat: return ["disk.vmdk", "disk-flat.vmdk"]
        case .stream, .streamOfOurs, .seSparse: return []
        }
    }

    private static func newBase(_ folder: TemporaryFolder) throws -> String {
        var base = NewImage(path: folder.file("base.vmdk"))
        base.size = UInt64(size)
        base.blockSize = 8192
        try base.create()
        return base.path
    }

    /// Data in some grains, one zeroed, the last one among them.
    private static func fill(_ path: String) throws {
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        let disk = try Disk.open(path, options: options)
        for offset in [100, 9000, 40_000, 66_000, size - 700] {
            try disk.write([UInt8](repeating: UInt8(truncatingIfNeeded: offset >> 8), count: 600), at: UInt64(offset))
        }
        try disk.discard(offset: 8192, length: 8192)
        try disk.close()
    }

    /// By qemu-img; its header has the directory's place.
    private func makeStream(_ folder: TemporaryFolder) throws -> [String] {
        var content = [UInt8](repeating: 0, count: Self.size)
        for index in content.indices where index / 30_000 % 2 == 0 {
            content[index] = UInt8(truncatingIfNeeded: index &* index >> 7)
        }
        let source = try folder.write(content, to: "source.raw")
        try Peer.run(
            "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", source,
            folder.file("disk.vmdk"))
        guard self == .streamOfOurs else { return ["disk.vmdk"] }
        // As VMware's are: the header leaves it to the footer to say where the directory lies.
        let bytes = try folder.read("disk.vmdk")
        try folder.write(
            bytes.setting(.max, at: 56, width: 8) + Self.footer(bytes), to: "footer.vmdk")
        return ["footer.vmdk"]
    }

    /// Footer marker, footer and end-of-stream marker.
    private static func footer(_ bytes: [UInt8]) -> [UInt8] {
        let marker = [UInt8](repeating: 0, count: 512).setting(1, at: 0, width: 8).setting(3, at: 12, width: 4)
        return marker + bytes.slice(0, 512) + [UInt8](repeating: 0, count: 512)
    }

    // MARK: - Where it is harmed

    /// Which file: the first one where another is not meant.
    func isHarmed(_ path: String) -> Bool {
        switch self {
        case .child: path.hasSuffix("/base.vmdk")
        case .split: path.hasSuffix("/disk-s001.vmdk")
        case .seSparse: path.hasSuffix("/disk-sesparse.vmdk")
        default: true
        }
    }

    /// Attempts of one sort at most, picked at random: those with several files cost more. Torture makes them all.
    var attemptLimit: Int {
        if unsafe getenv("VDMOUNT_TORTURE") != nil { return .max }
        return [.child, .split, .flat, .seSparse].contains(self) ? 40 : .max
    }

    /// Whether the numbers in the text of its descriptor are changed too.
    var hasChangedText: Bool { [.zeroGrains, .child, .flat].contains(self) }

    /// A number in a file.
    struct Field {
        let name: String
        let file: String
        let offset: Int
        let width: Int
    }

    /// The fields of a file with this content: of its header, its tables and its markers.
    func fields(of name: String, _ bytes: [UInt8]) -> [Field] {
        let magic = String(decoding: bytes.prefix(4), as: UTF8.self)
        if magic == "KDMV" { return Self.hostedFields(name, bytes) }
        if magic == "COWD" { return Self.cowdFields(name, bytes) }
        guard bytes.count > 4096, bytes.number(at: 0, width: 8) == 0xcafe_babe else { return [] }
        let builder = SESparseBuilder(sectorCount: Int(bytes.number(at: 16, width: 8)))
        var fields = (0..<26).map { Field(name: "header+\($0 * 8)", file: name, offset: $0 * 8, width: 8) }
        for offset in [512, 512 + 8, 512 + 24, 512 + 32] {
            fields.append(Field(name: "volatile", file: name, offset: offset, width: 8))
        }
        fields.append(Field(name: "directory", file: name, offset: builder.directory.sector * 512, width: 8))
        for entry in [0, 2, 3, 25] {
            fields.append(
                Field(name: "entry \(entry)", file: name, offset: builder.tables.sector * 512 + entry * 8, width: 8))
        }
        return fields
    }

    private static func hostedFields(_ name: String, _ bytes: [UInt8]) -> [Field] {
        let starts = [0] + (bytes.number(at: 56, width: 8) == .max ? [bytes.count - 1024] : [])
        var fields: [Field] = []
        for start in starts {
            for (offset, width) in [
                (4, 4), (8, 4), (12, 8), (20, 8), (28, 8), (36, 8), (44, 4), (48, 8), (56, 8), (64, 8), (72, 1),
                (73, 4),
                (77, 2),
            ] { fields.append(Field(name: "header+\(offset)", file: name, offset: start + offset, width: width)) }
        }
        let header = starts[starts.count - 1]
        for place in [48, 56] {
            let directory = Int(clamping: bytes.number(at: header + place, width: 8)) &* 512
            guard directory > 0, directory < bytes.count - 4 else { continue }
            fields.append(Field(name: "directory at \(place)", file: name, offset: directory, width: 4))
            let table = Int(bytes.number(at: directory, width: 4)) * 512
            guard table > 0, table < bytes.count - 512 else { continue }
            for entry in [0, 1, 24, 25] where entry * 4 + 4 + table <= bytes.count {
                fields.append(
                    Field(name: "entry \(entry) at \(place)", file: name, offset: table + entry * 4, width: 4))
            }
            let grain = Int(bytes.number(at: table, width: 4)) * 512
            guard bytes.number(at: 77, width: 2) == 1, grain > 0, grain + 16 < bytes.count else { continue }
            for (offset, width) in [(0, 8), (8, 4), (12, 4)] {
                fields.append(Field(name: "marker+\(offset)", file: name, offset: grain + offset, width: width))
            }
        }
        return fields
    }

    private static func cowdFields(_ name: String, _ bytes: [UInt8]) -> [Field] {
        var fields = (1..<11).map { Field(name: "header+\($0 * 4)", file: name, offset: $0 * 4, width: 4) }
        fields.append(Field(name: "unclean", file: name, offset: 1648, width: 4))
        let directory = Int(bytes.number(at: 20, width: 4)) * 512
        fields.append(Field(name: "directory", file: name, offset: directory, width: 4))
        let table = Int(bytes.number(at: directory, width: 4)) * 512
        for entry in [0, 1, 24, 25] where table > 0 {
            fields.append(Field(name: "entry \(entry)", file: name, offset: table + entry * 4, width: 4))
        }
        return fields
    }
}

/// Attempts on one kind of image, one after the other.
struct HostileSession {
    private let image: HostileImage
    private let kind: HostileKind
    private let seed: UInt64
    private let progress: Progress
    private let folder: TemporaryFolder

    init(_ kind: HostileKind, seed: UInt64, notes: String) throws {
        alarm(300)  // whatever goes on for ever ends here
        self.kind = kind
        self.seed = seed
        folder = try TemporaryFolder()
        progress = try Progress(folder: notes)
        let names = try kind.make(in: folder)
        image = try HostileImage(path: folder.file(names[0]), folder: folder, names: names)
        try #require(image.exercise() == nil)
    }

    /// Makes attempts, not more than the kind allows.
    private func make(
        _ attempts: [(what: String, harmed: HostileImage)], using generator: inout SeededGenerator
    ) {
        let chosen =
            attempts.count > kind.attemptLimit
            ? Array(attempts.shuffled(using: &generator).prefix(kind.attemptLimit)) : attempts
        for attempt in chosen {
            progress.note(attempt.what)
            if let problem = attempt.harmed.exercise() {
                Issue.record("\(kind), \(attempt.what), seed \(seed): \(problem)")
            }
        }
    }

    /// Sets each field to many values; then several at once; then the numbers of the descriptor.
    func changeFields() throws {
        var generator = SeededGenerator(seed: seed)
        let files = image.files.filter { kind.isHarmed($0.key) }.sorted { $0.key < $1.key }
        let fields = files.flatMap { kind.fields(of: $0.key, $0.value) }
        var attempts: [(String, HostileImage)] = []
        for field in fields {
            let bytes = image.files[field.file] ?? []
            let old = bytes.number(at: field.offset, width: field.width)
            for value in hostileValues(width: field.width, was: old, using: &generator) where value != old {
                var harmed = image
                harmed.files[field.file] = bytes.setting(value, at: field.offset, width: field.width)
                attempts.append(("\(field.name) of \(field.file) = \(value)", harmed))
            }
        }
        make(attempts, using: &generator)
        make((0..<30).map { _ in severalFields(fields, &generator) }, using: &generator)
        if kind.hasChangedText { make(files.flatMap { changedNumbers($0.key, $0.value) }, using: &generator) }
    }

    private func severalFields(
        _ fields: [HostileKind.Field], _ generator: inout SeededGenerator
    ) -> (String, HostileImage) {
        var harmed = image
        var what = "at once"
        for _ in 0..<Int.random(in: 2...4, using: &generator) {
            guard let field = fields.randomElement(using: &generator), let bytes = harmed.files[field.file] else {
                break
            }
            let old = bytes.number(at: field.offset, width: field.width)
            let values = hostileValues(width: field.width, was: old, using: &generator)
            let value = values.randomElement(using: &generator) ?? 0
            harmed.files[field.file] = bytes.setting(value, at: field.offset, width: field.width)
            what += ", \(field.name) = \(value)"
        }
        return (what, harmed)
    }

    /// Puts other numbers in the place of those that stand in the text of a descriptor, but for those of identifiers.
    private func changedNumbers(_ file: String, _ bytes: [UInt8]) -> [(String, HostileImage)] {
        let start = String(decoding: bytes.prefix(4), as: UTF8.self) == "KDMV" ? 512 : 0
        let text = bytes.dropFirst(start).prefix(2048)
        guard String(decoding: text.prefix(24), as: UTF8.self).hasPrefix("# Disk Desc") else { return [] }
        var attempts: [(String, HostileImage)] = []
        let numbers = [
            "0", "-1", "9223372036854775808", "18446744073709551615", "18446744073709551616", "18014398509481984",
            "0x10",
            "4294967296", "",
        ]
        for line in text.prefix(while: { $0 != 0 }).split(separator: 10) {
            let words = String(decoding: line, as: UTF8.self)
            guard !words.contains("uuid"), !words.contains("CID"), !words.contains("comment") else { continue }
            var index = line.startIndex
            while let first = line[index...].firstIndex(where: isDigit) {
                let end = line[first...].firstIndex { !isDigit($0) } ?? line.endIndex
                for number in numbers {
                    attempts.append(putting(number, inPlaceOf: first..<end, of: file, bytes, isAlone: start == 0))
                }
                index = end
            }
        }
        return attempts
    }

    private func putting(
        _ number: String, inPlaceOf range: Range<Int>, of file: String, _ bytes: [UInt8], isAlone: Bool
    ) -> (String, HostileImage) {
        var harmed = image
        var text = bytes
        text.replaceSubrange(range, with: number.utf8)
        let longer = isAlone ? 0 : number.utf8.count - range.count
        // Inside a sparse file what follows the text stays where it is.
        if longer > 0 { text.removeSubrange(2048..<2048 + longer) }
        if longer < 0 { text.insert(contentsOf: repeatElement(0, count: -longer), at: 2048) }
        harmed.files[file] = text
        return ("number at \(range.lowerBound) of \(file) = '\(number)'", harmed)
    }

    private func isDigit(_ byte: UInt8) -> Bool { UInt8(ascii: "0")...UInt8(ascii: "9") ~= byte }

    /// Cuts each file off at every sector, and at odd places.
    func truncate() throws {
        var generator = SeededGenerator(seed: seed)
        var attempts: [(String, HostileImage)] = []
        for (file, bytes) in image.files.sorted(by: { $0.key < $1.key }) where kind.isHarmed(file) {
            let odd = [1, 3, 4, 7, 8, 511, 513, 1023, bytes.count / 2 + 1, bytes.count - 1, bytes.count - 511]
            for length in Array(stride(from: 0, to: bytes.count, by: 512)) + odd where 0..<bytes.count ~= length {
                var harmed = image
                harmed.files[file] = bytes.prefixArray(length)
                attempts.append(("\(file) ends after \(length) of \(bytes.count) bytes", harmed))
            }
        }
        make(attempts, using: &generator)
    }
}

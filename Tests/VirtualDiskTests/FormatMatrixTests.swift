import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// Every format through everything: made by us or by another program, read, written, put under a snapshot, the snapshot
/// written and discarded from, opened again and checked, with everybody who can read it agreeing on what it holds. And
/// every format over every other.
struct FormatMatrixTests {
    private static let size = (5 << 20) + 3 * 512
    private static let pool = RandomPool(seed: 3)

    /// A format, and how its image is made.
    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        /// By us; nil: by QEMU.
        let making: FormatRow.Making?
        let peerOptions: String
        var testDescription: String {
            guard let making else { return "\(row.format) by QEMU, \(peerOptions)" }
            let block = making.blockSize.map { ", blocks of \($0)" } ?? ""
            let options = making.options.map { ", \($0.key)=\($0.value)" }.sorted().joined()
            return "\(row.format)\(making.variant.map { ", \($0)" } ?? "")\(block)\(options)"
        }
    }

    static let cases = FormatRow.all.flatMap { row in
        row.ours.map { Case(row: row, making: $0, peerOptions: "") }
            + row.theirs.map { Case(row: row, making: nil, peerOptions: $0) }
    }

    /// A child's format and its parent's.
    struct Pair: Sendable, CustomTestStringConvertible {
        let child: FormatRow
        let parent: FormatRow
        var testDescription: String { "\(child.format) over \(parent.format)" }
    }

    static let pairs = FormatRow.all.filter { $0.child != nil }.flatMap { child in
        FormatRow.all.map { Pair(child: child, parent: $0) }
    }

    @Test func everyFormatHasARow() {
        for format in ImageFormats.all {
            let row = FormatRow.all.first { $0.format == format.name }
            #expect(row != nil, "add a row for \(format.name) to FormatRow.rows")
            guard let row else { continue }
            let isWritten = format.capabilities.contains("write")
            let isMade = isWritten && format.capabilities.contains { $0.hasPrefix("create") }
            #expect(
                !isMade || !row.ours.isEmpty || row.child != nil, "\(format.name) can be made, and its row says not how"
            )
            #expect(
                format.capabilities.contains("differencing") == (row.child != nil),
                "\(format.name) and its row disagree on whether it has children")
            for making in row.ours + [row.child].compactMap({ $0 }) {
                let known = format.variants.map(\.name)
                #expect(making.variant.map(known.contains) ?? true, "\(format.name) has no \(making.variant ?? "")")
            }
        }
    }

    /// What a format says that it can do is what its images do.
    @Test(arguments: FormatRow.all.filter { !$0.ours.isEmpty }) func saysWhatItCanDo(_ row: FormatRow) throws {
        let format = try #require(ImageFormats.all.first { $0.name == row.format })
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file(row.file("disk")))
        (image.format, image.size) = (row.format, 4 << 20)
        try image.create()
        let information = try ImageInformation.read(image.path)[0]
        #expect(format.capabilities.contains("uuids") == (information.identity.uuid != nil))
        #expect(format.capabilities.contains("uuids") == information.settableFields.contains(.uuid))
        var options = row.options(isWritable: true)
        options.format = row.format
        if format.capabilities.contains("compact") {
            _ = try ImageCompaction.run(image.path, options: options)
        } else {
            #expect(throws: DiskError.self) { try ImageCompaction.run(image.path, options: options) }
        }
        // An option that it does not have is refused with the names of those that it has.
        image.path = folder.file(row.file("other"))
        image.options = ["no-such": "1"]
        do throws(DiskError) {
            try image.create()
            Issue.record("the option is taken")
        } catch {
            #expect(error.kind == .invalidArgument && "\(error)".contains("option"), "\(error)")
            for name in format.options { #expect("\(error)".contains(name), "\(error)") }
        }
        #expect(try FileFinder().file(at: image.path) == nil)
    }

    // MARK: - One format

    @Test(arguments: cases) func imageLivesThroughEverything(_ test: Case) throws {
        let folder = try TemporaryFolder()
        var image = try MatrixImage(test, in: folder, size: Self.size, pool: Self.pool)
        if test.making == nil { try image.peerWrites() }
        guard image.row.isWritable else { return try image.weRead("what the other program wrote") }
        try image.weWrite("first")
        if image.row.peer != nil { try image.peerWrites() }
        try image.weRead("after the other program")
        guard image.row.child != nil else { return }
        let before = try folder.snapshotOfAll()
        try image.makeSnapshot(image.row)
        try image.weRead("through the snapshot")
        try image.weWrite("in the snapshot")
        if Judge.canFollow(image.row, image.below) {
            try image.peerWrites()
            try image.weRead("what the other program wrote into the snapshot")
        }
        try image.makeSnapshot(image.row)
        try image.weWrite("in a snapshot of the snapshot")
        for (name, bytes) in before {
            #expect(try folder.read(name) == bytes, "\(test): \(name) was changed under its snapshots")
        }
    }

    // MARK: - Chains of several formats

    @Test(arguments: pairs) func everyFormatOverEveryOther(_ pair: Pair) throws {
        let folder = try TemporaryFolder()
        var image = try MatrixImage.base(pair.parent, in: folder, size: Self.size, pool: Self.pool)
        try image.weWrite("the parent")
        let before = try folder.snapshotOfAll()
        guard try image.canHaveChild(pair.child) else {
            #expect(throws: DiskError.self) { try image.makeSnapshot(pair.child) }
            #expect(try folder.snapshotOfAll() == before, "\(pair): a creation that failed left something")
            return
        }
        try image.makeSnapshot(pair.child)
        try image.weRead("through the child")
        try image.weWrite("in the child")
        try image.makeSnapshot(pair.child)
        try image.weWrite("in the child's child")
        for (name, bytes) in before {
            #expect(try folder.read(name) == bytes, "\(pair): \(name) was changed under its child")
        }
    }

    /// All formats that have children in one chain, over each as the lowest: each one over the next that it can name.
    @Test(arguments: 0..<FormatRow.all.count) func allFormatsInOneChain(_ first: Int) throws {
        let rows = Array(FormatRow.all[first...]) + Array(FormatRow.all[..<first])
        let folder = try TemporaryFolder()
        var image = try MatrixImage.base(rows[0], in: folder, size: Self.size, pool: Self.pool)
        try image.weWrite("the lowest")
        var waiting = rows.dropFirst().filter { $0.child != nil }
        while let next = try waiting.firstIndex(where: { try image.canHaveChild($0) }) {
            try image.makeSnapshot(waiting.remove(at: next))
            try image.weWrite("layer \(image.below.count)")
        }
        #expect(image.below.count > 0)
        #expect(waiting.allSatisfy { $0.linksByUUIDAlone }, "\(waiting.map(\.format)) found no place in the chain")
    }
}

/// An image, or a chain of them, with what its disk must hold.
struct MatrixImage {
    /// The format of the top image, and of those below it, the next one first.
    private(set) var row: FormatRow
    private(set) var below: [FormatRow] = []
    private(set) var path: String
    private(set) var model: DiskModel
    private let folder: TemporaryFolder
    private let pool: RandomPool
    private var generator: SeededGenerator
    private let seed: UInt64
    private var count = 0

    private var context: String { ([row] + below).map(\.format).joined(separator: " over ") + ", seed \(seed)" }

    init(_ test: FormatMatrixTests.Case, in folder: TemporaryFolder, size: Int, pool: RandomPool) throws {
        row = test.row
        self.folder = folder
        self.pool = pool
        seed = UInt64.random(in: 0...UInt64.max)
        generator = SeededGenerator(seed: seed)
        path = folder.file(row.file("base"))
        model = DiskModel(size: 0)
        if let making = test.making {
            try create(making, size: size, parent: nil)
        } else {
            let options = test.peerOptions.isEmpty ? [] : ["-o", test.peerOptions]
            let command = ["qemu-img", "create", "-q", "-f", row.peer ?? ""] + options + [path, "\(size)"]
            let result = try Subprocess.run(command)
            guard result.status == 0 else { throw DiskError(.system, "\(command): \(result.errorText)") }
        }
        // Another program may make a disk larger than it was asked for (VHD: whole cylinders).
        let disk = try Disk.open(path, options: row.options(isWritable: false))
        model = DiskModel(size: Int(disk.size))
        try disk.close()
        #expect(model.size >= size && model.size < size + (1 << 20))
    }

    /// The lowest image of a chain; of a format that is only made over others, over a raw disk of zeros.
    static func base(
        _ row: FormatRow, in folder: TemporaryFolder, size: Int, pool: RandomPool
    ) throws -> MatrixImage {
        if row.ours.first != nil || !row.theirs.isEmpty {
            let test = FormatMatrixTests.Case(
                row: row, making: row.ours.first, peerOptions: row.ours.isEmpty ? row.theirs[0] : "")
            return try MatrixImage(test, in: folder, size: size, pool: pool)
        }
        guard let raw = FormatRow.all.first(where: { $0.format == "raw" }) else { preconditionFailure("no raw row") }
        var image = try base(raw, in: folder, size: size, pool: pool)
        try image.makeSnapshot(row)
        return image
    }

    private func create(_ making: FormatRow.Making, size: Int?, parent: String?) throws {
        var image = NewImage(path: path)
        image.size = size.map { UInt64($0) }
        image.format = row.format
        (image.variant, image.blockSize, image.options) = (making.variant, making.blockSize, making.options)
        image.parent = parent
        if parent != nil, below.first?.mustBeNamed == true { image.parentFormat = below[0].format }
        try image.create()
    }

    /// Whether a child of that format can name this image.
    func canHaveChild(_ child: FormatRow) throws -> Bool {
        guard child.linksByUUIDAlone else { return true }
        return try ImageInformation.read(path, options: row.options(isWritable: false)).first?.identity.uuid != nil
    }

    /// Puts a new, empty image on top.
    mutating func makeSnapshot(_ child: FormatRow) throws {
        guard let making = child.child else { preconditionFailure("\(child.format) has no children") }
        let parent = path
        let old = self
        count += 1
        below.insert(row, at: 0)
        row = child
        path = folder.file(child.file("snapshot\(count)"))
        do {
            try create(making, size: nil, parent: parent)
        } catch {
            self = old
            throw error
        }
    }

    // MARK: - Use

    func weRead(_ what: String) throws {
        let disk = try Disk.open(path, options: row.options(isWritable: false))
        #expect(disk.size == UInt64(model.size), "\(context), \(what)")
        let mistake = try model.mistake(of: disk, in: 0..<model.size)
        #expect(mistake == nil, "\(context), \(what): \(mistake ?? "")")
        try ConformanceTests.expectHonestExtents(disk, model, "\(context), \(what)")
        try disk.close()
    }

    /// Writes and discards at random, in two sessions; then all who can read it are asked.
    mutating func weWrite(_ what: String) throws {
        guard row.isWritable else {
            try peerWrites()
            return try weRead(what)
        }
        for session in 0..<2 {
            let disk = try Disk.open(path, options: row.options(isWritable: true))
            for _ in 0..<12 {
                let range = place()
                if Int.random(in: 0..<4, using: &generator) == 0 {
                    try disk.discard(offset: UInt64(range.lowerBound), length: UInt64(range.count))
                    model.zero(range)
                } else {
                    let data = pool.bytes(range.count, using: &generator)
                    try disk.write(data, at: UInt64(range.lowerBound))
                    model.write(data, at: range.lowerBound)
                }
            }
            // Whole blocks of every format, and most of the disk once.
            let whole = session == 0 ? 1 << 20..<3 << 20 : 2 << 20..<model.size - 100_000
            try disk.discard(offset: UInt64(whole.lowerBound), length: UInt64(whole.count))
            model.zero(whole)
            let data = pool.bytes(200_000, using: &generator)
            try disk.write(data, at: (2 << 20) + 1000)
            model.write(data, at: (2 << 20) + 1000)
            if let mistake = try model.mistake(of: disk, in: 0..<model.size) {
                Issue.record("\(context), \(what), session \(session): \(mistake)")
            }
            try disk.close()
        }
        try weRead(what)
        try expectSound(what)
    }

    private mutating func place() -> Range<Int> {
        let unit = [512, 4096, 65_536, 1 << 20].randomElement(using: &generator) ?? 1
        let near = Int.random(in: 0...model.size / unit, using: &generator) * unit
        let start = max(0, min(model.size - 1, near + Int.random(in: -1...1, using: &generator)))
        let limit = Bool.random(using: &generator) ? 3000 : 300_000
        return start..<min(model.size, start + Int.random(in: 1...limit, using: &generator))
    }

    /// The other program writes patterns, and zeros.
    mutating func peerWrites() throws {
        guard let peer = row.peer else { return }
        var words = ["qemu-io", "-f", peer]
        for _ in 0..<6 {
            let range = place()
            let unit = below.isEmpty ? 512 : row.peerUnitInChildren
            let start = range.lowerBound / unit * unit
            let length = min(model.size - start, (range.count + unit - 1) / unit * unit)
            let value = UInt8.random(in: 1...255, using: &generator)
            let isZero = Int.random(in: 0..<3, using: &generator) == 0
            words += ["-c", isZero ? "write -z \(start) \(length)" : "write -P \(value) \(start) \(length)"]
            model.write([UInt8](repeating: isZero ? 0 : value, count: length), at: start)
        }
        let result = try Subprocess.run(words + [path])
        guard result.status == 0, !result.outputText.contains("failed") else {
            throw DiskError(.system, "\(words): \(result.outputText)\(result.errorText)")
        }
    }

    /// Our checker finds nothing, and all others who can read it see the same.
    func expectSound(_ what: String) throws {
        let report = try ImageCheck.run(path, options: row.options(isWritable: false))
        for finding in report.findings where finding.severity == .repairable || finding.severity == .loss {
            Issue.record("\(context), \(what): \(finding.message)")
        }
        do {
            let judges = try Judge.compare(row, path, over: below, with: model, in: folder)
            let isJudged = row.peer != nil && below.isEmpty || Judge.canFollow(row, below)
            #expect(judges > 0 || !isJudged, "\(context), \(what): nobody looked at it")
        } catch {
            Issue.record("\(context), \(what): \(error)")
        }
    }
}

extension TemporaryFolder {
    /// All files and what they hold.
    func snapshotOfAll() throws -> [String: [UInt8]] {
        let names = try Peer.run("ls", "-p", path).split(separator: "\n").filter { !$0.hasSuffix("/") }
        var files: [String: [UInt8]] = [:]
        for name in names { files[String(name)] = try read(String(name)) }
        return files
    }
}

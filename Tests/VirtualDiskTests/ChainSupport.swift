import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// A chain of images with content in each, and what the disk of each shows.
struct TestChain {
    static let size = (3 << 20) + 7 * 512

    let folder: TemporaryFolder
    /// The formats, the top image's first.
    let rows: [FormatRow]
    /// What the disk of each image shows.
    let models: [DiskModel]
    let seed: UInt64
    private let names: [String]

    private static let pool = RandomPool(seed: 5)

    /// - Parameter rows: The top image's first.
    /// - Parameter sizes: Of their disks.
    init(_ rows: [FormatRow], sizes: [Int]? = nil, seed: UInt64 = .random(in: 0...UInt64.max)) throws {
        self.rows = rows
        self.seed = seed
        folder = try TemporaryFolder()
        names = Self.names(rows)
        var generator = SeededGenerator(seed: seed)
        var models: [DiskModel] = []
        for number in rows.indices.reversed() {
            let size = sizes?[number] ?? Self.size
            var image = NewImage(path: folder.file(names[number]))
            image.size = UInt64(size)
            image.format = rows[number].format
            let parent = number + 1 < rows.count ? number + 1 : nil
            if let making = parent == nil ? rows[number].ours.first : rows[number].child {
                (image.variant, image.blockSize, image.options) = (making.variant, making.blockSize, making.options)
            }
            if let parent {
                image.parent = folder.file(names[parent])
                image.parentFormat = rows[parent].mustBeNamed ? rows[parent].format : nil
            }
            try image.create()
            var model = models.first.map { $0.resized(to: size) } ?? DiskModel(size: size)
            try Self.work(image.path, rows[number], &model, &generator)
            models.insert(model, at: 0)
        }
        self.models = models
    }

    /// A chain that another process has made; what it shows is not known here.
    init(existing rows: [FormatRow], in path: String) {
        self.rows = rows
        folder = TemporaryFolder(existing: path)
        names = Self.names(rows)
        models = []
        seed = 0
    }

    private static func names(_ rows: [FormatRow]) -> [String] {
        rows.indices.map { rows[$0].file($0 == rows.count - 1 ? "base" : "layer\(rows.count - 1 - $0)") }
    }

    private init(_ other: TestChain, in folder: TemporaryFolder) {
        self.folder = folder
        (rows, models, seed, names) = (other.rows, other.models, other.seed, other.names)
    }

    /// The same in another folder.
    func copy() throws -> TestChain {
        let other = try TemporaryFolder()
        try Peer.run("cp", "-r", "--sparse=always", folder.path + "/.", other.path)
        return TestChain(self, in: other)
    }

    func name(_ number: Int) -> String { names[number] }
    func path(_ number: Int) -> String { folder.file(names[number]) }

    /// Writes, and makes zeros of what images below hold.
    private static func work(
        _ path: String, _ row: FormatRow, _ model: inout DiskModel, _ generator: inout SeededGenerator
    ) throws {
        let disk = try Disk.open(path, options: row.options(isWritable: true))
        for step in 0..<14 {
            let start = Int.random(in: 0..<model.size - 1, using: &generator)
            let limit = step % 3 == 0 ? 600_000 : 9_000
            let range = start..<min(model.size, start + Int.random(in: 1...limit, using: &generator))
            if step % 4 == 3 {
                try disk.discard(offset: UInt64(range.lowerBound), length: UInt64(range.count))
                model.zero(range)
            } else {
                let data = pool.bytes(range.count, using: &generator)
                try disk.write(data, at: UInt64(range.lowerBound))
                model.write(data, at: range.lowerBound)
            }
        }
        if model.size > 2 << 20 {
            // A whole block of most formats.
            let start = Int.random(in: 0...1, using: &generator) << 20
            try disk.discard(offset: UInt64(start), length: 1 << 20)
            model.zero(start..<start + (1 << 20))
        }
        try disk.close()
    }

    // MARK: - Merging

    func merge(
        _ pair: ChainMergeTests.Pair, _ control: OperationControl = OperationControl()
    ) throws(DiskError) -> ChainMerge.Outcome {
        var merge = ChainMerge(top: path(0))
        merge.source = .path(path(pair.from))
        merge.target = .number(pair.to)
        merge.options = rows[0].options(isWritable: false)
        return try merge.run(control)
    }

    /// What is left shows what it must, nobody else changed, and what is not needed is gone.
    func expect(_ pair: ChainMergeTests.Pair, _ before: [String: [UInt8]], _ context: String) throws {
        let kept = pair.kept
        let changed = pair.from < pair.to ? [pair.to, pair.from - 1] : [pair.to]
        let now = try folder.snapshotOfAll()
        for number in rows.indices {
            let name = names[number]
            if !kept.contains(number) {
                #expect(now[name] == nil, "\(context): \(name) is still there")
            } else if !changed.contains(number) {
                #expect(now[name] == before[name], "\(context): \(name) was changed")
            }
        }
        for (place, number) in kept.enumerated() {
            // A lower image that others were merged into shows what the uppermost of them did.
            let model = pair.from < pair.to && number == pair.to ? models[pair.from] : models[number]
            try expectShown(number, model, below: kept[(place + 1)...].map { rows[$0] }, context)
        }
    }

    /// An image, over images of these formats, shows what it must, to us and to all others who can read it.
    /// `mayLeak`: a writer of it was killed. `isResized`: libyal's programs show VHDs in the size that they had when
    /// they were made.
    func expectShown(
        _ number: Int, _ model: DiskModel, below: [FormatRow], _ context: String, isResized: Bool = false,
        mayLeak: Bool = false
    ) throws {
        var row = rows[number]
        if isResized { row.mounter = nil }
        if mayLeak, let peer = row.peer, row.isCheckedByPeer, Judge.canFollow(row, below) {
            let result = try Subprocess.run(["qemu-img", "check", "-q", "-f", peer, path(number)])
            #expect(result.status == 0 || result.status == 3, "\(context): \(result.outputText)\(result.errorText)")
            row.isCheckedByPeer = false
        }
        let disk = try Disk.open(path(number), options: row.options(isWritable: false))
        #expect(disk.size == UInt64(model.size), "\(context): \(names[number])")
        #expect(disk.layers.count == below.count + 1, "\(context): \(disk.layers)")
        if disk.size == UInt64(model.size), let mistake = try model.mistake(of: disk, in: 0..<model.size) {
            Issue.record("\(context), seed \(seed): \(names[number]): \(mistake)")
        }
        try disk.close()
        let report = try ImageCheck.run(path(number), options: row.options(isWritable: false))
        for finding in report.findings where finding.severity == .repairable || finding.severity == .loss {
            Issue.record("\(context), seed \(seed): \(finding.file): \(finding.message)")
        }
        do {
            _ = try Judge.compare(row, path(number), over: below, with: model, in: folder)
        } catch {
            Issue.record("\(context), seed \(seed): \(error)")
        }
    }
}

/// Expects an error of that kind, with these words in it.
func expectRefused(
    _ kind: DiskError.Kind, _ words: String, _ body: () throws(DiskError) -> Void
) {
    do throws(DiskError) {
        try body()
        Issue.record("done instead of refused")
    } catch {
        #expect(error.kind == kind && (words.isEmpty || "\(error)".contains(words)), "\(error)")
    }
}

import DiskFormats
import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// What images say of themselves and of their parents is changed: they show the same bytes afterwards, to everybody who
/// can read them, and at every moment at which the power may fail.
struct EditingTests {
    static let rows = FormatRow.all.filter { ["vhd", "vhdx", "qcow2", "qed"].contains($0.format) }

    /// A format, and how its images are made.
    static let cases: [ResizedImage.Case] = rows.flatMap { row in
        [row.ours[0], row.dense].map { ResizedImage.Case(row: row, making: $0) }
    }

    private static let size = (3 << 20) + 3 * 512
    private static let parentSize = (5 << 20) + 512

    /// Opens an image alone, for changes.
    private static func edit(
        _ path: String, _ row: FormatRow, recordedBy log: CrashLog? = nil,
        _ body: (any EditableBackend) throws -> Void
    ) throws {
        var options = row.options(isWritable: true)
        if let log { options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 } }
        let opener = ChainOpener(options: options)
        let layer = try opener.open(path, mode: .readWrite, withParents: false)[0]
        let image = try #require(layer.backend as? any EditableBackend)
        try image.prepareForUse()
        defer { for file in opener.finder.locked.withLock({ $0 }) { file.unlockImage() } }
        do { try body(image) } catch {
            try image.close()
            throw error
        }
        try image.close()
    }

    /// What a child is to record of an image.
    private static func describe(
        _ path: String, for child: String, _ row: FormatRow
    ) throws -> CreateRequest.ParentDescription {
        var options = row.options(isWritable: false)
        options.locksImages = false
        let layer = try ChainOpener(options: options).open(path, mode: .readOnly, withParents: true)[0]
        return NewImage.describe(layer, for: child)
    }

    /// Another base that holds what the one of `image` holds.
    private static func copyBase(_ image: ResizedImage, _ test: ResizedImage.Case, to name: String) throws -> String {
        let base = try Disk.open(image.folder.file(test.row.file("base")))
        var copy = NewImage(path: image.folder.file(name))
        (copy.size, copy.format, copy.blockSize) = (base.size, test.row.format, test.making.blockSize)
        copy.options = test.making.options
        try copy.create()
        let disk = try Disk.open(copy.path, options: test.row.options(isWritable: true))
        try disk.write(try base.read(at: 0, count: Int(base.size)), at: 0)
        try disk.close()
        try base.close()
        return copy.path
    }

    private func makeChild(
        _ test: ResizedImage.Case, in folder: TemporaryFolder, seed: UInt64 = 31
    ) throws -> ResizedImage {
        var generator = SeededGenerator(seed: seed)
        return try ResizedImage(
            test, in: folder, size: Self.size, parentSize: Self.parentSize, using: &generator)
    }

    // MARK: - Parents

    @Test(arguments: cases) func anotherParent(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        let image = try makeChild(test, in: folder)
        // Short and long names by turns.
        for name in ["other", String(repeating: "long-name-", count: 20), "x", String(repeating: "n", count: 200)] {
            let other = try Self.copyBase(image, test, to: test.row.file(name))
            let parent = try Self.describe(other, for: image.path, test.row)
            try Self.edit(image.path, test.row) { editable in
                var changes = ImageChanges()
                changes.parent = .image(parent)
                try editable.apply(changes)
                #expect(editable.parentLink?.paths.contains { $0.hasSuffix(test.row.file(name)) } == true)
            }
            try Peer.run("mv", folder.file(test.row.file("base")), folder.file("away"))
            try image.expectSound("\(test.testDescription), over \(name)")
            let chain = try ImageInformation.read(
                image.path, options: test.row.options(isWritable: false), wholeChain: true)
            #expect(chain.count == 2 && chain[1].path == other, "\(test.testDescription): \(chain.map(\.path))")
            try Peer.run("mv", folder.file("away"), folder.file(test.row.file("base")))
        }
    }

    /// An image over zeros becomes a base, and gets a parent of zeros again.
    @Test(arguments: cases) func baseAndChild(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var image = try makeChild(test, in: folder)
        // The parent's bytes go, where the child has none.
        let base = folder.file(test.row.file("base"))
        let disk = try Disk.open(image.path, options: test.row.options(isWritable: false))
        var held = DiskModel(size: image.model.size)
        try disk.forEachExtent(offset: 0, length: disk.size) { extent in
            if case .data(0, _, _) = extent.source {
                held.write(image.model.bytes.slice(Int(extent.offset), Int(extent.length)), at: Int(extent.offset))
            }
            return true
        }
        try disk.close()
        try Self.edit(image.path, test.row) { editable in
            var changes = ImageChanges()
            changes.parent = .some(.none)
            try editable.apply(changes)
            #expect(editable.parentLink == nil)
        }
        try Peer.run("rm", base)
        image.model = held
        image.below = []
        try image.expectSound("\(test.testDescription), a base")

        var zeros = NewImage(path: folder.file(test.row.file("zeros")))
        (zeros.size, zeros.blockSize) = (UInt64(Self.parentSize), test.making.blockSize)
        try zeros.create()
        let parent = try Self.describe(zeros.path, for: image.path, test.row)
        try Self.edit(image.path, test.row) { editable in
            var changes = ImageChanges()
            changes.parent = .image(parent)
            try editable.apply(changes)
        }
        image.below = [test.row]
        try image.expectSound("\(test.testDescription), a child again")
        var generator = SeededGenerator(seed: 32)
        try image.write(30_000, at: 1_000_000, using: &generator)
        try image.expectSound("\(test.testDescription), written")
    }

    // MARK: - Fields

    static let makings: [ResizedImage.Case] = rows.flatMap { row in
        row.ours.map { ResizedImage.Case(row: row, making: $0) }
    }

    @Test(arguments: makings) func fieldsAreStoredOrRefused(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 33)
        let image = try ResizedImage(test, in: folder, size: Self.size, using: &generator)
        var wanted = ImageMetadata()
        try Self.edit(image.path, test.row) { editable in
            wanted = editable.metadata
            if editable.settableFields.contains(.uuid) { wanted.uuid = .random() }
            if editable.settableFields.contains(.modificationUUID) { wanted.modificationUUID = .random() }
            if editable.settableFields.contains(.physicalGeometry) {
                wanted.physicalGeometry = DiskGeometry(cylinders: 7, heads: 16, sectors: 63)
            }
            var changes = ImageChanges()
            changes.metadata = wanted
            try editable.apply(changes)
            #expect(editable.metadata == wanted, "\(test.testDescription)")
        }
        try image.expectSound("\(test.testDescription), other fields", judges: test.row.format != "vhd")
        let before = try folder.snapshotOfAll()
        try Self.edit(image.path, test.row) { editable in
            #expect(editable.metadata == wanted, "\(test.testDescription), opened again")
            var changes = ImageChanges()
            changes.metadata.comment = "a comment"
            #expect { try editable.apply(changes) } throws: { ($0 as? DiskError)?.kind == .unsupported }
        }
        #expect(try folder.snapshotOfAll() == before, "\(test.testDescription): a refused change changed a file")
    }

    @Test(arguments: [false, true]) func identityIsKeptWhereAsked(keeps: Bool) throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.vhdx"))
        (new.size, new.blockSize) = (4 << 20, 1 << 20)
        try new.create()
        func open(_ mode: OpenMode) throws -> any ImageBackend {
            let storage = try FileStorage(path: new.path, isWritable: mode == .readWrite)
            return try Formats.all.driver(named: "vhdx").open(
                OpenRequest(
                    storage: storage, path: new.path, mode: mode, cache: TableCache(capacity: 1 << 20),
                    companions: FileFinder(), keepsIdentity: keeps))
        }
        let before = try open(.readOnly).identity
        let image = try open(.readWrite)
        try image.beginWriting()
        try image.close()
        #expect(try (open(.readOnly).identity == before) == keeps)
    }

    // MARK: - Power cuts

    @Test(arguments: cases) func powerCuts(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        let image = try makeChild(test, in: folder, seed: 34)
        let other = try Self.copyBase(image, test, to: test.row.file("other"))
        let parent = try Self.describe(other, for: image.path, test.row)
        var generator = SeededGenerator(seed: 35)
        let log = CrashLog()
        try Self.edit(image.path, test.row, recordedBy: log) { editable in
            var changes = ImageChanges()
            changes.parent = .image(parent)
            if editable.settableFields.contains(.uuid) { changes.metadata.uuid = .random() }
            try editable.apply(changes)
        }
        var replay = log.replay()
        var parents: Set<String> = []
        for cut in 0...log.count {
            for mode in [.all, .none, .some(percent: 50), .some(percent: 20)] as [CrashReplay.CutMode] {
                let files = replay.files(at: cut, mode, using: &generator)
                let context = "\(test.testDescription), cut \(cut) of \(log.count), \(mode)"
                var options = test.row.options(isWritable: cut % 2 == 0)
                options.locksImages = false
                options.wrapStorage = { storage in
                    files[storage.name].map { MemoryStorage($0, name: storage.name) } ?? storage
                }
                do {
                    let disk = try Disk.open(image.path, options: options)
                    if let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size) {
                        Issue.record("\(context): \(mistake)")
                    }
                    parents.insert(disk.current.chain.layers[1].path)
                    try disk.close()
                } catch {
                    Issue.record("\(context): \(error)")
                }
            }
        }
        #expect(parents.count == 2, "\(test.testDescription): \(parents)")
    }

    /// The image holds everything, so that it shows the same with and without its parent.
    @Test(arguments: cases) func powerCutsOfBecomingABase(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var base = NewImage(path: folder.file(test.row.file("base")))
        (base.size, base.blockSize) = (UInt64(Self.parentSize), test.making.blockSize)
        try base.create()
        var top = NewImage(path: folder.file(test.row.file("top")))
        (top.parent, top.size, top.blockSize) = (base.path, UInt64(Self.size), test.making.blockSize)
        try top.create()
        var model = DiskModel(size: Self.size)
        var generator = SeededGenerator(seed: 36)
        let disk = try Disk.open(top.path, options: test.row.options(isWritable: true))
        for _ in 0..<10 {
            let bytes = ResizedImage.pool.bytes(20_000, using: &generator)
            let start = Int.random(in: 0..<Self.size - 20_000, using: &generator)
            try disk.write(bytes, at: UInt64(start))
            model.write(bytes, at: start)
        }
        try disk.close()
        let log = CrashLog()
        try Self.edit(top.path, test.row, recordedBy: log) { editable in
            var changes = ImageChanges()
            changes.parent = .some(.none)
            try editable.apply(changes)
        }
        var replay = log.replay()
        for cut in 0...log.count {
            for mode in [.all, .none, .some(percent: 50)] as [CrashReplay.CutMode] {
                let files = replay.files(at: cut, mode, using: &generator)
                var options = test.row.options(isWritable: cut % 2 == 0)
                options.locksImages = false
                options.wrapStorage = { storage in
                    files[storage.name].map { MemoryStorage($0, name: storage.name) } ?? storage
                }
                do {
                    let disk = try Disk.open(top.path, options: options)
                    if let mistake = try model.mistake(of: disk, in: 0..<model.size) {
                        Issue.record("\(test.testDescription), cut \(cut) of \(log.count), \(mode): \(mistake)")
                    }
                    try disk.close()
                } catch {
                    Issue.record("\(test.testDescription), cut \(cut) of \(log.count), \(mode): \(error)")
                }
            }
        }
    }
}

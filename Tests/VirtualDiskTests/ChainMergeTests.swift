import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Images of a chain are merged, in every format, in both directions, neighbours and not, with and without images
/// above: the disk shows what it did, all who can read it agree, and only the images involved changed.
struct ChainMergeTests {
    /// What is merged into what: numbers from the top of a chain of four images.
    struct Pair: Sendable, CustomTestStringConvertible {
        let from: Int
        let to: Int
        var testDescription: String { "\(from) into \(to)" }
        /// The images that are left, in numbers from the top.
        var kept: [Int] { (0..<4).filter { from < to ? !(from..<to).contains($0) : !(to + 1..<from + 1).contains($0) } }
    }

    static let pairs = (0..<4).flatMap { from in
        (0..<4).filter { $0 != from }.map { Pair(from: from, to: $0) }
    }

    static let rows = FormatRow.all.filter { ["vmdk", "vdi", "vhd", "vhdx", "qcow2", "qed"].contains($0.format) }

    @Test(arguments: rows) func imagesBecomeOne(_ row: FormatRow) throws {
        let original = try TestChain([row, row, row, row])
        for pair in Self.pairs {
            let chain = try original.copy()
            let before = try chain.folder.snapshotOfAll()
            let outcome = try chain.merge(pair)
            let context = "\(row.format), \(pair), seed \(chain.seed)"
            #expect(!outcome.obsoleteFiles.isEmpty, "\(context)")
            try chain.expect(pair, before, context)
        }
    }

    /// Chains of several formats, each over the others as it may be.
    @Test(arguments: 0..<6) func imagesOfSeveralFormatsBecomeOne(_ turn: Int) throws {
        let names = ["qcow2", "vmdk", "vhd", "qed", "vhdx", "vdi"]
        let turned = names[turn...] + names[..<turn]
        let rows = turned.prefix(4).compactMap { name in FormatRow.all.first { $0.format == name } }
        // A VDI needs a parent with a UUID; what lies at the bottom is put there by the tests of one format.
        let usable = rows.filter { !$0.linksByUUIDAlone }
        let original = try TestChain(usable + usable.prefix(4 - usable.count))
        for pair in Self.pairs {
            let chain = try original.copy()
            let before = try chain.folder.snapshotOfAll()
            _ = try chain.merge(pair)
            try chain.expect(pair, before, "\(chain.rows.map(\.format)), \(pair), seed \(chain.seed)")
        }
    }

    @Test(arguments: rows) func theShortFormIsACommit(_ row: FormatRow) throws {
        let chain = try TestChain([row, row])
        let top = chain.path(0)
        let outcome = try ChainMerge(top: top).run()
        #expect(outcome.source == top && outcome.target == chain.path(1) && outcome.obsoleteFiles.contains(top))
        #expect(try !chain.folder.snapshotOfAll().keys.contains { top.hasSuffix("/" + $0) })
        try chain.expectShown(1, chain.models[0], below: [], "\(row.format)")
    }

    @Test func keepingLeavesAllImagesAsTheyAre() throws {
        let row = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try TestChain([row, row, row])
        let before = try chain.folder.snapshotOfAll()
        var merge = ChainMerge(top: chain.path(0))
        merge.target = .number(2)
        merge.keepsFiles = true
        _ = try merge.run()
        for number in 0..<2 {
            let name = chain.name(number)
            #expect(try chain.folder.read(name) == before[name], "\(name)")
        }
        try chain.expectShown(0, chain.models[0], below: Array(chain.rows[1...]), "the kept top")
        try chain.expectShown(2, chain.models[0], below: [], "the target")
    }

    // MARK: - Sizes

    @Test(arguments: rows) func aLowerImageBecomesAsLargeAsWhatIsMergedIntoIt(_ row: FormatRow) throws {
        let size = TestChain.size
        for sizes in [[size + (1 << 20), size + (1 << 20), size], [size, size - (1 << 20), size + (2 << 20)]] {
            let chain = try TestChain([row, row, row], sizes: sizes)
            _ = try chain.merge(Pair(from: 1, to: 2))
            try chain.expectShown(0, chain.models[0], below: [row], "\(row.format), \(sizes)", isResized: true)
            let other = try TestChain([row, row, row], sizes: [sizes[1], sizes[1], sizes[2]])
            if sizes[1] < sizes[2], row.format != "qcow2" { continue }
            _ = try other.merge(Pair(from: 0, to: 2))
            try other.expectShown(2, other.models[0], below: [], "\(row.format), \(sizes), the top", isResized: true)
        }
    }

    @Test(arguments: rows) func aSmallerImageBetweenCutsOffWhatLiesBelow(_ row: FormatRow) throws {
        let size = TestChain.size
        let original = try TestChain([row, row, row, row], sizes: [size, size, size - (1 << 20), size])
        for pair in [Pair(from: 2, to: 1), Pair(from: 1, to: 3), Pair(from: 1, to: 2), Pair(from: 2, to: 0)] {
            let chain = try original.copy()
            _ = try chain.merge(pair)
            let below = pair.kept.dropFirst().map { chain.rows[$0] }
            try chain.expectShown(0, chain.models[0], below: Array(below), "\(row.format), \(pair)")
        }
    }

    // MARK: - Refusals

    @Test func anotherChildIsNotLost() throws {
        let row = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try TestChain([row, row, row])
        var other = NewImage(path: chain.folder.file("other.qcow2"))
        other.parent = chain.path(2)
        try other.create()
        let before = try chain.folder.snapshotOfAll()
        var merge = ChainMerge(top: chain.path(0))
        merge.source = .number(1)
        expectRefused(.refused, "other.qcow2") { () throws(DiskError) in _ = try merge.run() }
        // The top image of the chain is not what is named.
        let inner = ChainMerge(top: chain.path(1))
        expectRefused(.refused, chain.name(0)) { () throws(DiskError) in _ = try inner.run() }
        #expect(try chain.folder.snapshotOfAll() == before)
        // Into the image above, what lies at the bottom goes away all the same.
        merge.source = .number(2)
        merge.target = .number(1)
        expectRefused(.refused, "other.qcow2") { () throws(DiskError) in _ = try merge.run() }
        merge.source = .number(1)
        merge.target = .number(0)
        _ = try merge.run()
        try chain.expectShown(0, chain.models[0], below: [row], "what no other image needs")
        merge.source = .number(0)
        merge.target = nil
        merge.ignoresOtherChildren = true
        _ = try merge.run()
        try chain.expectShown(2, chain.models[0], below: [], "forced")
    }

    /// Internal snapshots of an image that goes away would go with it; those of one that stays, stay.
    @Test func internalSnapshotsAreNotLost() throws {
        let row = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try TestChain([row, row])
        try Peer.run("qemu-img", "snapshot", "-c", "below", chain.path(1))
        let content = try ImageInformation.read(chain.path(0))
        #expect(content[0].snapshots.isEmpty)
        try Peer.run("qemu-img", "snapshot", "-c", "inside", chain.path(0))
        let before = try chain.folder.snapshotOfAll()
        var merge = ChainMerge(top: chain.path(0))
        expectRefused(.losesData, "1 internal snapshot") { () throws(DiskError) in _ = try merge.run() }
        expectRefused(.losesData, "1 internal snapshot") { () throws(DiskError) in _ = try DelegatedMerge(merge) }
        #expect(try chain.folder.snapshotOfAll() == before)
        merge.keepsFiles = true
        _ = try merge.run()
        #expect(try ImageInformation.read(chain.path(0))[0].snapshots.map(\.name) == ["inside"])
        merge.keepsFiles = false
        merge.ignoresOtherChildren = true
        _ = try merge.run()
        #expect(try ImageInformation.read(chain.path(1))[0].snapshots.map(\.name) == ["below"])
        try chain.expectShown(1, chain.models[0], below: [], "forced")
    }

    @Test func whatCannotBeIsSaid() throws {
        let row = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try TestChain([row, row])
        let before = try chain.folder.snapshotOfAll()
        var merge = ChainMerge(top: chain.path(0))
        merge.source = .number(1)
        expectRefused(.invalidArgument, "no parent") { () throws(DiskError) in _ = try merge.run() }
        merge.source = .number(7)
        expectRefused(.invalidArgument, "0 to 1") { () throws(DiskError) in _ = try merge.run() }
        merge.source = .number(0)
        merge.target = .number(0)
        expectRefused(.invalidArgument, "itself") { () throws(DiskError) in _ = try merge.run() }
        merge.source = .path(#filePath)
        merge.target = .number(1)
        expectRefused(.invalidArgument, "none of the images") { () throws(DiskError) in _ = try merge.run() }
        #expect(try chain.folder.snapshotOfAll() == before)
    }

    /// Over an image with an identity an overlay goes into it; over one without, it would not know it afterwards.
    @Test func overlaysGoIntoWhatTheyKnow() throws {
        let overlay = try #require(FormatRow.all.first { $0.format == "overlay" })
        let vmdk = try #require(FormatRow.all.first { $0.format == "vmdk" })
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        let chain = try TestChain([overlay, vmdk])
        _ = try ChainMerge(top: chain.path(0)).run()
        try chain.expectShown(1, chain.models[0], below: [], "an overlay over VMDK")
        let other = try TestChain([overlay, raw])
        let before = try other.folder.snapshotOfAll()
        expectRefused(.unsupported, "convert") { () throws(DiskError) in
            _ = try ChainMerge(top: other.path(0)).run()
        }
        #expect(try other.folder.snapshotOfAll() == before)
    }

    // MARK: - Stopping

    @Test(arguments: rows) func stoppedAnywhereItGoesOn(_ row: FormatRow) throws {
        let original = try TestChain([row, row, row, row])
        for pair in [Pair(from: 1, to: 3), Pair(from: 3, to: 1), Pair(from: 0, to: 2)] {
            let chain = try original.copy()
            for stop in 1..<4 as Range<UInt64> {
                let stopping = StoppingControl(at: stop << 20)
                expectRefused(.cancelled, "") { () throws(DiskError) in
                    _ = try chain.merge(pair, stopping.control)
                }
                try chain.expectShown(
                    0, chain.models[0], below: Array(chain.rows[1...]), "\(row.format), \(pair), stopped")
            }
            _ = try chain.merge(pair)
            try chain.expectShown(
                pair.kept[0], chain.models[0], below: pair.kept.dropFirst().map { chain.rows[$0] },
                "\(row.format), \(pair), gone on")
        }
    }
}

/// Stops an operation when it has come so far.
struct StoppingControl {
    let control: OperationControl

    init(at limit: UInt64) {
        let box = Locked<OperationControl?>(nil)
        let made = OperationControl { progress in
            if progress.done >= limit { box.withLock { $0 }?.cancel() }
        }
        box.withLock { $0 = made }
        control = made
    }
}

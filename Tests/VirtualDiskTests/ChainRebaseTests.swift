import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// An image gets another parent: its disk shows what it did, or, where that is wanted, what it must over the new one.
struct ChainRebaseTests {
    static let rows = ChainMergeTests.rows

    /// Over the base, over none, over an image of another format, and over one of another size.
    @Test(arguments: rows) func theDiskShowsWhatItDid(_ row: FormatRow) throws {
        let original = try TestChain([row, row, row])
        let chain = try original.copy()
        let before = try chain.folder.snapshotOfAll()
        try ChainRebase(chain.path(0), parent: chain.path(2)).run()
        try chain.expectShown(0, chain.models[0], below: [row], "\(row.format) over the base")
        for number in 1..<3 { #expect(try chain.folder.read(chain.name(number)) == before[chain.name(number)]) }

        let flat = try original.copy()
        try ChainRebase(flat.path(0), parent: nil).run()
        try Peer.run("rm", flat.path(1), flat.path(2))
        try flat.expectShown(0, flat.models[0], below: [], "\(row.format) over none")

        // QCOW2 has no UUID, by which alone a VDI knows its parent.
        for size in row.linksByUUIDAlone ? [] : [TestChain.size - (1 << 20), TestChain.size + (1 << 20)] {
            let other = try original.copy()
            let qcow2 = try #require(FormatRow.all.first { $0.format == "qcow2" })
            let new = try TestChain([qcow2], sizes: [size])
            try Peer.run("cp", new.path(0), other.folder.file("new.qcow2"))
            try ChainRebase(other.path(0), parent: other.folder.file("new.qcow2")).run()
            try other.expectShown(0, other.models[0], below: [qcow2], "\(row.format) over QCOW2 of \(size) bytes")
        }
    }

    /// A parent that was renamed: only the link changes, and the old one need not be there.
    @Test(arguments: rows) func aParentThatWasRenamedIsFoundAgain(_ row: FormatRow) throws {
        let chain = try TestChain([row, row])
        let renamed = chain.folder.file(row.file("renamed"))
        try Peer.run("mv", chain.path(1), renamed)
        var rebase = ChainRebase(chain.path(0), parent: renamed)
        rebase.isUnsafe = true
        try rebase.run()
        try chain.expectShown(0, chain.models[0], below: [row], "\(row.format)")
        // A copy that another program has changed since: what it records of itself is recorded anew.
        let disk = try Disk.open(renamed, options: row.options(isWritable: true))
        try disk.write([UInt8](repeating: 9, count: 512), at: 0)
        try disk.close()
        try rebase.run()
        _ = try Disk.open(chain.path(0), options: row.options(isWritable: false))
    }

    @Test func anImageIsNotItsOwnParent() throws {
        let row = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try TestChain([row, row, row])
        let before = try chain.folder.snapshotOfAll()
        for isUnsafe in [false, true] {
            for (image, parent) in [(1, 0), (2, 0), (1, 1)] {
                var rebase = ChainRebase(chain.path(image), parent: chain.path(parent))
                rebase.isUnsafe = isUnsafe
                #expect(throws: DiskError.self) { try rebase.run() }
            }
        }
        #expect(try chain.folder.snapshotOfAll() == before)
    }

    /// What the image cannot name is refused before anything is copied.
    @Test func aParentThatCannotBeNamedIsRefusedAtOnce() throws {
        let row = try #require(FormatRow.all.first { $0.format == "vdi" })
        let qcow2 = try #require(FormatRow.all.first { $0.format == "qcow2" })
        let chain = try TestChain([row, row])
        let other = try TestChain([qcow2])
        let before = try chain.folder.snapshotOfAll()
        let control = OperationControl()
        var rebase = ChainRebase(chain.path(0), parent: other.path(0))
        rebase.options.allowedFolders = [other.folder.path]
        do throws(DiskError) {
            try rebase.run(control)
            Issue.record("done instead of refused")
        } catch {
            #expect(error.kind == .unsupported && "\(error)".contains("UUID"), "\(error)")
        }
        #expect(control.progress.phase.isEmpty)
        #expect(try chain.folder.snapshotOfAll() == before)
    }

    // MARK: - Snapshots

    @Test(arguments: rows) func snapshotsAreNamedInTurn(_ row: FormatRow) throws {
        let chain = try TestChain([row])
        let first = try ImageSnapshot(of: chain.path(0)).create()
        #expect(first == chain.folder.file("base-001.\(row.format)"))
        let second = try ImageSnapshot(of: first).create()
        #expect(second == chain.folder.file("base-002.\(row.format)"))
        let disk = try Disk.open(second, options: row.options(isWritable: true))
        #expect(disk.layers.map(\.format) == [row.format, row.format, row.format])
        let mistake = try chain.models[0].mistake(of: disk, in: 0..<chain.models[0].size)
        #expect(mistake == nil)
        // Who writes to an image is not disturbed.
        #expect(throws: DiskError.self) { _ = try ImageSnapshot(of: second).create() }
        try disk.close()
    }

    @Test func overWhatHasNoChildrenAnotherFormatIsTaken() throws {
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        let chain = try TestChain([raw])
        var snapshot = ImageSnapshot(of: chain.path(0))
        snapshot.format = "raw"
        let path = try snapshot.create()
        #expect(path == chain.folder.file("base-001.qcow2"))
        #expect(try ImageInformation.read(path, wholeChain: true).map(\.format) == ["qcow2", "raw"])
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// The ways in which a disk can be opened.
struct OpeningTests {
    private static let qcow2 = FormatRow.all.filter { $0.format == "qcow2" }

    @Test(arguments: ChainMergeTests.rows) func imageByImage(_ row: FormatRow) throws {
        let chain = try TestChain([row, row, row])
        // Where the files lie, and what they are called, does not count.
        let other = try TemporaryFolder()
        var images: [Disk.ImageFile] = []
        for number in [2, 1, 0] {
            try Peer.run("mkdir", "\(other.path)/\(number)")
            try Peer.run("cp", chain.path(number), "\(other.path)/\(number)/image")
            images.append(Disk.ImageFile("\(other.path)/\(number)/image", format: row.format))
        }
        let disk = try Disk.open(images: images, options: row.options(isWritable: true))
        #expect(try chain.models[0].mistake(of: disk, in: 0..<chain.models[0].size) == nil)
        try disk.write([1], at: 5)
        try disk.close()
        for wrong in [[images[1], images[0], images[2]], [images[1], images[2]], [images[0], images[0]]] {
            #expect(throws: DiskError.self) { _ = try Disk.open(images: wrong) }
        }
        #expect(throws: DiskError.self) { _ = try Disk.open(images: []) }
        if !["qcow2", "qed"].contains(row.format) {
            // Links that say more than a name tell who was left out.
            #expect(throws: DiskError.self) { _ = try Disk.open(images: [images[0], images[2]]) }
        }
    }

    @Test func whatTheSystemRefusesIsReadIfThatIsWanted() throws {
        let chain = try TestChain(Self.qcow2)
        guard try Subprocess.run(["chattr", "+i", chain.path(0)]).status == 0 else { return }
        defer { _ = try? Subprocess.run(["chattr", "-i", chain.path(0)]) }
        var options = Self.qcow2[0].options(isWritable: true)
        #expect(throws: DiskError.self) { _ = try Disk.open(chain.path(0), options: options) }
        options.allowsReadOnlyFallback = true
        let disk = try Disk.open(chain.path(0), options: options)
        #expect(!disk.isWritable)
        #expect(throws: DiskError.self) { try disk.write([1], at: 0) }
        try disk.close()
    }

    @Test func whatIsBelowIsNotStoredAgain() throws {
        let chain = try TestChain([Self.qcow2[0], Self.qcow2[0]])
        let snapshot = try ImageSnapshot(of: chain.path(0)).create()
        var options = Self.qcow2[0].options(isWritable: true)
        options.honorsSame = false
        var disk = try Disk.open(snapshot, options: options)
        let content = chain.models[0].bytes
        try disk.write(content, at: 0)
        func held(_ disk: Disk) throws -> UInt64 {
            var sum: UInt64 = 0
            try disk.forEachExtent(offset: 0, length: disk.size) { extent in
                if case .data(layer: 0, _, _) = extent.source { sum += extent.length }
                return true
            }
            return sum
        }
        #expect(try held(disk) == 0)
        try disk.write([content[100_000] ^ 1], at: 100_000)
        #expect(try held(disk) == 64 << 10)
        try disk.close()
        disk = try Disk.open(snapshot, options: Self.qcow2[0].options(isWritable: true))
        try disk.write(content.slice(0, 1 << 20), at: 0)
        #expect(try held(disk) >= 1 << 20)
        try disk.close()
        try chain.expectShown(0, chain.models[0], below: [Self.qcow2[0]], "below")
    }

    /// VirtualBox's bug gh-850: zeros in a differencing VDI.
    @Test func zerosAreStoredWhereTheyShallBe() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("zeros.vdi"))
        image.size = 8 << 20
        try image.create()
        for honors in [false, true] {
            var options = DiskOptions(isWritable: true)
            options.honorsZeros = honors
            let disk = try Disk.open(image.path, options: options)
            try disk.write([UInt8](repeating: 0, count: 2 << 20), at: 1 << 20)
            var sources: [DiskExtent.Source] = []
            try disk.forEachExtent(offset: 1 << 20, length: 2 << 20) { extent in
                sources.append(extent.source)
                return true
            }
            #expect(sources == (honors ? [.zero(layer: 0)] : [.unallocated]))
            try disk.close()
        }
    }

    @Test func writersShareAFixedImage() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("shared.vhd"))
        image.size = 1 << 20
        image.variant = "fixed"
        try image.create()
        var options = DiskOptions(isWritable: true)
        options.isShareable = true
        let first = try Disk.open(image.path, options: options)
        let second = try Disk.open(image.path, options: options)
        try first.write([1, 2, 3], at: 1000)
        #expect(try second.read(at: 1000, count: 3) == [1, 2, 3])
        try second.write([4, 5, 6], at: 2000)
        #expect(try first.read(at: 2000, count: 3) == [4, 5, 6])
        // Who does not share is refused, and keeps others out.
        #expect(throws: DiskError.self) { _ = try Disk.open(image.path, options: DiskOptions(isWritable: true)) }
        try first.close()
        try second.close()
        let alone = try Disk.open(image.path, options: DiskOptions(isWritable: true))
        #expect(throws: DiskError.self) { _ = try Disk.open(image.path, options: options) }
        try alone.close()
        var growing = NewImage(path: folder.file("growing.vhd"))
        growing.size = 1 << 20
        try growing.create()
        #expect(throws: DiskError.self) { _ = try Disk.open(growing.path, options: options) }
    }

    @Test func piecesAreReadAndWrittenAsOne() throws {
        let chain = try TestChain(Self.qcow2)
        var options = Self.qcow2[0].options(isWritable: true)
        options.isSequential = true
        let disk = try Disk.open(chain.path(0), options: options)
        var generator = SeededGenerator(seed: 1)
        let data = RandomPool(seed: 1).bytes(200_000, using: &generator)
        try data.withIOBytes { (bytes) throws(DiskError) in
            try disk.write([bytes.slice(0, 7), bytes.slice(7, 0), bytes.slice(7, 199_993)], at: 12_345)
        }
        var found = [UInt8](repeating: 0, count: 200_000)
        try found.withIOBuffer { (buffer) throws(DiskError) in
            try disk.read(into: [buffer.slice(0, 100_001), buffer.slice(100_001, 99_999)], at: 12_345)
        }
        #expect(found == data)
        #expect(throws: DiskError.self) {
            try found.withIOBuffer { (buffer) throws(DiskError) in
                try disk.read(into: [buffer, buffer], at: disk.size - 200_001)
            }
        }
        try disk.closeDeletingTop()
        #expect(try chain.folder.snapshotOfAll().isEmpty)
    }
}

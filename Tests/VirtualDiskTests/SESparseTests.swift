import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// seSparse extents are read as qemu-img reads them; what only ESX can repair is refused.
struct SESparseTests {
    /// An image of two tables with all sorts of grains, and what it must read as.
    private static func make(
        in folder: TemporaryFolder, sectors: Int = 40_003, needsReplay: Bool = false
    ) throws -> (path: String, model: DiskModel) {
        var generator = SeededGenerator(seed: 3)
        var builder = SESparseBuilder(sectorCount: sectors)
        builder.needsReplay = needsReplay
        var model = DiskModel(size: sectors * 512)
        for grain in [0, 1, 2, 7, 100, 4095, 4096, 4500, (sectors - 1) / 8] {
            let data = ConformanceTests.pool.bytes(4096, using: &generator)
            builder.grains[grain] = .data(data)
            model.write(data.prefixArray(min(4096, model.size - grain * 4096)), at: grain * 4096)
        }
        builder.grains[3] = .zero
        builder.grains[4] = .unmapped
        try folder.write(builder.encode(), to: "disk-sesparse.vmdk")
        return (try folder.write(Array(builder.descriptor(naming: "disk-sesparse.vmdk").utf8), to: "disk.vmdk"), model)
    }

    @Test func readsAsQEMUDoes() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try Self.make(in: folder)
        let disk = try Disk.open(path)
        let mistake = try model.mistake(of: disk, in: 0..<model.size)
        #expect(mistake == nil)
        try disk.close()
        try Peer.run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, folder.file("peer.raw"))
        #expect(model.mistake(in: try folder.read("peer.raw"), at: 0) == nil)
    }

    @Test func snapshotOnItIsWritable() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try Self.make(in: folder)
        var child = NewImage(path: folder.file("child.vmdk"))
        child.parent = path
        try child.create()
        let disk = try Disk.open(child.path, options: DiskOptions(isWritable: true))
        try disk.write([1, 2, 3], at: 4095)
        try disk.discard(offset: 7 * 4096, length: 4096)
        model.write([1, 2, 3], at: 4095)
        model.zero(7 * 4096..<8 * 4096)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
    }

    @Test func itselfIsNotWritable() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try Self.make(in: folder)
        #expect { try Disk.open(path, options: DiskOptions(isWritable: true)) } throws: {
            ($0 as? DiskError)?.kind == .unsupported
        }
    }

    @Test func journalToReplayIsRefused() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try Self.make(in: folder, needsReplay: true)
        #expect { try Disk.open(path) } throws: { ($0 as? DiskError)?.kind == .needsRepair }
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// Damage of each kind that `vdimg check` knows: it is found, nothing is changed without repair, and repair puts right
/// what can be.
struct CheckRepairTests {
    /// Where things lie in a new dynamic image of 8 MiB with 64 KiB grains, in bytes.
    private struct Places {
        let redundantTable: UInt64
        let table: UInt64

        init(_ image: [UInt8]) throws {
            func sector(at offset: Int) -> UInt64 {
                image[offset..<offset + 8].reversed().reduce(0) { $0 << 8 | UInt64($1) }
            }
            func entry(at offset: UInt64) -> UInt64 {
                image[Int(offset)..<Int(offset) + 4].reversed().reduce(0) { $0 << 8 | UInt64($1) }
            }
            redundantTable = entry(at: sector(at: 48) * 512) * 512
            table = entry(at: sector(at: 56) * 512) * 512
        }
    }

    /// An image with data in grains 0, 1 and 5.
    private func makeImage(_ folder: TemporaryFolder) throws -> (path: String, places: Places) {
        var image = NewImage(path: folder.path + "/disk.vmdk")
        image.size = 8 << 20
        try image.create()
        let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true))
        for grain in [0, 1, 5] as [UInt64] {
            try disk.write([UInt8](repeating: UInt8(grain + 1), count: 65_536), at: grain << 16)
        }
        try disk.close()
        return (image.path, try Places(try folder.read("disk.vmdk")))
    }

    private func poke(_ bytes: [UInt8], at offset: UInt64, _ folder: TemporaryFolder) throws {
        try FileStorage(path: folder.path + "/disk.vmdk", isWritable: true).write(bytes, at: offset, for: .table)
    }

    private func expectSound(_ path: String) throws {
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.loss) == 0 && report.remaining(.repairable) == 0, "\(report.findings)")
        let result = try Subprocess.run(["qemu-img", "check", "-f", "vmdk", path])
        #expect(result.status == 0, "\(result.outputText) \(result.errorText)")
    }

    @Test func soundImageHasNoFindings() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        let report = try ImageCheck.run(image.path)
        #expect(report.findings.isEmpty, "\(report.findings)")
        #expect(report.allocatedBlocks == 3)
        #expect(report.totalBlocks == 128)
    }

    @Test func uncleanMarkIsFoundAndCleared() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        try poke([1], at: 72, folder)
        #expect(try ImageCheck.run(image.path).remaining(.repairable) == 1)
        #expect(try folder.read("disk.vmdk")[72] == 1)
        let report = try ImageCheck.run(image.path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.remaining(.repairable) == 0)
        #expect(try folder.read("disk.vmdk")[72] == 0)
    }

    @Test(arguments: [true, false]) func copiesOfTablesAreMadeEqualAgain(primaryIsDamaged: Bool) throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        let before = try folder.read("disk.vmdk")
        // An entry beyond the file's end in one of the copies; the other is right.
        let table = primaryIsDamaged ? image.places.table : image.places.redundantTable
        try poke([0xff, 0xff, 0xff, 0x7f], at: table + 5 * 4, folder)
        #expect(try ImageCheck.run(image.path).remaining(.repairable) == 1)
        let report = try ImageCheck.run(image.path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.repairedCounts[.repairable] == 1)
        #expect(try folder.read("disk.vmdk") == before)
        try expectSound(image.path)
    }

    @Test func entriesThatLeadNowhereAreLostAndCleared() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        for table in [image.places.table, image.places.redundantTable] {
            try poke([0xff, 0xff, 0xff, 0x7f], at: table + 5 * 4, folder)
        }
        #expect(try ImageCheck.run(image.path).remaining(.loss) == 1)
        let disk = try Disk.open(image.path)
        #expect(throws: DiskError.self) { try disk.read(at: 5 << 16, count: 512) }
        #expect(try disk.read(at: 1 << 16, count: 512) == [UInt8](repeating: 2, count: 512))
        try disk.close()
        let report = try ImageCheck.run(image.path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.remaining(.loss) == 0)
        #expect(report.counts[.loss] == 1)
        try expectSound(image.path)
        let repaired = try Disk.open(image.path)
        #expect(try repaired.read(at: 5 << 16, count: 512) == [UInt8](repeating: 0, count: 512))
        try repaired.close()
    }

    @Test func grainsUsedTwiceAreLoss() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        let bytes = try folder.read("disk.vmdk")
        for table in [image.places.table, image.places.redundantTable] {
            try poke(Array(bytes[Int(table)..<Int(table) + 4]), at: table + 9 * 4, folder)
        }
        #expect(try ImageCheck.run(image.path).remaining(.loss) == 1)
    }

    @Test func uncleanImageWithTablesThatDifferOpensAndHeals() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        try poke([1], at: 72, folder)
        try poke([0, 0, 0, 0], at: image.places.redundantTable + 5 * 4, folder)
        let before = try folder.read("disk.vmdk")
        let readOnly = try Disk.open(image.path)
        #expect(try readOnly.read(at: 5 << 16, count: 512) == [UInt8](repeating: 6, count: 512))
        try readOnly.close()
        #expect(try folder.read("disk.vmdk") == before, "a read-only open changed the image")
        let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true))
        #expect(try disk.read(at: 5 << 16, count: 512) == [UInt8](repeating: 6, count: 512))
        try disk.close()
        #expect(try ImageCheck.run(image.path).findings.isEmpty)
    }
}

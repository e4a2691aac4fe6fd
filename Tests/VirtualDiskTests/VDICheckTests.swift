import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Damage of each kind that `vdimg check` knows in a VDI: found, left alone without repair, and repaired as far as can
/// be; and what must not be written to is not.
struct VDICheckTests {
    private static let map: UInt64 = 1 << 20

    /// An image of 16 blocks of 64 KiB, with data in blocks 0 to 9, block n holding bytes n + 1.
    private func make(_ folder: TemporaryFolder) throws -> String {
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = 1 << 20
        image.blockSize = 64 << 10
        try image.create()
        let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true))
        for number in 0..<10 as Range<UInt64> {
            try disk.write([UInt8](repeating: UInt8(number + 1), count: 65_536), at: number << 16)
        }
        try disk.close()
        return image.path
    }

    private func poke(_ path: String, _ value: UInt32, at offset: UInt64) throws {
        var field = FieldWriter(count: 4)
        field.littleEndian(value, at: 0)
        try FileStorage(path: path, isWritable: true).write(field.bytes, at: offset, for: .table)
    }

    private func expectRefusedForWriting(_ path: String) {
        #expect { try Disk.open(path, options: DiskOptions(isWritable: true)) } throws: { error in
            (error as? DiskError)?.kind == .needsRepair && "\(error)".contains("vdimg check --repair")
        }
    }

    /// What the blocks hold, by their first bytes.
    private func contents(_ path: String) throws -> [UInt8] {
        let disk = try Disk.open(path)
        var bytes: [UInt8] = []
        for number in 0..<16 as Range<UInt64> { bytes += try disk.read(at: number << 16, count: 1) }
        try disk.close()
        return bytes
    }

    private func repair(_ path: String, _ severity: CheckReport.Severity, in folder: TemporaryFolder) throws {
        let before = try folder.read("disk.vdi")
        let found = try ImageCheck.run(path)
        #expect(found.remaining(severity) > 0, "\(found.findings)")
        #expect(try folder.read("disk.vdi") == before)
        let report = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.findings.allSatisfy { $0.isRepaired }, "\(report.findings)")
        let after = try ImageCheck.run(path)
        #expect(after.findings.isEmpty, "\(after.findings)")
        try VDIReader.check(path)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.write([42], at: 15 << 16)
        try disk.close()
    }

    @Test func soundImageHasNoFindings() throws {
        let folder = try TemporaryFolder()
        let report = try ImageCheck.run(try make(folder))
        #expect(report.findings.isEmpty && report.allocatedBlocks == 10 && report.totalBlocks == 16)
    }

    @Test func twoBlocksInOnePlace() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        try poke(path, 3, at: Self.map + 7 * 4)
        expectRefusedForWriting(path)
        #expect(try contents(path) == [1, 2, 3, 4, 5, 6, 7, 4, 9, 10, 0, 0, 0, 0, 0, 0])
        try repair(path, .loss, in: folder)
        // The first keeps it; what the other's place held is gone, and the file is shorter.
        #expect(try contents(path) == [1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 0, 0, 0, 0, 0, 42])
    }

    @Test func entriesOutsideTheFile() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        for (block, entry) in [(2, 10), (3, 4_000_000_000), (12, 0xffff_fffd)] as [(UInt64, UInt32)] {
            try poke(path, entry, at: Self.map + block * 4)
        }
        expectRefusedForWriting(path)
        let disk = try Disk.open(path)
        #expect(
            try disk.read(at: 0, count: 131_072) == [UInt8](repeating: 1, count: 65_536)
                + [UInt8](repeating: 2, count: 65_536))
        for block in [2, 3, 12] as [UInt64] {
            #expect(throws: DiskError.self) { try disk.read(at: block << 16, count: 1) }
        }
        try disk.close()
        try repair(path, .loss, in: folder)
        #expect(try contents(path) == [1, 2, 0, 0, 5, 6, 7, 8, 9, 10, 0, 0, 0, 0, 0, 42])
    }

    @Test func fileThatEndsInsideABlock() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        let file = try FileStorage(path: path, isWritable: true)
        try file.setLength(file.length() - 30_000)
        expectRefusedForWriting(path)
        let disk = try Disk.open(path)
        #expect(try disk.read(at: 9 << 16, count: 35_000) == [UInt8](repeating: 10, count: 35_000))
        #expect(throws: DiskError.self) { try disk.read(at: 9 << 16, count: 40_000) }
        try disk.close()
        try repair(path, .loss, in: folder)
        #expect(try contents(path) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0, 0, 0, 42])
    }

    /// A count that lags behind makes other programs write over blocks; it never makes us.
    @Test(arguments: [0, 5, 9] as [UInt32]) func countThatIsTooSmall(_ count: UInt32) throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        try poke(path, count, at: 388)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.write([42], at: 14 << 16)
        try disk.close()
        #expect(try contents(path) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0, 0, 42, 0])
        // Writing put it right.
        try VDIReader.check(path)
        try poke(path, count, at: 388)
        try repair(path, .repairable, in: folder)
        #expect(try contents(path) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0, 0, 42, 42])
    }

    /// As an interrupted session leaves it.
    @Test(arguments: [11, 16] as [UInt32]) func countThatIsTooLarge(_ count: UInt32) throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        try poke(path, count, at: 388)
        #expect(try ImageCheck.run(path).remaining(.repairable) == 0)
        try repair(path, .leak, in: folder)
    }

    @Test func placesThatNothingLeadsTo() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        let identity = try ImageInformation.read(path)[0].identity
        for block in [0, 4] as [UInt64] { try poke(path, .max, at: Self.map + block * 4) }
        let file = try FileStorage(path: path, isWritable: true)
        try file.setLength(file.length() + 3 * 65_536)
        let before = try folder.read("disk.vdi")
        #expect(try ImageCheck.run(path).findings.map(\.severity) == [.leak])
        #expect(try folder.read("disk.vdi") == before)
        let report = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.remaining(.leak) == 0)
        // What the disk shows is what it was, and so is its identity: children still fit.
        #expect(try ImageInformation.read(path)[0].identity == identity)
        #expect(try contents(path) == [0, 2, 3, 4, 0, 6, 7, 8, 9, 10, 0, 0, 0, 0, 0, 0])
        #expect(try file.length() == 2 << 20 + 8 * 65_536)
        try VDIReader.check(path)
    }

    @Test func mapThatIsCutShort() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        try FileStorage(path: path, isWritable: true).setLength(Self.map + 63)
        for isWritable in [false, true] {
            #expect { try Disk.open(path, options: DiskOptions(isWritable: isWritable)) } throws: {
                "\($0)".contains("cut short")
            }
        }
        #expect(throws: DiskError.self) { try ImageCheck.run(path, repair: true) }
        let information = try ImageInformation.read(path)[0]
        #expect(information.properties.contains { $0.key == "damage" && $0.value.contains("cut short") })
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// What the check finds in a VHDX, and what its repair makes of that.
struct VHDXCheckTests {
    private static let size = 8 << 20

    /// A base of eight blocks that are all there, or a child with some in parts.
    private func make(_ folder: TemporaryFolder, isChild: Bool = false) throws -> (path: String, table: Int) {
        let base = try VHD.create(
            folder, isChild ? "base.vhdx" : "disk.vhdx", size: Self.size, blockSize: 1 << 20)
        try VHD.write(base, [(1, 0, Self.size)])
        guard isChild else { return (base, VHDX.table) }
        let child = try VHD.create(folder, "disk.vhdx", blockSize: 1 << 20, parent: "base.vhdx")
        try VHD.write(child, [(2, 0, 512), (3, 1 << 20, 512), (4, 2 << 20, 1 << 20)])
        return (child, 6 << 20)
    }

    /// A harm, in a child or not, how bad it is, and the blocks that are left.
    struct Harm: Sendable, CustomTestStringConvertible {
        let name: String
        var isChild = false
        let severity: CheckReport.Severity
        let blocks: UInt64
        /// What is done to the file.
        let apply: @Sendable (_ path: String, _ table: Int) throws -> Void
        var testDescription: String { name }
    }

    private static func flip(_ path: String, _ place: Int) throws {
        let file = try FileStorage(path: path, isWritable: true)
        let byte = try file.bytes(at: UInt64(place), count: 1, for: .header, "a byte")
        try file.write([byte[0] ^ 1], at: UInt64(place), for: .header)
    }

    static let harms: [Harm] = [
        Harm(name: "first header", severity: .repairable, blocks: 8) { path, _ in try flip(path, (64 << 10) + 100) },
        Harm(name: "second header", severity: .repairable, blocks: 8) { path, _ in try flip(path, (128 << 10) + 9) },
        Harm(name: "first region table", severity: .repairable, blocks: 8) { path, _ in
            try flip(path, (192 << 10) + 60_000)
        },
        Harm(name: "second region table", severity: .repairable, blocks: 8) { path, _ in try flip(path, 256 << 10) },
        Harm(name: "block behind the end", severity: .loss, blocks: 7) { path, table in
            try VHDX.setEntry(3, of: path, table: table, 6, at: 1 << 40)
        },
        Harm(name: "block in the log", severity: .loss, blocks: 7) { path, table in
            try VHDX.setEntry(3, of: path, table: table, 6, at: 1 << 20)
        },
        Harm(name: "two blocks in one place", severity: .loss, blocks: 7) { path, table in
            try VHDX.setEntry(3, of: path, table: table, 6, at: VHDX.entry(5, of: path, table: table).offset)
        },
        Harm(name: "unknown state", severity: .loss, blocks: 7) { path, table in
            try VHDX.setEntry(3, of: path, table: table, 5, at: VHDX.entry(3, of: path, table: table).offset)
        },
        Harm(name: "parts in a base", severity: .repairable, blocks: 8) { path, table in
            try VHDX.setEntry(3, of: path, table: table, 7, at: VHDX.entry(3, of: path, table: table).offset)
        },
        Harm(name: "tail", severity: .leak, blocks: 8) { path, _ in
            let file = try FileStorage(path: path, isWritable: true)
            try file.setLength(file.length() + (5 << 20))
        },
        // The bitmap's entry is the one after the 4096 of the chunk's blocks.
        Harm(name: "no bitmap", isChild: true, severity: .loss, blocks: 1) { path, table in
            try VHDX.setEntry(4096, of: path, table: table, 0)
        },
        Harm(name: "bitmap behind the end", isChild: true, severity: .loss, blocks: 1) { path, table in
            try VHDX.setEntry(4096, of: path, table: table, 6, at: 1 << 40)
        },
        Harm(name: "bitmap in a block", isChild: true, severity: .loss, blocks: 2) { path, table in
            try VHDX.setEntry(4096, of: path, table: table, 6, at: VHDX.entry(2, of: path, table: table).offset)
        },
    ]

    @Test(arguments: harms) func harmIsFoundAndRepaired(_ harm: Harm) throws {
        let folder = try TemporaryFolder()
        let (path, table) = try make(folder, isChild: harm.isChild)
        #expect(try ImageCheck.run(path).counts.filter { $0.key != .note }.isEmpty)
        try harm.apply(path, table)
        let before = try folder.read("disk.vhdx")
        #expect(try ImageCheck.run(path).remaining(harm.severity) > 0)
        #expect(try folder.read("disk.vhdx") == before, "a check alone changes nothing")
        let repaired = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(repaired.remaining(harm.severity) == 0 && repaired.counts[harm.severity] != nil)
        let after = try ImageCheck.run(path)
        #expect(after.counts.filter { $0.key != .note }.isEmpty, "\(after.findings)")
        #expect(after.allocatedBlocks == harm.blocks)
        try SecondReader.vhdx.expectSound([path], isClosed: harm.blocks == 8)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        _ = try disk.read(at: 0, count: Self.size)
        try disk.write([UInt8](repeating: 9, count: Self.size), at: 0)
        try disk.close()
        try SecondReader.vhdx.expectSound([path])
    }

    /// Who writes does not go on where two blocks lie in one place.
    @Test func writersRefuseWhatOverlaps() throws {
        let folder = try TemporaryFolder()
        let (path, table) = try make(folder)
        try VHDX.setEntry(3, of: path, table: table, 6, at: VHDX.entry(5, of: path, table: table).offset)
        #expect { try Disk.open(path, options: DiskOptions(isWritable: true)) } throws: {
            ($0 as? DiskError)?.kind == .needsRepair
        }
        try Disk.open(path).close()
    }

    /// Some programs enter bitmaps in images without a parent.
    @Test func bitmapsOfABaseMeanNothing() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, "disk.vhdx", size: 20 << 30, blockSize: 256 << 20)
        try VHD.write(path, [(1, 0, 512), (2, 16 << 28, 512)])
        try VHDX.setEntry(16, of: path, 6, at: 1 << 50)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        #expect(try disk.read(at: 16 << 28, count: 1) == [2])
        try disk.write([3], at: 15 << 28)
        try disk.close()
        let report = try ImageCheck.run(path)
        #expect(report.counts == [.note: 1], "\(report.findings)")
    }

    /// Both headers alike, as disk2vhd writes them; alike in their number alone they say nothing.
    @Test func twinHeaders() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try make(folder)
        let bytes = try folder.read("disk.vhdx")
        let newer = VHDX.headers.max { bytes.number(at: $0 + 8, width: 8) < bytes.number(at: $1 + 8, width: 8) } ?? 0
        let older = VHDX.headers.first { $0 != newer } ?? 0
        try VHD.poke(path, bytes.slice(newer, 4096), at: UInt64(older))
        try VHD.write(path, [(7, 0, 512)])
        let disk = try Disk.open(path)
        #expect(try disk.read(at: 0, count: 1) == [7])
        try disk.close()
        var other = bytes.slice(newer, 4096)
        other[20] ^= 1
        VHDX.putChecksum(&other, 0..<4096)
        try VHD.poke(path, bytes.slice(newer, 4096), at: UInt64(newer))
        try VHD.poke(path, other, at: UInt64(older))
        #expect { try Disk.open(path) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
    }

    /// Some writers do not mark the item with the physical sector size as required.
    @Test func itemsNeedNotBeMarked() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try make(folder)
        for entry in 0..<5 {
            try VHD.poke(path, [0, 0, 0, 0], at: UInt64(VHDX.metadata + 32 + entry * 32 + 24))
        }
        let disk = try Disk.open(path)
        #expect(try disk.read(at: 0, count: 1) == [1])
        try disk.close()
        #expect(try VHD.property("physical-sector-size", of: path) == "4096 bytes")
    }

    /// What must be understood and is not.
    @Test(arguments: ["region", "item", "user item", "version", "log version", "locator"])
    func unknownRequirementsAreRefused(_ what: String) throws {
        let folder = try TemporaryFolder()
        let (path, _) = try make(folder, isChild: what == "locator")
        var bytes = try folder.read("disk.vhdx")
        let metadata = what == "locator" ? 5 << 20 : VHDX.metadata
        switch what {
        case "region":
            for start in VHDX.regionTables {
                bytes = bytes.setting(3, at: start + 8, width: 4)
                let entry = [UInt8](1...16) + [UInt8](repeating: 0, count: 16)
                bytes.replaceSubrange(start + 80..<start + 112, with: entry)
                bytes = bytes.setting(UInt64(bytes.count), at: start + 96, width: 8)
                bytes = bytes.setting(1 << 20, at: start + 104, width: 4).setting(1, at: start + 108, width: 4)
            }
            bytes += [UInt8](repeating: 0, count: 1 << 20)
        case "item", "user item":
            bytes = bytes.setting(6, at: metadata + 10, width: 2)
            let entry = metadata + 32 + 5 * 32
            bytes.replaceSubrange(entry..<entry + 16, with: [UInt8](1...16))
            bytes = bytes.setting(what == "item" ? 4 : 5, at: entry + 24, width: 4)
        case "version": for start in VHDX.headers { bytes = bytes.setting(2, at: start + 66, width: 2) }
        case "log version": for start in VHDX.headers { bytes = bytes.setting(1, at: start + 64, width: 2) }
        default:
            let offset = Int(bytes.number(at: metadata + 32 + 5 * 32 + 16, width: 4))
            bytes[metadata + offset] ^= 1
        }
        try VHDX.replace(path, by: VHDX.withChecksums(bytes))
        #expect { try Disk.open(path) } throws: { ($0 as? DiskError)?.kind == .unsupported }
    }
}

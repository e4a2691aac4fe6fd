import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Footers and headers that are damaged, entries that lead nowhere: what is read nevertheless, what is said of it, and
/// what repair makes of it.
struct VHDDamageTests {
    private static let size = 8 << 20
    private static let pieces: [(value: UInt8, offset: UInt64, count: Int)] = [
        (1, 0, 5000), (2, (2 << 20) - 100, 200), (3, (6 << 20) - 512, 512),
    ]

    private func makeImage(_ folder: TemporaryFolder, variant: String? = nil) throws -> (String, DiskModel) {
        let path = try VHD.create(folder, size: Self.size, variant: variant)
        try VHD.write(path, Self.pieces)
        var model = DiskModel(size: Self.size)
        for piece in Self.pieces {
            model.write([UInt8](repeating: piece.value, count: piece.count), at: Int(piece.offset))
        }
        return (path, model)
    }

    private func expect(_ path: String, toHold model: DiskModel) throws {
        let disk = try Disk.open(path)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
    }

    /// The severity and words of the only finding.
    private func onlyFinding(_ path: String, repair: Bool = false) throws -> CheckReport.Finding? {
        let report = try ImageCheck.run(path, options: DiskOptions(isWritable: repair), repair: repair)
        #expect(report.findings.count == 1, "\(report.findings)")
        return report.findings.first
    }

    // MARK: - Footers

    /// Harm to one of the two footers: the disk is read by the other; information and check say so; a read-only open
    /// changes nothing; check repairs it to what it was.
    @Test(arguments: ["end", "copy"], ["cookie", "field", "checksum", "zeros"])
    func oneFooterIsDamaged(_ place: String, _ harm: String) throws {
        let folder = try TemporaryFolder()
        let (path, model) = try makeImage(folder)
        let sound = try folder.read("disk.vhd")
        let offset = place == "copy" ? 0 : UInt64(sound.count - 512)
        switch harm {
        case "cookie": try VHD.poke(path, [0x43], at: offset)
        case "field": try VHD.poke(path, [0xff], at: offset + 50)
        case "checksum": try VHD.poke(path, [1, 2, 3, 4], at: offset + 64)
        default: try VHD.poke(path, [UInt8](repeating: 0, count: 512), at: offset)
        }
        let before = try folder.read("disk.vhd")
        try expect(path, toHold: model)
        let damage = try #require(try VHD.property("damage", of: path))
        #expect(damage.contains("footer") && damage.contains("copy"))
        let finding = try onlyFinding(path)
        #expect(finding?.severity == .repairable && finding?.message == damage)
        #expect(try folder.read("disk.vhd") == before, "a check changed the image")
        #expect(try onlyFinding(path, repair: true)?.isRepaired == true)
        if harm == "zeros" || harm == "cookie", place == "end" {
            // Nothing tells that there was one: it goes behind everything.
            #expect(try folder.read("disk.vhd") == before + sound.suffix(512))
        } else {
            #expect(try folder.read("disk.vhd") == sound)
        }
        #expect(try ImageCheck.run(path).remaining(.repairable) == 0)
        try VHD.expectSound([path], isClosed: false)
    }

    /// A session puts the footers right before it changes anything.
    @Test(arguments: ["end", "copy"]) func writingRestoresTheFooters(_ place: String) throws {
        let folder = try TemporaryFolder()
        var (path, model) = try makeImage(folder)
        let length = try VHD.length(path)
        try VHD.poke(path, [0xff], at: place == "copy" ? 50 : length - 512 + 50)
        let before = try folder.read("disk.vhd")
        var disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.close()
        #expect(try folder.read("disk.vhd") == before, "nothing was written")
        disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.write([7, 8, 9], at: 3)
        model.write([7, 8, 9], at: 3)
        try VHD.expectSound([path], isClosed: false)
        try disk.close()
        #expect(try VHD.property("damage", of: path) == nil)
        try VHD.expectSound([path])
        try expect(path, toHold: model)
    }

    @Test func bothFootersAreDamaged() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try makeImage(folder)
        let length = try VHD.length(path)
        for offset in [50, length - 512 + 50] { try VHD.poke(path, [0xff], at: offset) }
        #expect { try Disk.open(path) } throws: { error in
            (error as? DiskError)?.kind == .invalidImage && "\(error)".contains("both footers are damaged")
        }
        #expect(throws: DiskError.self) { try ImageCheck.run(path) }
    }

    /// The file ends anywhere: what is there is read by the copy, what is not is an error.
    @Test func fileIsCutShort() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try makeImage(folder)
        try FileStorage(path: path, isWritable: true).setLength(3 << 20)
        let disk = try Disk.open(path)
        #expect(try model.mistake(of: disk, in: 0..<5000) == nil)
        #expect { try disk.read(at: (6 << 20) - 512, count: 512) } throws: {
            ($0 as? DiskError)?.kind == .invalidImage
        }
        try disk.close()
        #expect { try Disk.open(path, options: DiskOptions(isWritable: true)) } throws: { error in
            (error as? DiskError)?.kind == .needsRepair && "\(error)".contains("vdimg check --repair")
        }
        let report = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.counts[.loss] == 2 && report.remaining(.loss) == 0 && report.remaining(.repairable) == 0)
        try VHD.expectSound([path], isClosed: false)
        try VHD.write(path, [(9, 4 << 20, 3)])
    }

    @Test func fixedImageWithAWrongChecksum() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try makeImage(folder, variant: "fixed")
        let sound = try folder.read("disk.vhd")
        try VHD.poke(path, [1, 2, 3, 4], at: UInt64(sound.count - 512 + 64))
        var options = DiskOptions()
        options.format = "vhd"
        let disk = try Disk.open(path, options: options)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
        #expect(try ImageCheck.run(path, options: options).remaining(.repairable) == 1)
        options.isWritable = true
        let writable = try Disk.open(path, options: options)
        try writable.write([1, 1], at: 0)
        try writable.close()
        #expect(try folder.read("disk.vhd") == sound)
        try expect(path, toHold: model)
    }

    @Test func fixedImageIsCutShort() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try makeImage(folder, variant: "fixed")
        let bytes = try folder.read("disk.vhd")
        let cut = try folder.write(bytes.prefixArray(1 << 20) + bytes.suffix(512), to: "cut.vhd")
        #expect { try Disk.open(cut) } throws: { "\($0)".contains("cut short") }
        #expect(try VHD.property("damage", of: cut)?.contains("cut short") == true)
        #expect(try ImageCheck.run(cut).remaining(.loss) == 1)
        // Without its footer it is no VHD.
        let headless = try folder.write(bytes.prefixArray(bytes.count - 512), to: "headless.vhd")
        var options = DiskOptions()
        options.format = "vhd"
        #expect { try Disk.open(headless, options: options) } throws: { "\($0)".contains("no footer") }
        _ = path
    }

    // MARK: - 511 bytes

    /// Virtual PC before 2004 left the footer's last byte out.
    @Test(arguments: ["fixed", "dynamic"]) func footersOf511Bytes(_ variant: String) throws {
        let folder = try TemporaryFolder()
        var (path, model) = try makeImage(folder, variant: variant)
        let length = try VHD.length(path)
        try FileStorage(path: path, isWritable: true).setLength(length - 1)
        try expect(path, toHold: model)
        #expect(try VHD.property("footer", of: path) == "511 bytes")
        #expect(try VHD.property("damage", of: path) == nil)
        #expect(try onlyFinding(path)?.severity == .note)
        // In place, and in a new block, which goes where the footer is.
        for offset in [100, 7 << 20] {
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            try disk.write([6, 6, 6], at: UInt64(offset))
            model.write([6, 6, 6], at: offset)
            try disk.close()
            try expect(path, toHold: model)
            let report = try ImageCheck.run(path)
            #expect(report.remaining(.repairable) + report.remaining(.loss) == 0, "\(report.findings)")
        }
        #expect(try VHD.length(path) % 512 == (variant == "fixed" ? 511 : 0))
    }

    // MARK: - Header and table

    @Test func headerChecksumIsWrong() throws {
        let folder = try TemporaryFolder()
        let (path, model) = try makeImage(folder)
        let sound = try folder.read("disk.vhd")
        try VHD.poke(path, [1, 2, 3, 4], at: 512 + 36)
        try expect(path, toHold: model)
        #expect(try VHD.property("damage", of: path)?.contains("checksum") == true)
        #expect { try Disk.open(path, options: DiskOptions(isWritable: true)) } throws: {
            ($0 as? DiskError)?.kind == .needsRepair
        }
        #expect(try onlyFinding(path)?.severity == .repairable)
        #expect(try onlyFinding(path, repair: true)?.isRepaired == true)
        #expect(try folder.read("disk.vhd") == sound)
    }

    /// An entry beyond the file, into the headers, or over another block: loss, which repair clears; until then the
    /// image is not written to, since what grows could come to lie there.
    @Test(
        arguments: [
            ("far away", [0x00, 0x10, 0x00, 0x00]), ("at 0", [0, 0, 0, 0]), ("in the header", [0, 0, 0, 1]),
            ("in the table", [0, 0, 0, 3]),
        ] as [(String, [UInt8])])
    func entryLeadsNowhere(_ name: String, _ entry: [UInt8]) throws {
        let folder = try TemporaryFolder()
        let (path, model) = try makeImage(folder)
        try VHD.poke(path, entry, at: 1536 + 4)
        let disk = try Disk.open(path)
        #expect(throws: DiskError.self) { try disk.read(at: 3 << 20, count: 512) }
        #expect(try model.mistake(of: disk, in: 0..<5000) == nil)
        try disk.close()
        #expect { try Disk.open(path, options: DiskOptions(isWritable: true)) } throws: {
            ($0 as? DiskError)?.kind == .needsRepair
        }
        #expect(try ImageCheck.run(path).remaining(.loss) == 1)
        let report = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.counts[.loss] == 1 && report.remaining(.loss) == 0)
        try VHD.expectSound([path], isClosed: false)
        let repaired = try Disk.open(path)
        #expect(try repaired.read(at: 3 << 20, count: 512) == [UInt8](repeating: 0, count: 512))
        try repaired.close()
    }

    @Test(arguments: [0, 1, 4095]) func blocksOverEachOther(_ sectors: UInt32) throws {
        let folder = try TemporaryFolder()
        let (path, _) = try makeImage(folder)
        let first = try folder.read("disk.vhd").slice(1536, 4).reduce(UInt32(0)) { $0 << 8 | UInt32($1) } + sectors
        try VHD.poke(path, (0..<4).map { UInt8(truncatingIfNeeded: first >> UInt32(24 - 8 * $0)) }, at: 1536 + 4)
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.loss) >= 1 && report.findings.contains { $0.message.contains("lies over") })
        _ = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(try ImageCheck.run(path).remaining(.loss) == 0)
        try VHD.expectSound([path], isClosed: false)
    }

    @Test func checkFindsLeaks() throws {
        let folder = try TemporaryFolder()
        let (path, _) = try makeImage(folder)
        #expect(try ImageCheck.run(path).findings.isEmpty)
        try VHD.poke(path, [0xff, 0xff, 0xff, 0xff], at: 1536 + 4)
        #expect(try onlyFinding(path)?.severity == .leak)
    }

    // MARK: - Bitmaps of dynamic images

    /// In a dynamic image the bitmap is not looked at; but what is written is marked there, for programs that do.
    @Test func unsetBitsOfADynamicImage() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try makeImage(folder)
        let entry = try folder.read("disk.vhd").slice(1536, 4).reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        try VHD.poke(path, [0xf0, 0x00, 0x0f], at: entry * 512)
        try expect(path, toHold: model)
        #expect(try onlyFinding(path)?.severity == .note)
        let read = try Disk.open(path, options: DiskOptions(isWritable: true))
        #expect(try model.mistake(of: read, in: 0..<model.size) == nil)
        try read.close()
        #expect(try folder.read("disk.vhd").slice(Int(entry * 512), 3) == [0xf0, 0x00, 0x0f], "nothing was written")
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.write([5, 5, 5, 5], at: 7000)
        model.write([5, 5, 5, 5], at: 7000)
        try disk.discard(offset: 8192, length: 100)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
        #expect(try ImageCheck.run(path).findings.isEmpty)
        try VHD.expectSound([path])
        try expect(path, toHold: model)
    }

    // MARK: - Two formats in one file

    /// A guest can make its fixed VHD begin like another format, or the end of its image like a footer.
    @Test func marksOfTwoFormats() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 1 << 20, variant: "fixed")
        let text = HostileDescriptorTests.descriptor("RW 2048 FLAT \"other.raw\" 0")
        try VHD.poke(path, Array(text.utf8), at: 0)
        #expect { try Disk.open(path) } throws: { error in
            (error as? DiskError)?.kind == .unknownFormat && "\(error)".contains("two formats, vmdk and vhd")
        }
        let disk = try Disk.open(path, options: DiskOptions(format: "vhd"))
        #expect(try disk.read(at: 0, count: 6) == Array(text.utf8.prefix(6)))
        try disk.close()
    }
}

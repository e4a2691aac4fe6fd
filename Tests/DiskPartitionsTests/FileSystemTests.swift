import DiskPartitions
import DiskStorage
import DiskTesting
import Testing

/// File systems made by their own tools, compared with what util-linux's library says of them.
@Suite struct FileSystemTests {
    struct Sample: Sendable, CustomTestStringConvertible {
        let command: [String]
        var mebibytes: UInt64 = 64
        var version: String?
        var testDescription: String { command.joined(separator: " ") }

        func make() throws -> DiskFile {
            let disk = try DiskFile(mebibytes: mebibytes)
            try run(command.contains("DISK") ? command.map { $0 == "DISK" ? disk.path : $0 } : command + [disk.path])
            return disk
        }
    }

    static let samples: [Sample] = [
        Sample(command: ["mkfs.ext2", "-q", "-L", "two"]), Sample(command: ["mkfs.ext3", "-q", "-L", "three"]),
        Sample(command: ["mkfs.ext4", "-q", "-L", "four with blank"]),
        Sample(command: ["mkfs.ext4", "-q", "-O", "^has_journal"]), Sample(command: ["mkfs.ext4", "-q", "-b", "1024"]),
        Sample(command: ["mkfs.xfs", "-q", "-L", "ex"], mebibytes: 320),
        Sample(command: ["mkfs.btrfs", "-q", "-L", "butter"], mebibytes: 128),
        Sample(command: ["mkfs.vfat", "-F", "12", "-n", "TWELVE"], mebibytes: 4, version: "FAT12"),
        Sample(command: ["mkfs.vfat", "-F", "16", "-n", "SIXTEEN"], version: "FAT16"),
        Sample(command: ["mkfs.vfat", "-F", "32", "-n", "BIG ONE"], version: "FAT32"),
        Sample(command: ["mkfs.vfat", "-F", "32", "-S", "4096"], version: "FAT32"), Sample(command: ["mkfs.vfat"]),
        Sample(command: ["mkfs.exfat", "-L", "Ex Größe"]), Sample(command: ["mkfs.exfat"]),
        Sample(command: ["mkfs.ntfs", "-q", "-F", "-L", "Fenster äöü"]), Sample(command: ["mkfs.ntfs", "-q", "-F"]),
        Sample(command: ["mkfs.ntfs", "-q", "-F", "-s", "4096", "-c", "4096", "-L", "large"]),
        Sample(command: ["mkfs.f2fs", "-q", "-l", "flash"]), Sample(command: ["mkswap", "-L", "exchange"]),
        Sample(command: ["mkswap", "-p", "65536"]),
        Sample(command: ["mksquashfs", "/etc/apt", "DISK", "-noappend", "-quiet", "-no-progress"], version: "4.0"),
        Sample(command: ["genisoimage", "-quiet", "-V", "A VOLUME", "-o", "DISK", "/etc/apt"]),
        Sample(command: luksFormat("luks1"), version: "1"),
        Sample(command: luksFormat("luks2") + ["--label", "secret"], version: "2"),
    ]

    private static func luksFormat(_ type: String) -> [String] {
        [
            "cryptsetup", "luksFormat", "--batch-mode", "--type", type, "--key-file", "/etc/hostname", "--pbkdf",
            "pbkdf2", "--pbkdf-force-iterations", "1000",
        ]
    }

    @Test(arguments: samples) func asForeignToolsSay(_ sample: Sample) throws {
        let disk = try sample.make()
        let source = try disk.source
        let found = try #require(try FileSystem.detect(in: source, offset: 0, length: source.size))
        func foreign(_ tag: String) throws -> String {
            let result = try Subprocess.run(["blkid", "-p", "-s", tag, "-o", "value", disk.path])
            return String(result.outputText.prefix { $0 != "\n" })
        }
        #expect(try foreign("TYPE") == found.kind.rawValue)
        #expect(try foreign("LABEL") == found.label ?? "")
        // A file system on a disc has no UUID; the one that is shown is made of its date.
        if found.kind != .iso9660 { #expect(try foreign("UUID") == found.uuid ?? "") }
        if let version = sample.version { #expect(found.version == version) }

        // In a partition, with other things before and behind it.
        let shifted = ShiftedSource(source: source, shift: 12_345 * 512)
        #expect(try FileSystem.detect(in: shifted, offset: shifted.shift, length: source.size) == found)
        #expect(try FileSystem.detect(in: shifted, offset: 0, length: shifted.size) == nil)
    }

    /// Nothing of what is in a superblock may be believed.
    @Test(arguments: samples) func damaged(_ sample: Sample) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        print("FileSystemTests.damaged \(sample.testDescription): seed \(seed)")
        var random = SeededGenerator(seed: seed)
        let disk = try sample.make()
        var bytes = try disk.bytes(0..<1 << 20)
        bytes.append(contentsOf: repeatElement(0, count: (1 << 20) - bytes.count))
        let storage = PagedStorage(bytes, length: try disk.size)
        // Where superblocks, directories and file records of the samples are.
        let places = [0, 512, 1024, 2048, 4096, 32_768, 65_536, 16 << 10] + [Int](repeating: 0, count: 8)
        for _ in 0..<300 {
            let place = (places.randomElement(using: &random) ?? 0) + Int.random(in: 0..<512, using: &random)
            let width = Int.random(in: 1...8, using: &random)
            let value = [0, 1, 0x7f, 0x80, 0xff, UInt8(truncatingIfNeeded: random.next())].randomElement(using: &random)
            try storage.write([UInt8](repeating: value ?? 0, count: width), at: UInt64(place), for: .header)
            let length = random.next() % 4 == 0 ? random.next() % storage.length() : storage.length()
            let source = try StorageSource(storage)
            _ = try FileSystem.detect(in: source, offset: 0, length: length)
            if random.next() % 3 == 0 {
                let kept = Array(bytes[place..<place + width])
                try storage.write(kept, at: UInt64(place), for: .header)
            }
        }
    }

    @Test func outsideOfTheSource() throws {
        let source = try StorageSource(MemoryStorage([1, 2, 3]))
        #expect(try FileSystem.detect(in: source, offset: 0, length: 3) == nil)
        #expect(try FileSystem.detect(in: source, offset: 3, length: 0) == nil)
        #expect(try FileSystem.detect(in: source, offset: 4, length: 0) == nil)
        #expect(try FileSystem.detect(in: source, offset: 1, length: .max) == nil)
        #expect(try FileSystem.detect(in: source, offset: .max, length: .max) == nil)
    }
}

/// What no tool here makes without a kernel's help, by hand.
@Suite struct HandmadeFileSystemTests {
    private func detect(_ change: (inout FieldWriter) -> Void, size: Int = 1 << 20) throws -> FileSystem? {
        var fields = FieldWriter(count: size)
        change(&fields)
        return try FileSystem.detect(
            in: try StorageSource(MemoryStorage(fields.bytes)), offset: 0, length: UInt64(size))
    }

    @Test(arguments: [("1.0", (1 << 20) - 8192), ("1.1", 0), ("1.2", 4096)]) func raid(
        _ version: String, _ place: Int
    ) throws {
        let member = { (fields: inout FieldWriter, sector: UInt64) in
            fields.littleEndian(UInt16(0xef53), at: 1024 + 56)
            fields.littleEndian(UInt32(0xa92b_4efc), at: place)
            fields.littleEndian(UInt32(1), at: place + 4)
            fields.bytes([UInt8](0..<16), at: place + 16)
            fields.bytes("host:0".utf8, at: place + 32)
            fields.littleEndian(sector, at: place + 144)
        }
        let found = try detect { member(&$0, UInt64(place / 512)) }
        #expect(found?.kind == .linuxRAID && found?.version == version && found?.label == "host:0")
        #expect(found?.uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f")
        #expect(try detect { member(&$0, 7) }?.kind == .ext2, "a superblock that was copied from elsewhere")
    }

    @Test(arguments: [true, false]) func oldRAID(_ isLittleEndian: Bool) throws {
        let place = (1 << 20) - 65_536
        let found = try detect { fields in
            for (word, value) in [(0, 0xa92b_4efc), (2, 90), (5, 0x11), (13, 0x22), (14, 0x33), (15, 0x44)] {
                let value = UInt32(value)
                fields.littleEndian(isLittleEndian ? value : value.byteSwapped, at: place + 4 * word)
            }
        }
        #expect(found?.kind == .linuxRAID && found?.version == "0.90")
        #expect(found?.uuid == "00000011-0000-0022-0000-003300000044")
    }

    @Test func lvm() throws {
        let label = { (fields: inout FieldWriter, sector: UInt64) in
            fields.bytes("LABELONE".utf8, at: 512)
            fields.littleEndian(sector, at: 520)
            fields.littleEndian(UInt32(32), at: 532)
            fields.bytes("LVM2 001".utf8, at: 536)
            fields.bytes("abcdefghijklmnopqrstuvwxyz012345".utf8, at: 544)
        }
        #expect(try detect { label(&$0, 1) }?.uuid == "abcdef-ghij-klmn-opqr-stuv-wxyz-012345")
        #expect(try detect { label(&$0, 2) } == nil)
    }

    @Test func magics() throws {
        let apple = try detect { fields in
            fields.littleEndian(UInt16(1), at: 24)
            fields.bytes("NXSB".utf8, at: 32)
            fields.littleEndian(UInt32(4096), at: 36)
            fields.byte(9, at: 72)
        }
        #expect(apple?.kind == .apfs && apple?.uuid == "09000000-0000-0000-0000-000000000000")
        #expect(try detect { $0.bytes([0x48, 0x2b, 0, 4], at: 1024) }?.kind == .hfsplus)
        #expect(try detect { $0.bytes([0x48, 0x58, 0, 5], at: 1024) }?.kind == .hfsplus)
        #expect(try detect { $0.bytes([0x42, 0x44], at: 1024) }?.kind == .hfs)
        #expect(try detect { $0.bytes([0x48, 0x2b, 0, 5], at: 1024) } == nil)
        #expect(try detect { $0.bytes([0, 0, 0] + Array("ReFS".utf8), at: 0) }?.kind == .refs)
        #expect(try detect { $0.bytes([0xeb, 0x58, 0x90] + Array("-FVE-FS-".utf8), at: 0) }?.kind == .bitLocker)
        let toGo = try detect { fields in
            fields.bytes([0xeb, 0x58, 0x90] + Array("MSWIN4.1".utf8), at: 0)
            fields.bytes(DiskUUID("4967d63b-2e29-4ad8-8399-f6a339e3d001")?.mixedEndian ?? [], at: 424)
        }
        #expect(toGo?.kind == .bitLocker)
        let pool = { (fields: inout FieldWriter, magic: UInt64) in
            fields.bytes([1, 1], at: 16 << 10)
            fields.littleEndian(magic, at: (128 << 10) + 5 * 1024)
        }
        #expect(try detect { pool(&$0, 0xbab10c) }?.kind == .zfs)
        #expect(try detect { pool(&$0, UInt64(0xbab10c).byteSwapped) }?.kind == .zfs)
        #expect(try detect { pool(&$0, 0xbab10d) } == nil)
        #expect(try detect { $0.bytes("S1SUSPEND".utf8, at: 4086) }?.kind == .swapSuspended)
        #expect(try detect { $0.bytes("SWAP-SPACE".utf8, at: 4086) }?.kind == .swap)
    }

    /// A label must not steer the terminal that it is shown on.
    @Test func controlCharacters() throws {
        let found = try detect { fields in
            fields.littleEndian(UInt16(0xef53), at: 1024 + 56)
            fields.bytes([0x1b, 0x5b, 0x41, 0x0a, 0xff, 0x42], at: 1024 + 120)
        }
        #expect(found?.label == "\u{fffd}[A\u{fffd}\u{fffd}B")
    }

    @Test func mountable() {
        #expect(FileSystemKind.allCases.filter { !$0.isMountable }.count == 7)
        #expect(FileSystemKind.ext4.isMountable && !FileSystemKind.lvm2.isMountable)
    }
}

/// A disk that has a source somewhere inside.
private struct ShiftedSource: SectorSource {
    let source: StorageSource
    let shift: UInt64
    var size: UInt64 { source.size + 2 * shift }

    func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        for place in 0..<UInt64(buffer.count) / 512 {
            let sector = buffer.slice(Int(place) * 512, 512)
            try readPart(into: sector, at: offset + place * 512)
        }
        let rest = buffer.count % 512
        try readPart(into: buffer.slice(buffer.count - rest, rest), at: offset + UInt64(buffer.count - rest))
    }

    private func readPart(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        guard offset >= shift, offset + UInt64(buffer.count) <= shift + source.size else { return buffer.zero() }
        try source.read(into: buffer, at: offset - shift)
    }
}

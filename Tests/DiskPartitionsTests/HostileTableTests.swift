import DiskStorage
import DiskTesting
import Testing

@testable import DiskPartitions

/// Tables that are wrong: no partitions, one warning, never a trap.
@Suite struct HostileTableTests {
    private static let size = 4 << 20

    private func expectRefused(_ builder: TableBuilder, _ kind: PartitionTable.Kind, _ words: String) throws {
        let table = try builder.table()
        #expect(table.kind == kind && table.partitions.isEmpty)
        #expect(table.warning?.contains(words) == true, "\(table.warning ?? "no warning")")
    }

    @Test func checksum() {
        #expect(crc32(Array("123456789".utf8)) == 0xcbf4_3926)
        #expect(crc32([]) == 0)
    }

    // MARK: - Boot records

    @Test(
        arguments: [
            ([(0x83, 100, 8093)], "the disk has 8192 sectors"), ([(0x83, 8192, 1)], "the disk has"),
            ([(0x83, .max, .max)], "the disk has"), ([(0x83, 0, 100)], "lies where it cannot"),
            ([(0x83, 100, 100), (0x07, 199, 5)], "partition 1 and partition 2 overlap at sector 199"),
            ([(0x83, 100, 100), (0x0f, 150, 100)], "overlap"),
            ([(0x05, 100, 1000), (0x0f, 1000, 200)], "overlap"),
            ([(0x83, 100, 100), (0x05, 8000, 1000)], "partition 2 ends"),
        ] as [([(UInt8, UInt32, UInt32)], String)])
    func primary(_ entries: [(UInt8, UInt32, UInt32)], _ words: String) throws {
        var builder = TableBuilder(size: Self.size)
        builder.bootRecord(at: 0, entries.map { (type: $0.0, start: $0.1, count: $0.2) })
        try expectRefused(builder, .mbr, words)
    }

    @Test(
        arguments: [
            (100, [(0, 0, 0), (0x05, 0, 1000)], "circular"), (100, [(0x83, 1, 10), (0x05, 50, 900)], "breaks off"),
            (100, [(0x83, 0, 10)], "lies where it cannot"), (100, [(0x83, 1, 1000)], "lies where it cannot"),
            (100, [(0x83, 1, .max)], "the disk has"), (100, [(0x05, 1000, 10)], "boot record"),
            (100, [(0x83, 1, 10), (0x05, .max, .max)], "boot record"),
        ] as [(Int, [(UInt8, UInt32, UInt32)], String)])
    func logical(_ sector: Int, _ entries: [(UInt8, UInt32, UInt32)], _ words: String) throws {
        var builder = TableBuilder(size: Self.size)
        builder.bootRecord(at: 0, [(0x05, 100, 1000)])
        builder.bootRecord(at: sector, entries.map { (type: $0.0, start: $0.1, count: $0.2) })
        try expectRefused(builder, .mbr, words)
    }

    @Test func chains() throws {
        var builder = TableBuilder(size: Self.size)
        builder.bootRecord(at: 0, [(0x85, 100, 8000)])
        #expect(try builder.table().partitions.isEmpty, "it never held any")
        #expect(try builder.table().warning == nil)
        builder.bootRecord(at: 100, [(0x83, 1, 10), (0x05, 100, 100)])
        builder.bootRecord(at: 200, [(0x05, 200, 100), (0x83, 1, 10)])
        builder.bootRecord(at: 300, [(0, 0, 0), (0x05, 300, 100)])
        builder.bootRecord(at: 400, [(0x07, 5, 20)])
        #expect(try builder.table().partitions.map(\.number) == [5, 6, 7])
        #expect(try builder.table().partitions.map(\.offset) == [101 * 512, 201 * 512, 405 * 512])
        builder.bootRecord(at: 400, [(0x07, 5, 20), (0x05, 100, 100)])
        try expectRefused(builder, .mbr, "circular")
        builder.bootRecord(at: 400, [(0x07, 5, 20), (0x05, 50, 50)])
        builder.bootRecord(at: 150, [(0x07, 1, 51)])
        try expectRefused(builder, .mbr, "overlap")
    }

    @Test(arguments: [128, 129]) func longChain(_ count: Int) throws {
        var builder = TableBuilder(size: Self.size)
        builder.bootRecord(at: 0, [(0x05, 100, 8000)])
        for index in 0..<count {
            var entries: [(type: UInt8, start: UInt32, count: UInt32)] = [(0x83, 1, 10)]
            if index < count - 1 { entries.append((0x05, UInt32(index + 1) * 20, 20)) }
            builder.bootRecord(at: 100 + index * 20, entries)
        }
        if count > 128 { return try expectRefused(builder, .mbr, "too long") }
        #expect(try builder.table().partitions.count == count)
        #expect(try builder.table().partitions.last?.number == 132)
    }

    @Test func indicatorsThatAreNone() throws {
        var builder = TableBuilder(size: Self.size)
        builder.bootRecord(at: 0, [(0x83, 100, 100)])
        builder.bytes[446] = 0x81
        #expect(try builder.table().kind == .none)
        builder.bytes[446] = 0x80
        #expect(try builder.table().partitions.map(\.isBootable) == [true])
    }

    @Test(arguments: [0, 1, 511, 512, 513, 1024, 4096]) func tiny(_ size: Int) throws {
        var builder = TableBuilder(size: size)
        #expect(try builder.table().kind == .none)
        guard size >= 512 else { return }
        builder.bootRecord(at: 0, [(0xee, 1, .max)])
        try expectRefused(builder, .gpt, "there is no header")
        builder.bootRecord(at: 0, [(0x83, 1, 10)])
        try expectRefused(builder, .mbr, "the disk has")
    }

    // MARK: - GUID partition tables

    /// Harm that both copies of a table have, with right checksums.
    private static let harms: [(String, @Sendable (inout FieldWriter) -> Void)] = [
        ("its header says", { $0.littleEndian(UInt64(5), at: 24) }),
        ("its header has 91 bytes", { $0.littleEndian(UInt32(91), at: 12) }),
        ("its header has 513 bytes", { $0.littleEndian(UInt32(513), at: 12) }),
        ("its header has 4294967295 bytes", { $0.littleEndian(UInt32.max, at: 12) }),
        ("the disk has 8192 sectors", { $0.littleEndian(UInt64(8192), at: 48) }),
        ("the disk has 8192 sectors", { $0.littleEndian(UInt64.max, at: 48) }),
        ("lie from sector 0", { $0.littleEndian(UInt64(0), at: 40) }),
        ("lie from sector 18446744073709551615", { $0.littleEndian(UInt64.max, at: 40) }),
        ("128 entries of 0 bytes", { $0.littleEndian(UInt32(0), at: 84) }),
        ("128 entries of 64 bytes", { $0.littleEndian(UInt32(64), at: 84) }),
        ("128 entries of 384 bytes", { $0.littleEndian(UInt32(384), at: 84) }),
        ("128 entries of 2147483648 bytes", { $0.littleEndian(UInt32(1 << 31), at: 84) }),
        ("0 entries of 128 bytes", { $0.littleEndian(UInt32(0), at: 80) }),
        ("8193 entries of 128 bytes", { $0.littleEndian(UInt32(8193), at: 80) }),
        ("4294967295 entries", { $0.littleEndian(UInt32.max, at: 80) }),
        ("checksum", { $0.littleEndian(UInt32(127), at: 80) }),
        ("said to be at sector 0", { $0.littleEndian(UInt64(0), at: 72) }),
        ("said to be at sector 8191", { $0.littleEndian(UInt64(8191), at: 72) }),
        ("out of range", { $0.littleEndian(UInt64.max, at: 72) }),
        ("said to be at sector 36028797018963967", { $0.littleEndian(UInt64.max >> 9, at: 72) }),
        ("there is no header", { $0.littleEndian(UInt64(0), at: 0) }),
    ]

    @Test(arguments: harms.indices) func header(_ index: Int) throws {
        var builder = TableBuilder(size: Self.size)
        GUIDTable(change: Self.harms[index].1, partitions: [(100, 200)]).write(to: &builder)
        try expectRefused(builder, .gpt, Self.harms[index].0)
    }

    @Test(
        arguments: [
            ([(100, 99)], "from sector 100 to 99"), ([(33, 99)], "from sector 33"), ([(0, 99)], "from sector 0"),
            ([(100, 8159)], "to 8159"), ([(100, .max)], "to 18446744073709551615"),
            ([(.max, .max)], "from sector 1844"),
            ([(.max, 0)], "from sector 1844"), ([(100, 200), (200, 300)], "overlap at sector 200"),
            ([(100, 200), (120, 130)], "partition 1 and partition 2"), ([(100, 200), (100, 200)], "overlap"),
        ] as [([(UInt64, UInt64)], String)])
    func entries(_ partitions: [(UInt64, UInt64)], _ words: String) throws {
        var builder = TableBuilder(size: Self.size)
        GUIDTable(partitions: partitions.map { (first: $0.0, last: $0.1) }).write(to: &builder)
        try expectRefused(builder, .gpt, words)
    }

    @Test func entriesAmongPartitions() throws {
        var builder = TableBuilder(size: Self.size)
        var table = GUIDTable(partitions: [(100, 200)])
        table.write(to: &builder)
        builder.write(Array(builder.bytes[1024..<34 * 512]), at: 1000 * 512)
        table.change = { $0.littleEndian(UInt64(1000), at: 72) }
        table.write(to: &builder, backup: false)
        builder.write(Array(builder.bytes[1024..<34 * 512]), at: 1000 * 512)
        try expectRefused(builder, .gpt, "among the partitions")
    }

    @Test(arguments: [(8192, 128), (64, 16_384), (1, 128), (4, 256), (16, 4096)]) func shapes(
        _ count: Int, _ size: Int
    ) throws {
        var builder = TableBuilder(size: Self.size)
        GUIDTable(entryCount: count, entrySize: size, partitions: [(3000, 4000)]).write(to: &builder)
        #expect(try builder.table().partitions.count == 1)
        #expect(try builder.table().warning == nil)
    }

    @Test(arguments: [92, 128, 512]) func largerHeaders(_ size: Int) throws {
        var builder = TableBuilder(size: Self.size)
        GUIDTable(headerSize: size, partitions: [(100, 200)]).write(to: &builder)
        #expect(try builder.table().partitions.count == 1)
    }

    @Test func primaryThatCannotBeRead() throws {
        var builder = TableBuilder(size: Self.size)
        GUIDTable(partitions: [(100, 200)]).write(to: &builder)
        let source = FailingSource(source: try builder.source, bad: 512..<1024)
        let table = try PartitionTable.read(from: source)
        #expect(table.partitions.count == 1 && table.warning?.contains("copy") == true)
        #expect(throws: DiskError.self) {
            try PartitionTable.read(from: FailingSource(source: try builder.source, bad: 0..<512))
        }
    }
}

/// A source with sectors that cannot be read.
private struct FailingSource: SectorSource {
    let source: StorageSource
    let bad: Range<UInt64>
    var size: UInt64 { source.size }

    func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        if bad.overlaps(offset..<offset + UInt64(buffer.count)) { throw .system(5, "read") }
        try source.read(into: buffer, at: offset)
    }
}

/// Every field and every byte of tables, set to what they should not be.
@Suite struct TableSweepTests {
    private static let seed = UInt64.random(in: 0...UInt64.max)

    private static func values(_ random: inout SeededGenerator) -> [UInt64] {
        [
            0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 52, 1 << 55,
            .max >> 9, .max >> 1, .max - 1, .max, random.next(), random.next() >> 32,
            random.next() & 0x1fff,
        ]
    }

    /// Sets fields of every width at every place of `range` to limits and random values, and reads what is there.
    private func sweep(
        _ builder: TableBuilder, _ range: Range<Int>, step: Int = 1, repair: (MemoryStorage) throws -> Void = { _ in }
    ) throws {
        var random = SeededGenerator(seed: Self.seed)
        let storage = MemoryStorage(builder.bytes)
        let source = try StorageSource(storage)
        for place in stride(from: range.lowerBound, to: range.upperBound, by: step) {
            for width in [1, 2, 4, 8] where place + width <= range.upperBound && place % width == 0 {
                for value in Self.values(&random) where width == 8 || value < 1 << UInt64(8 * width) {
                    var fields = FieldWriter(count: 8)
                    fields.littleEndian(value, at: 0)
                    try storage.write(Array(fields.bytes[..<width]), at: UInt64(place), for: .header)
                    try repair(storage)
                    let comment = "seed \(Self.seed): \(value) in \(width) bytes at \(place)"
                    checkPromises(try PartitionTable.read(from: source), size: source.size, comment)
                }
            }
            let end = min(place + 8, builder.bytes.count)
            try storage.write(Array(builder.bytes[place..<end]), at: UInt64(place), for: .header)
        }
    }

    @Test func bootRecords() throws {
        print("TableSweepTests: seed \(Self.seed)")
        var builder = TableBuilder(size: 1 << 20)
        builder.bootRecord(at: 0, signature: 77, [(0x83, 63, 100), (0x05, 200, 1000), (0x07, 1300, 20)])
        builder.bootRecord(at: 200, [(0x83, 5, 100), (0x05, 300, 200)])
        builder.bootRecord(at: 500, [(0x82, 8, 100), (0x05, 600, 200)])
        builder.bootRecord(at: 800, [(0x82, 9, 30)])
        #expect(try builder.table().partitions.count == 5)
        for sector in [0, 200, 500, 800] { try sweep(builder, sector * 512 + 440..<sector * 512 + 512) }
    }

    @Test(arguments: [512, 4096], [true, false]) func guidTables(_ size: Int, _ isPrimary: Bool) throws {
        print("TableSweepTests: seed \(Self.seed)")
        var builder = TableBuilder(size: 1 << 20)
        let table = GUIDTable(sectorSize: size, partitions: [(100, 110), (120, 130), (140, 160)])
        table.write(to: &builder, primary: isPrimary)
        #expect(try builder.table().partitions.count == 3)
        let last = builder.bytes.count / size - 1
        let header = (isPrimary ? 1 : last) * size
        let entries = (isPrimary ? 2 : last - 16_384 / size) * size
        // With the checksums put right: otherwise the rest is hardly looked at.
        let repair = { (storage: MemoryStorage) throws in
            let bytes = try storage.bytes(at: UInt64(entries), count: 16_384, for: .header, "entries")
            var fields = FieldWriter(try storage.bytes(at: UInt64(header), count: size, for: .header, "header"))
            fields.littleEndian(crc32(bytes), at: 88)
            try storage.write(GUIDTable.withChecksum(fields.bytes), at: UInt64(header), for: .header)
        }
        try sweep(builder, header..<header + 92)
        try sweep(builder, header..<header + 92, repair: repair)
        try sweep(builder, entries..<entries + 384, step: 4, repair: repair)
    }
}

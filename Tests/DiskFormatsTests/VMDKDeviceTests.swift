import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats
@testable import DiskPartitions

/// Disks with partition tables, made here.
private struct SampleDevice {
    var bytes: [UInt8]

    init(sectors: Int) {
        bytes = []
        for sector in 0..<sectors { bytes += [UInt8](repeating: UInt8(truncatingIfNeeded: sector * 7 + 1), count: 512) }
    }

    mutating func bootRecord(at sector: Int, _ entries: [(type: UInt8, start: UInt32, count: UInt32)]) {
        var fields = FieldWriter([UInt8](repeating: 0, count: 512))
        for (index, entry) in entries.enumerated() {
            fields.byte(entry.type, at: 446 + 16 * index + 4)
            fields.littleEndian(entry.start, at: 446 + 16 * index + 8)
            fields.littleEndian(entry.count, at: 446 + 16 * index + 12)
        }
        fields.littleEndian(UInt16(0xaa55), at: 510)
        bytes.replaceSubrange(sector * 512..<sector * 512 + 512, with: fields.bytes)
    }

    /// A GUID partition table with its copy at the end; sectors are of `size` bytes.
    mutating func guidTable(sectorSize size: Int = 512, _ partitions: [(first: UInt64, last: UInt64)?]) {
        bootRecord(at: 0, [(0xee, 1, 0xffff_ffff)])
        var entries = FieldWriter(count: 128 * 128)
        for (index, partition) in partitions.enumerated() {
            guard let partition else { continue }
            entries.byte(0xaf, at: index * 128)
            entries.littleEndian(partition.first, at: index * 128 + 32)
            entries.littleEndian(partition.last, at: index * 128 + 40)
        }
        let sectors = bytes.count / size
        let entrySectors = 128 * 128 / size
        var header = FieldWriter(count: 92)
        header.bytes("EFI PART".utf8, at: 0)
        header.littleEndian(UInt32(0x1_0000), at: 8)
        header.littleEndian(UInt32(92), at: 12)
        header.littleEndian(UInt64(1), at: 24)
        header.littleEndian(UInt64(sectors - 1), at: 32)
        header.littleEndian(UInt64(2 + entrySectors), at: 40)
        header.littleEndian(UInt64(sectors - 2 - entrySectors), at: 48)
        header.littleEndian(UInt64(2), at: 72)
        header.littleEndian(UInt32(128), at: 80)
        header.littleEndian(UInt32(128), at: 84)
        header.littleEndian(crc32(entries.bytes), at: 88)
        header.littleEndian(crc32(header.bytes), at: 16)
        bytes.replaceSubrange(size..<size + 92, with: header.bytes)
        bytes.replaceSubrange(2 * size..<2 * size + entries.bytes.count, with: entries.bytes)
    }

    func table() throws(DiskError) -> VMDKPartitionTable {
        try VMDKPartitionTable(reading: MemoryStorage(bytes), sectorCount: UInt64(bytes.count / 512))
    }
}

private func mbrDevice() -> SampleDevice {
    var device = SampleDevice(sectors: 40_000)
    device.bootRecord(at: 0, [(0x83, 2048, 4000), (0, 0, 0), (0x0f, 10_000, 20_000), (0x07, 35_000, 5000)])
    device.bootRecord(at: 10_000, [(0x83, 63, 3000), (0x05, 5000, 4000)])
    device.bootRecord(at: 15_000, [(0x82, 2048, 1000), (0, 0, 0)])
    return device
}

@Suite struct VMDKPartitionTableTests {
    @Test func masterBootRecord() throws {
        let table = try mbrDevice().table()
        #expect(
            table.partitions == [
                .init(number: 1, sectors: 2048..<6048), .init(number: 4, sectors: 35_000..<40_000),
                .init(number: 5, sectors: 10_063..<13_063), .init(number: 6, sectors: 17_048..<18_048),
            ])
        #expect(table.tableAreas == [0..<2048, 10_000..<10_001, 15_000..<15_001])
    }

    @Test(arguments: [512, 4096]) func guidTable(_ size: Int) throws {
        var device = SampleDevice(sectors: 65_536)
        let scale = UInt64(size / 512)
        device.guidTable(sectorSize: size, [(256, 999), nil, (2000, 4000)])
        let table = try device.table()
        #expect(
            table.partitions == [
                .init(number: 1, sectors: 256 * scale..<1000 * scale),
                .init(number: 3, sectors: 2000 * scale..<4001 * scale),
            ])
        let lastUsable = UInt64(65_536 / Int(scale) - 2 - 128 * 128 / size)
        #expect(table.tableAreas == [0..<min(2048, 256 * scale), (lastUsable + 1) * scale..<65_536])
    }

    @Test func broken() throws {
        #expect(throws: DiskError.self) { try SampleDevice(sectors: 100).table() }
        #expect(throws: DiskError.self) {
            try VMDKPartitionTable(reading: MemoryStorage([1, 2]), sectorCount: 1)
        }
        var device = SampleDevice(sectors: 5000)
        device.bootRecord(at: 0, [(0x83, 100, 4901)])
        #expect(throws: DiskError.self, "it ends behind the device") { try device.table() }
        device.bootRecord(at: 0, [(0x83, 100, 1000), (0x83, 1099, 10)])
        #expect(throws: DiskError.self, "they overlap") { try device.table() }
        device.bootRecord(at: 0, [(0x05, 100, 1000)])
        device.bootRecord(at: 100, [(0, 0, 0), (0x05, 0, 1000)])
        #expect(throws: DiskError.self, "a circle") { try device.table() }
        device.guidTable([(100, 50)])
        #expect(throws: DiskError.self) { try device.table() }
        device.guidTable([(10, 50)])
        #expect(throws: DiskError.self, "inside the table") { try device.table() }
        device.guidTable([(100, 200)])
        for place in [512 + 40, 512 + 16, 1024 + 5] {
            var damaged = device
            damaged.bytes[place] ^= 1
            #expect(throws: DiskError.self) { try damaged.table() }
        }
    }

    @Test func damagedAtRandom() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededGenerator(seed: seed)
        print("VMDKPartitionTableTests.damagedAtRandom: seed \(seed)")
        var guid = SampleDevice(sectors: 3000)
        guid.guidTable([(100, 200), (300, 400)])
        for base in [mbrDevice(), guid] {
            let storage = MemoryStorage(base.bytes)
            let isGUID = base.bytes.count == guid.bytes.count
            for _ in 0..<400 {
                let sector = isGUID ? 1 : [0, 10_000, 15_000].randomElement(using: &random) ?? 0
                let original = Array(base.bytes[sector * 512..<sector * 512 + 512])
                var fields = FieldWriter(original)
                fields.byte(
                    UInt8.random(in: 0...255, using: &random),
                    at: isGUID ? Int.random(in: 8..<92, using: &random) : Int.random(in: 446..<510, using: &random))
                if isGUID {
                    fields.littleEndian(UInt32(0), at: 16)
                    fields.littleEndian(crc32(Array(fields.bytes[..<92])), at: 16)
                }
                try storage.write(fields.bytes, at: UInt64(sector * 512), for: .header)
                _ = try? VMDKPartitionTable(reading: storage, sectorCount: UInt64(base.bytes.count / 512))
                try storage.write(original, at: UInt64(sector * 512), for: .header)
            }
        }
    }
}

@Suite struct VMDKDeviceTests {
    @Test func fullDevice() throws {
        let folder = try TemporaryFolder()
        let device = try folder.write(mbrDevice().bytes, to: "device")
        let path = folder.file("disk.vmdk")
        try createVMDK(
            CreateRequest(path: path, virtualSize: 0, variant: "full-device", options: ["device": device]),
            companions: FolderCompanions())
        let text = try VMDKDescriptor(parsing: try folder.read("disk.vmdk"))
        #expect(text.createType == .fullDevice)
        #expect(text.extents.map(\.line) == ["RW 40000 FLAT \"\(device)\" 0"])
        #expect(throws: DiskError.self, "another size") {
            try createVMDK(
                CreateRequest(
                    path: folder.file("b.vmdk"), virtualSize: 512, variant: "full-device", options: ["device": device]),
                companions: FolderCompanions())
        }
    }

    @Test func partitionedDevice() throws {
        let folder = try TemporaryFolder()
        let sample = mbrDevice()
        let device = try folder.write(sample.bytes, to: "device")
        try createVMDK(
            CreateRequest(
                path: folder.file("disk.vmdk"), virtualSize: 0, variant: "partitioned-device",
                options: ["device": device, "partitions": "6,1"]),
            companions: FolderCompanions())
        let text = try VMDKDescriptor(parsing: try folder.read("disk.vmdk"))
        #expect(text.createType == .partitionedDevice)
        #expect(
            text.extents.map(\.line) == [
                "RW 2048 FLAT \"disk-pt.vmdk\" 0", "RW 4000 FLAT \"\(device)\" 2048", "RW 3952 ZERO",
                "RW 1 FLAT \"disk-pt.vmdk\" 2048", "RW 4999 ZERO", "RW 1 FLAT \"disk-pt.vmdk\" 2049", "RW 2047 ZERO",
                "RW 1000 FLAT \"\(device)\" 17048", "RW 21952 ZERO",
            ])
        #expect(text.sectorCount == 40_000)
        let side = try folder.read("disk-pt.vmdk")
        #expect(
            side
                == Array(
                    sample.bytes[..<(2048 * 512)] + sample.bytes[10_000 * 512..<10_001 * 512]
                        + sample.bytes[15_000 * 512..<15_001 * 512]))
        #expect(throws: DiskError.self, "there is no such partition") {
            try createVMDK(
                CreateRequest(
                    path: folder.file("b.vmdk"), virtualSize: 0, variant: "partitioned-device",
                    options: ["device": device, "partitions": "2"]),
                companions: FolderCompanions())
        }
    }
}

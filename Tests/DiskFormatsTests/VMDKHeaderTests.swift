import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

@Suite struct VMDKSparseHeaderTests {
    static func sample() -> VMDKSparseHeader {
        var header = VMDKSparseHeader(capacitySectors: 20_480)
        header.descriptorSector = 1
        header.descriptorSectorCount = 20
        header.redundantDirectorySector = 21
        header.directorySector = 26
        header.overheadSectors = 128
        return header
    }

    @Test func bytesOfVMwares() throws {
        // The header of an extent that vmware-vdiskmanager -t 1 made.
        var fields = FieldWriter(count: 512)
        fields.bytes([0x4b, 0x44, 0x4d, 0x56, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0x50], at: 0)
        fields.byte(0x80, at: 20)
        fields.byte(2, at: 45)
        fields.byte(1, at: 48)
        fields.byte(6, at: 56)
        fields.byte(0x80, at: 64)
        fields.bytes([0x0a, 0x20, 0x0d, 0x0a], at: 73)
        let header = try VMDKSparseHeader(parsing: fields.bytes)
        #expect(header.capacitySectors == 20_480)
        #expect(header.grainSectors == 128)
        #expect(header.entriesPerTable == 512)
        #expect(header.directoryEntryCount == 1)
        #expect(header.usesRedundantDirectory && !header.hasZeroGrains && !header.isCompressed && !header.hasMarkers)
        #expect(header.redundantDirectorySector == 1 && header.directorySector == 6 && header.overheadSectors == 128)
        #expect(!header.isUnclean && !header.isDescriptorOnly && !header.directoryIsAtEnd)
        #expect(header.encode() == fields.bytes)
    }

    @Test func roundTrip() throws {
        var header = Self.sample()
        header.version = 3
        header.flags = [.newlineTest, .zeroGrains, .compressed, .markers]
        header.compressAlgorithm = 1
        header.isUnclean = true
        header.directorySector = VMDKSparseHeader.directoryAtEnd
        let again = try VMDKSparseHeader(parsing: header.encode())
        #expect(again == header)
        #expect(again.directoryIsAtEnd && again.hasZeroGrains && again.isCompressed && again.hasMarkers)
    }

    @Test func transferInTextMode() throws {
        // CR removed, as when a file goes from Windows to Unix as text.
        var bytes = Self.sample().encode()
        bytes.remove(at: 75)
        bytes.append(0)
        #expect { try VMDKSparseHeader(parsing: bytes) } throws: { "\($0)".contains("text mode") }
    }

    @Test(
        arguments: [
            (4, 4, 0), (4, 4, 4), (12, 8, 1 << 55), (12, 8, 1 << 50), (20, 8, 0), (20, 8, 3), (20, 8, 1 << 18),
            (20, 8, 1 << 63), (36, 8, 4097), (44, 4, 0), (44, 4, 506), (44, 4, 64), (44, 4, 1 << 17), (44, 4, 1 << 31),
            (48, 8, 0), (48, 8, 1 << 60), (56, 8, 0), (56, 8, 1 << 60), (64, 8, 1 << 60), (77, 2, 2), (0, 4, 0),
        ] as [(Int, Int, UInt64)])
    func refused(_ offset: Int, _ size: Int, _ value: UInt64) {
        let bytes = Self.sample().encode().setting(value, at: offset, size: size)
        #expect(throws: DiskError.self) { try VMDKSparseHeader(parsing: bytes) }
    }

    @Test func contradictions() throws {
        var header = Self.sample()
        header.flags.insert(.compressed)
        #expect(throws: DiskError.self) { try VMDKSparseHeader(parsing: header.encode()) }
        header.compressAlgorithm = 1
        #expect(throws: Never.self) { try VMDKSparseHeader(parsing: header.encode()) }
        header.grainSectors = 2 * VMDKSparseHeader.compressedGrainLimit
        #expect(throws: DiskError.self) { try VMDKSparseHeader(parsing: header.encode()) }
    }

    @Test func descriptorAlone() throws {
        var header = VMDKSparseHeader(capacitySectors: 0)
        header.grainSectors = 0
        header.entriesPerTable = 0
        header.descriptorSector = 1
        header.descriptorSectorCount = 20
        #expect(try VMDKSparseHeader(parsing: header.encode()).isDescriptorOnly)
    }

    /// What is accepted is inside the limits, and its sizes can be computed.
    private func examine(_ bytes: [UInt8]) {
        guard let header = try? VMDKSparseHeader(parsing: bytes), !header.isDescriptorOnly else { return }
        #expect(header.directoryEntryCount <= VMDKSparseHeader.directoryLimit)
        #expect(header.directorySectorCount <= 1 << 16)
        #expect(header.tableSectorCount <= 512)
        #expect(header.tableCoverage > 0)
        #expect(header.overheadSectors <= 1 << 54)
    }

    @Test func everyFieldAtItsEdges() {
        let base = Self.sample().encode()
        let fields = [
            (0, 4), (4, 4), (8, 4), (12, 8), (20, 8), (28, 8), (36, 8), (44, 4), (48, 8), (56, 8), (64, 8), (72, 1),
            (73, 1), (74, 1), (75, 1), (76, 1), (77, 2),
        ]
        for (offset, size) in fields {
            for value in edgeValues { examine(base.setting(value, at: offset, size: size)) }
        }
        for count in 0..<512 { #expect(throws: DiskError.self) { try cutShort(base, count) } }
    }

    private func cutShort(_ bytes: [UInt8], _ count: Int) throws(DiskError) {
        // Padding is not looked at; the fields are.
        if count >= 79 { throw DiskError(.invalidImage, "") }
        _ = try VMDKSparseHeader(parsing: Array(bytes[..<count]))
    }

    @Test func randomBytes() {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededGenerator(seed: seed)
        print("VMDKSparseHeaderTests.randomBytes: seed \(seed)")
        let base = Self.sample().encode()
        for _ in 0..<20_000 {
            var bytes = base
            for _ in 0..<Int.random(in: 1...5, using: &random) {
                bytes[Int.random(in: 4..<79, using: &random)] = UInt8.random(in: 0...255, using: &random)
            }
            examine(bytes)
        }
    }
}

@Suite struct COWDHeaderTests {
    private func sample() -> COWDHeader {
        COWDHeader(
            capacitySectors: 2_097_152, grainSectors: 1, freeSector: 8,
            geometry: DiskGeometry(cylinders: 130, heads: 255, sectors: 63))
    }

    @Test func roundTrip() throws {
        var header = try COWDHeader(parsing: sample().encode())
        #expect(header == sample())
        #expect(header.directorySector == 4 && header.directoryEntryCount == 512 && header.freeSector == 8)
        header.freeSector = 4711
        header.isUnclean = true
        #expect(try COWDHeader(parsing: header.encode()) == header)
        #expect(header.encode()[1648] == 1)
    }

    @Test func unknownFieldsAreKept() throws {
        var bytes = sample().encode()
        for place in 1056..<1648 { bytes[place] = UInt8(truncatingIfNeeded: place) }
        for place in 1652..<2048 { bytes[place] = 0xaa }
        #expect(try COWDHeader(parsing: bytes).encode() == bytes)
    }

    @Test func parentName() throws {
        let name = Array("base.vmdk".utf8)
        var bytes = COWDHeader(capacitySectors: 1, grainSectors: 1, freeSector: 8, geometry: nil).encode()
        #expect(try COWDHeader(parsing: bytes).parentFileName == nil)
        bytes.replaceSubrange(32..<32 + name.count, with: name)
        #expect(try COWDHeader(parsing: bytes).parentFileName == name)
    }

    @Test(arguments: [(0, 0), (4, 2), (12, 0xffff_ffff), (16, 0), (16, 3), (16, 4096), (20, 0), (20, 3), (24, 511)])
    func refused(_ offset: Int, _ value: UInt64) {
        #expect(throws: DiskError.self) {
            try COWDHeader(parsing: sample().encode().setting(value, at: offset, size: 4))
        }
    }

    @Test func everyFieldAtItsEdges() {
        let base = sample().encode()
        for offset in stride(from: 0, to: 48, by: 4) {
            for value in edgeValues { _ = try? COWDHeader(parsing: base.setting(value, at: offset, size: 4)) }
        }
        for count in stride(from: 0, to: 2048, by: 7) {
            #expect(throws: DiskError.self) { try COWDHeader(parsing: Array(base[..<count])) }
        }
    }

    @Test func descriptorForOneAlone() throws {
        let descriptor = VMDKDescriptor(describing: sample())
        #expect(descriptor.sectorCount == 2_097_152)
        #expect(descriptor.createType == .vmfsSparse)
    }
}

@Suite struct SESparseHeaderTests {
    /// As ESX lays one out: 16 MiB of disk a table.
    private func sample() -> [UInt8] {
        var fields = FieldWriter(count: 512)
        let values: [(Int, UInt64)] = [
            (0, 0xcafe_babe), (8, 0x2_0000_0001), (16, 2_097_152), (24, 8), (32, 64), (80, 1), (88, 1), (96, 2),
            (104, 2),
            (112, 2048), (120, 2048), (128, 4096), (136, 8), (144, 6144), (152, 4096), (160, 10_240), (168, 2048),
            (176, 12_288), (184, 4096), (192, 16_384), (200, 2_097_152),
        ]
        for (offset, value) in values { fields.littleEndian(value, at: offset) }
        return fields.bytes
    }

    private func volatileHeader(replay: UInt64) -> [UInt8] {
        var fields = FieldWriter(count: 512)
        fields.littleEndian(UInt64(0xcafe_cafe), at: 0)
        fields.littleEndian(replay, at: 24)
        return fields.bytes
    }

    @Test func values() throws {
        let header = try SESparseHeader(parsing: sample())
        #expect(header.capacitySectors == 2_097_152)
        #expect(header.directorySector == 4096 && header.tablesSector == 6144 && header.grainsSector == 16_384)
        #expect(SESparseHeader.hasMagic(sample()))
        #expect(!SESparseHeader.hasMagic([0xbe, 0xba]))
    }

    @Test func journal() throws {
        let clean = MemoryStorage(sample() + volatileHeader(replay: 0))
        #expect(throws: Never.self) { try SESparseHeader(reading: clean) }
        let dirty = MemoryStorage(sample() + volatileHeader(replay: 1))
        #expect { try SESparseHeader(reading: dirty) } throws: { ($0 as? DiskError)?.kind == .needsRepair }
        #expect(throws: DiskError.self) { try SESparseHeader(reading: MemoryStorage(sample())) }
        #expect(throws: DiskError.self) { try SESparseHeader(reading: MemoryStorage(sample() + sample())) }
    }

    @Test func everyFieldAtItsEdges() throws {
        for offset in stride(from: 0, to: 512, by: 8) {
            for value in edgeValues {
                guard let header = try? SESparseHeader(parsing: sample().setting(value, at: offset, size: 8)) else {
                    continue
                }
                #expect(header.capacitySectors <= SESparseHeader.capacityLimit)
                #expect(header.grainsSector <= 1 << 54)
            }
        }
        for offset in [0, 8, 24, 32, 40, 48, 208, 504] {
            #expect(throws: DiskError.self) { try SESparseHeader(parsing: sample().setting(5, at: offset, size: 8)) }
        }
    }
}

@Suite struct VMDKStreamMarkerTests {
    @Test func roundTrip() {
        let markers: [VMDKStreamMarker] = [
            .endOfStream, .grainTable(sectors: 4), .grainDirectory(sectors: 1), .footer(sectors: 1),
        ]
        for marker in markers {
            #expect(marker.encode().count == 512)
            #expect(VMDKStreamMarker(parsing: FieldReader(marker.encode())) == marker)
        }
        let grain = VMDKStreamMarker.grain(sector: 0x1_2345_6789, size: 77)
        #expect(grain.encode().count == 12)
        #expect(VMDKStreamMarker(parsing: FieldReader(grain.encode() + [0x78, 1, 0, 0])) == grain)
    }

    @Test func unknownAndShort() {
        #expect(VMDKStreamMarker(parsing: FieldReader([UInt8](repeating: 0, count: 15))) == nil)
        let strange = [UInt8](repeating: 0, count: 512).setting(4, at: 12, size: 4)
        #expect(VMDKStreamMarker(parsing: FieldReader(strange)) == nil)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

struct QCOW2HeaderTests {
    private static func sample() -> QCOW2Header {
        var header = QCOW2Header(size: 5 << 30)
        header.l1TableOffset = 0x3_0000
        header.l1Size = 10
        header.refcountTableOffset = 0x1_0000
        header.refcountTableClusters = 1
        return header
    }

    /// The first bytes of an image that qemu-img 7.2 made: 1 GiB, all else as usual.
    @Test func bytesOfQEMU() throws {
        var fields = FieldWriter(count: 112)
        fields.bytes([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3], at: 0)
        fields.bytes([0, 0, 0, 16, 0, 0, 0, 0, 0x40, 0, 0, 0], at: 20)
        fields.bytes([0, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0, 0], at: 36)
        fields.bytes([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1], at: 48)
        fields.bytes([0, 0, 0, 4, 0, 0, 0, 0x70], at: 96)
        let header = try QCOW2Header(parsing: fields.bytes)
        #expect(header.version == 3 && header.clusterSize == 65_536 && header.size == 1 << 30)
        #expect(header.l1Size == 2 && header.l1TableOffset == 0x3_0000)
        #expect(header.refcountTableOffset == 0x1_0000 && header.refcountTableClusters == 1)
        #expect(header.refcountBits == 16 && header.compressionType == .deflate)
        #expect(header.l2Coverage == 512 << 20 && header.l1EntryCount(for: header.size) == 2)
        #expect(header.encode() == fields.bytes)
    }

    @Test func roundTrip() throws {
        var header = Self.sample()
        header.clusterBits = 14
        header.l1Size = 1 << 16
        header.incompatible = [.extendedL2, .compressionType, .externalDataFile]
        header.compatible = [.lazyRefcounts]
        header.autoclear = [.rawExternalData]
        header.compressionType = .zstd
        header.refcountOrder = 6
        #expect(try QCOW2Header(parsing: header.encode()) == header)
        var old = Self.sample()
        old.version = 2
        old.headerLength = 72
        #expect(old.encode().count == 72)
        #expect(try QCOW2Header(parsing: old.encode()) == old)
    }

    /// Every field at every edge is taken or is an error; what is taken is inside its limits.
    @Test func absurdFields() {
        let base = Self.sample().encode()
        var taken = 0
        for (offset, size) in [
            (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8),
            (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1),
        ] {
            for value in edgeValues {
                let swapped = value.byteSwapped >> UInt64(64 - size * 8)
                guard let header = try? QCOW2Header(parsing: base.setting(swapped, at: offset, size: size)) else {
                    continue
                }
                taken += 1
                #expect((9...21).contains(header.clusterBits) && header.refcountOrder <= 6)
                #expect(header.l1EntryCount(for: header.size) <= UInt64(header.l1Size))
                #expect(UInt64(header.l1Size) * 8 <= 32 << 20 && header.refcountTableByteCount <= 8 << 20)
                #expect(header.l1TableOffset % header.clusterSize == 0)
            }
        }
        #expect(taken > 50)
        for count in 0..<104 { #expect(throws: DiskError.self) { try QCOW2Header(parsing: Array(base[..<count])) } }
    }

    @Test func extensionsAreParsed() throws {
        let header = Self.sample()
        let name = QCOW2FeatureName(type: 0, bit: 9, name: "quantum")
        let cluster =
            header.encode() + QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.backingFormat, Array("raw".utf8))
            + QCOW2HeaderExtensions.encode(0x1234_5678, [1, 2, 3])
            + QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.featureNameTable, name.encode())
            + QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.externalDataFile, Array("disk.data".utf8))
            + QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.end, []) + [1, 2, 3, 4, 5, 6, 7, 8]
        let parsed = try QCOW2HeaderExtensions(parsing: cluster, header)
        #expect(parsed.backingFormatName == "raw" && parsed.dataFileName == "disk.data")
        #expect(parsed.featureNames.map(\.name) == ["quantum"])
        var later = header
        later.incompatible = .init(rawValue: 1 << 9 | 1 << 40)
        #expect { try parsed.checkFeatures(later) } throws: {
            "\($0)".contains("'quantum', number 40") && ($0 as? DiskError)?.kind == .unsupported
        }
        var cut = cluster
        cut[header.encode().count + 7] = 255
        cut[header.encode().count + 6] = 255
        #expect(throws: DiskError.self) { try QCOW2HeaderExtensions(parsing: cut, header) }
    }

    @Test func versionsAreToldApart() {
        #expect(QCOW2Header.hasMagic([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 2]))
        #expect(!QCOW2Header.hasMagic([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 1]))
        #expect(QCOWHeader.hasMagic([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 1]))
        #expect(!QCOW2Header.hasMagic([0x51, 0x46, 0x49, 0xfb, 0, 0, 0]))
    }

    @Test(
        arguments: [
            ("json:{}", "json"), ("nbd://host", "nbd"), ("base.img", nil), ("./a:b", nil), ("/a:b", nil), ("a:b", nil),
            ("ab:c", "ab"), (":a", nil), ("file:a", "file"),
        ] as [(String, String?)])
    func protocolsInNames(_ name: String, _ scheme: String?) {
        #expect(QEMUFileName.protocolName(name) == scheme)
        #expect(QEMUFileName.protocolName(QEMUFileName.stored(name)) == nil)
    }
}

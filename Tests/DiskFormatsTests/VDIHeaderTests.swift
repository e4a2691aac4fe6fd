import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// The header of either version, field by field.
struct VDIHeaderTests {
    private static let uuids = (1...4).map { number in
        DiskUUID("0123456\(number)-89ab-4cde-8f01-23456789abcd") ?? .null
    }

    private static func sample(headerSize: UInt32 = 400) -> VDIHeader {
        var header = VDIHeader(
            type: .differencing, mapOffset: 512, blocksOffset: 4096, diskSize: 5 << 20, blockSize: 1 << 20,
            blockCount: 5, uuid: uuids[0], modificationUUID: uuids[1])
        header.headerSize = headerSize
        header.flags = VDIHeader.zeroExpand
        header.comment = "ein Kommentar: ä"
        header.allocatedBlocks = 3
        header.blockExtra = 512
        (header.parentUUID, header.parentModificationUUID) = (uuids[2], uuids[3])
        header.geometry = .init(cylinders: 10, heads: 16, sectors: 63)
        header.biosGeometry = headerSize >= 400 ? .init(cylinders: 5, heads: 32, sectors: 63) : nil
        return header
    }

    @Test(arguments: [384, 400] as [UInt32]) func whatIsWrittenIsRead(_ headerSize: UInt32) throws {
        let header = Self.sample(headerSize: headerSize)
        #expect(try VDIHeader(parsing: header.encode()) == header)
    }

    /// The bytes are where VirtualBox has them; a UUID's first three fields are least significant byte first.
    @Test func fieldsLieWhereTheyShould() {
        let bytes = Self.sample().encode()
        #expect(bytes.count == 512)
        #expect(bytes[64..<72] == [0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0])
        #expect(bytes[72..<84] == [0x90, 1, 0, 0, 4, 0, 0, 0, 0, 1, 0, 0])
        #expect(bytes[340..<348] == [0, 2, 0, 0, 0, 16, 0, 0])
        #expect(bytes[368..<376] == [0, 0, 0x50, 0, 0, 0, 0, 0])
        #expect(bytes[376..<392] == [0, 0, 16, 0, 0, 2, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0])
        #expect(bytes[392..<402] == [0x61, 0x45, 0x23, 0x01, 0xab, 0x89, 0xde, 0x4c, 0x8f, 0x01])
    }

    /// Version 0.x: no header size, the map after the header, the blocks after the map.
    private static func version0(blockCount: UInt32 = 3, minor: UInt32 = 0) -> [UInt8] {
        var fields = FieldWriter(count: 512)
        fields.littleEndian(VDIHeader.signature, at: 64)
        fields.littleEndian(minor, at: 68)
        fields.littleEndian(UInt32(3), at: 72)
        fields.bytes("old".utf8, at: 80)
        fields.littleEndian(UInt32(512), at: 348)
        fields.littleEndian(UInt64(2_500_096), at: 352)
        fields.littleEndian(UInt32(1 << 20), at: 360)
        fields.littleEndian(blockCount, at: 364)
        fields.littleEndian(UInt32(2), at: 368)
        for (index, uuid) in uuids.prefix(3).enumerated() { fields.bytes(uuid.mixedEndian, at: 372 + index * 16) }
        return fields.bytes
    }

    @Test(arguments: [0, 1, 9] as [UInt32]) func version0IsRead(minor: UInt32) throws {
        let header = try VDIHeader(parsing: Self.version0(minor: minor))
        #expect(header.versionName == "0.\(minor)" && header.type == .undo && header.comment == "old")
        #expect(header.mapOffset == 420 && header.blocksOffset == 432 && header.blockExtra == 0)
        #expect(header.diskSize == 2_500_096 && header.blockCount == 3 && header.allocatedBlocks == 2)
        #expect([header.uuid, header.modificationUUID, header.parentUUID] == Array(Self.uuids.prefix(3)))
        #expect(header.parentModificationUUID.isNull && header.biosGeometry == nil && header.isChild)
    }

    @Test(arguments: [
        (64, 0, DiskError.Kind.invalidImage), (68, 0x0001_0000, .unsupported), (68, 0x0001_0002, .unsupported),
        (68, 0x0002_0000, .unsupported), (72, 383, .invalidImage), (72, 0, .invalidImage), (72, 4000, .invalidImage),
        (76, 0, .unsupported), (76, 5, .unsupported), (340, 0, .invalidImage), (340, 455, .invalidImage),
        (340, 514, .invalidImage), (340, 4096, .invalidImage), (344, 0, .invalidImage), (344, 531, .invalidImage),
        (360, 0, .unsupported), (360, 4096, .unsupported), (376, 0, .invalidImage), (376, 256, .invalidImage),
        (376, 1_000_000, .invalidImage), (376, 1 << 31, .invalidImage), (380, 513, .invalidImage),
        (380, 1 << 31, .invalidImage), (384, 4, .invalidImage), (384, 1 << 20, .invalidImage),
    ])
    func wrongFieldIsRefused(_ offset: Int, _ value: UInt64, _ kind: DiskError.Kind) throws {
        let bytes = Self.sample().encode().setting(value, at: offset, size: 4)
        #expect { try VDIHeader(parsing: bytes) } throws: { ($0 as? DiskError)?.kind == kind }
    }

    /// Any value in any place, in either version: an error or a header, whose sums fit.
    @Test func anyValueAnywhere() {
        for bytes in [Self.sample().encode(), Self.version0()] {
            for offset in 64..<472 {
                for value in edgeValues {
                    for size in [4, 8] where offset + size <= 472 {
                        guard let header = try? VDIHeader(parsing: bytes.setting(value, at: offset, size: size)) else {
                            continue
                        }
                        #expect(header.blockSize.isPowerOfTwo && header.virtualSize <= header.diskSize)
                        #expect(header.mapEnd <= header.blocksOffset)
                        #expect(header.virtualSize <= header.blockCount * header.blockSize)
                    }
                }
            }
        }
        for count in 0..<420 {
            #expect(throws: DiskError.self) { try VDIHeader(parsing: Self.version0().slice(0, count)) }
        }
    }
}

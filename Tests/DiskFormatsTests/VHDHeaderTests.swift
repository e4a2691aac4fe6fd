import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// The structures of VHD, field by field.
@Suite struct VHDHeaderTests {
    private static func sample(_ type: VHDFooter.DiskType = .dynamic, size: UInt64 = 20 << 20) -> VHDFooter {
        VHDFooter(
            type: type, size: size, geometry: .newVHD(size: size), uuid: .random(),
            timestamp: VHDTimestamp(seconds: 0x1234_5678))
    }

    @Test(arguments: [VHDFooter.DiskType.fixed, .dynamic, .differencing])
    func footerRoundTrip(_ type: VHDFooter.DiskType) throws {
        let footer = Self.sample(type)
        let bytes = footer.encode()
        #expect(bytes.count == 512)
        #expect(VHDFooter.hasRightChecksum(bytes))
        #expect(try VHDFooter(parsing: bytes) == footer)
        #expect(footer.dataOffset == (type == .fixed ? .max : 512))
    }

    /// The bytes of a footer that Hyper-V wrote, at the offsets of the specification.
    @Test func fieldsLieWhereTheSpecificationSays() throws {
        var fields = FieldWriter(count: 512)
        fields.bytes("conectix".utf8, at: 0)
        fields.bytes([0, 0, 0, 2, 0, 1, 0, 0], at: 8)
        fields.bytes([0, 0, 0, 0, 0, 0, 2, 0], at: 16)
        fields.bytes([0x27, 0xb0, 0x2c, 0xe6], at: 24)
        fields.bytes("win ".utf8, at: 28)
        fields.bytes([0, 0x0a, 0, 0], at: 32)
        fields.bytes("Wi2k".utf8, at: 36)
        fields.bytes([0, 0, 0, 0, 0, 0xa0, 0, 0], at: 40)
        fields.bytes([0, 0, 0, 0, 0, 0xb0, 0, 0], at: 48)
        fields.bytes([1, 2, 4, 17, 0, 0, 0, 3], at: 56)
        fields.bytes(Array(0x10..<0x20), at: 68)
        fields.byte(1, at: 84)
        let bytes = VHDFooter.withChecksum(fields.bytes)
        let footer = try VHDFooter(parsing: bytes)
        #expect(footer.features == 2 && footer.dataOffset == 512 && footer.type == .dynamic)
        #expect(footer.timestamp.seconds == 0x27b0_2ce6)
        #expect(footer.creatorApplication == Array("win ".utf8) && footer.creatorVersion == 0xa0000)
        #expect(footer.creatorHostOS == Array("Wi2k".utf8))
        #expect(footer.originalSize == 0xa0_0000 && footer.currentSize == 0xb0_0000)
        #expect(footer.geometry == DiskGeometry(cylinders: 258, heads: 4, sectors: 17))
        #expect(footer.uuid.description == "10111213-1415-1617-1819-1a1b1c1d1e1f" && footer.savedState == 1)
        #expect(footer.encode() == bytes)
        // The sum of the other bytes, by hand: complement and sum are all ones together.
        let stored: UInt32 = try FieldReader(bytes).bigEndian(at: 64)
        let sum = bytes.enumerated().reduce(UInt32(0)) {
            $0 &+ ((64..<68).contains($1.offset) ? 0 : UInt32($1.element))
        }
        #expect(stored ^ sum == .max)
    }

    @Test func footersThatCannotBe() throws {
        let bytes = Self.sample().encode()
        for (offset, value) in [(0, 0x43), (12, 2), (63, 0), (63, 1), (63, 5), (60, 1), (48, 0x80)] as [(Int, UInt8)] {
            var changed = bytes
            changed[offset] = value
            #expect(throws: DiskError.self) { try VHDFooter(parsing: changed) }
        }
        #expect(throws: DiskError.self) { try VHDFooter(parsing: bytes.dropLast(440)) }
        for offset in [0, 40, 63, 64, 200, 511] {
            var changed = bytes
            changed[offset] ^= 0x10
            #expect(!VHDFooter.hasRightChecksum(changed))
        }
    }

    @Test func dynamicHeaderRoundTrip() throws {
        var header = VHDDynamicHeader(tableOffset: 1536, maxTableEntries: 77, blockSize: 2 << 20)
        header.parentUUID = .random()
        header.parentTimestamp = VHDTimestamp(seconds: 99)
        header.parentName = "Grundbild ä.vhd"
        header.locators = [
            VHDParentLocator(.windowsRelative, path: [1, 2, 3], at: 2048),
            VHDParentLocator(.windowsAbsolute, path: [UInt8](repeating: 1, count: 513), at: 4096),
        ]
        let bytes = header.encode()
        #expect(bytes.count == 1024 && VHDDynamicHeader.hasRightChecksum(bytes))
        var parsed = try VHDDynamicHeader(parsing: bytes)
        #expect(parsed.locators.count == 8 && !parsed.locators[2].isUsed)
        #expect(parsed.locators[1].dataSpace == 1024)
        parsed.locators.removeLast(6)
        #expect(parsed == header)
    }

    @Test(arguments: [0, 0x80, 512, 2048, 3 << 20, 0xffff_ffff] as [UInt64])
    func blockSizesThatCannotBe(_ size: UInt64) throws {
        let bytes = VHDDynamicHeader(tableOffset: 1536, maxTableEntries: 77, blockSize: size).encode()
        #expect { try VHDDynamicHeader(parsing: bytes) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
    }

    // MARK: - Geometry, size, time

    /// What the specification's algorithm makes of sizes, as QEMU computes it too.
    @Test(
        arguments: [
            (1, 0, 4, 17), (20_480, 301, 4, 17), (204_800, 1003, 12, 17), (1 << 20, 1040, 16, 63),
            (41_943_040, 41_610, 16, 63), (65_535 * 16 * 63 - 1, 65_534, 16, 63), (65_535 * 16 * 63, 16_191, 16, 255),
            (65_535 * 16 * 255, 65_535, 16, 255), (1 << 40, 65_535, 16, 255),
        ] as [(UInt64, UInt64, UInt64, UInt64)])
    func geometryOfTheSpecification(_ sectors: UInt64, _ c: UInt64, _ h: UInt64, _ s: UInt64) {
        #expect(DiskGeometry(vhdSectorCount: sectors) == DiskGeometry(cylinders: c, heads: h, sectors: s))
    }

    /// For every size that qemu-img makes of a request, its geometry is ours.
    @Test func geometryIsQEMUs() throws {
        let folder = try TemporaryFolder()
        for (number, size) in ["1M", "7M", "40M", "99999K", "504M", "600M", "2G", "31G", "100G"].enumerated() {
            let path = folder.file("\(number).vhd")
            try qemuImage("create", "-q", "-f", "vpc", path, size)
            let footer = try VHDFooter(parsing: try folder.read("\(number).vhd").prefixArray(512))
            let ours = DiskGeometry(vhdSectorCount: footer.currentSize / 512)
            #expect(ours == footer.geometry, "\(size)")
            #expect(footer.geometry.byteCount == footer.currentSize)
        }
    }

    @Test func newGeometryNeverMisleads() {
        for size in stride(from: UInt64(512), to: 40 << 20, by: 99_840) {
            let geometry = DiskGeometry.newVHD(size: size & ~511)
            #expect(geometry == .vhdMaximum || geometry.byteCount == size & ~511)
        }
        #expect(DiskGeometry.newVHD(size: 301 * 4 * 17 * 512) == DiskGeometry(cylinders: 301, heads: 4, sectors: 17))
    }

    @Test func creatorsDecideWhatTheSizeIs() {
        var footer = Self.sample()
        footer.geometry = DiskGeometry(cylinders: 300, heads: 4, sectors: 17)
        for (creator, rule) in [
            ("vpc ", VHDSizeRule.chs), ("qemu", .chs), ("win ", .current), ("qem2", .current), ("d2v ", .current),
            ("tap\0", .current), ("CTXS", .current), ("vbox", .current), ("wa\0\0", .current), ("vs  ", .current),
            ("vdm ", .current), ("\0\0\0\0", .current),
        ] {
            footer.creatorApplication = Array(creator.utf8)
            #expect(VHDSizeRule(footer) == rule, "\(creator)")
        }
        footer.creatorApplication = Array("vpc ".utf8)
        footer.geometry = .vhdMaximum
        #expect(VHDSizeRule(footer) == .current)
        footer.geometry = DiskGeometry(cylinders: 0, heads: 4, sectors: 17)
        #expect(VHDSizeRule(footer) == .current)
    }

    @Test(
        arguments: [
            (0, "2000-01-01 00:00:00 UTC"), (59 * 86_400 + 86_399, "2000-02-29 23:59:59 UTC"),
            (60 * 86_400, "2000-03-01 00:00:00 UTC"), (366 * 86_400, "2001-01-01 00:00:00 UTC"),
            (848_588_409, "2026-11-21 15:00:09 UTC"), (.max, "2136-02-07 06:28:15 UTC"),
        ] as [(UInt32, String)])
    func timestamps(_ seconds: UInt32, _ text: String) throws {
        #expect(VHDTimestamp(seconds: seconds).description == text)
        let peer = try Subprocess.run(
            ["date", "-u", "-d", "@\(946_684_800 + Int(seconds))", "+%Y-%m-%d %H:%M:%S UTC"])
        #expect(peer.outputText == text + "\n")
    }

    @Test func timestampsOfFiles() {
        #expect(VHDTimestamp(nanosecondsSince1970: 946_684_801_999_999_999).seconds == 1)
        #expect(VHDTimestamp(nanosecondsSince1970: 0).seconds == 0)
        #expect(VHDTimestamp(nanosecondsSince1970: .max).seconds == .max)
    }

    // MARK: - Paths

    private static func littleEndian(_ text: String) -> [UInt8] {
        text.utf16.flatMap { [UInt8(truncatingIfNeeded: $0), UInt8($0 >> 8)] }
    }

    private static func bigEndian(_ text: String) -> [UInt8] {
        text.utf16.flatMap { [UInt8($0 >> 8), UInt8(truncatingIfNeeded: $0)] }
    }

    @Test func pathsInAllSpellings() {
        func path(_ code: String, _ data: [UInt8]) -> String? {
            var locator = VHDParentLocator(.windowsRelative, path: data, at: 0)
            locator.code = Array(code.utf8)
            return locator.path(in: data)
        }
        let text = ".\\Ordner ä\\Basis 基.vhd"
        for code in ["W2ru", "W2ku"] {
            #expect(path(code, Self.littleEndian(text)) == text)
            #expect(path(code, Self.littleEndian(text) + [0, 0, 9, 9]) == text, "what follows a zero is no part")
            #expect(path(code, [0xff, 0xfe] + Self.littleEndian(text)) == text)
            #expect(path(code, Self.bigEndian(text)) == text, "the other byte order")
            #expect(path(code, [0xfe, 0xff] + Self.bigEndian(text)) == text)
            #expect(path(code, Self.littleEndian("a.vhd") + [7]) == "a.vhd", "an odd length")
            #expect(path(code, []) == nil)
            #expect(path(code, [0x00, 0xd8, 0x2e, 0x00]) == "\u{fffd}.", "an unpaired surrogate")
        }
        for code in ["Wi2r", "Wi2k"] {
            #expect(path(code, Array("C:\\a\\b.vhd\0".utf8)) == "C:\\a\\b.vhd")
            #expect(path(code, [0x42, 0xe4, 0x2e]) == "Bä.", "Latin-1")
            #expect(path(code, Array("Bä".utf8)) == "Bä")
            #expect(path(code, Self.littleEndian(text)) == text)
        }
        for (url, wanted) in [
            ("file:///Users/x/a%20b.vhd", "/Users/x/a b.vhd"), ("file://localhost/Users/b.vhd", "/Users/b.vhd"),
            ("FILE:/x/%C3%A4.vhd", "/x/ä.vhd"), ("file:base.vhd", "base.vhd"), ("file:./a%2", "./a%2"),
            ("/plain/a%20b.vhd", "/plain/a%20b.vhd"), ("file:///a%00b", "/a"), ("file://host", nil), ("", nil),
        ] as [(String, String?)] {
            #expect(path("MacX", Array(url.utf8)) == wanted, "\(url)")
        }
        #expect(path("Mac ", [1, 2, 3]) == nil)
        #expect(path("\0\0\0\0", Self.littleEndian(text)) == nil)
    }

    @Test func parentNamesInBothByteOrders() {
        #expect(VHDText.utf16(Self.bigEndian("basis.vhd"), isUsuallyBigEndian: true) == "basis.vhd")
        #expect(VHDText.utf16(Self.littleEndian("basis.vhd"), isUsuallyBigEndian: true) == "basis.vhd")
        #expect(VHDText.utf16(Self.bigEndian("基本"), isUsuallyBigEndian: true) == "基本")
    }

    @Test func pathsAsWindowsWritesThem() {
        #expect(
            VHDParentLocator.windowsPath("a/b.vhd", isRelative: true) == Self.littleEndian(".\\a\\b.vhd"))
        #expect(
            VHDParentLocator.windowsPath("../b.vhd", isRelative: true) == Self.littleEndian("..\\b.vhd"))
        #expect(
            VHDParentLocator.windowsPath("/x/b.vhd", isRelative: false) == Self.littleEndian("\\x\\b.vhd"))
    }

    /// The space of a path is in bytes or in sectors.
    @Test func spaceOfPaths() {
        var locator = VHDParentLocator(.windowsRelative, path: [UInt8](repeating: 1, count: 600), at: 4096)
        #expect(locator.spaceEnd == 4096 + 1024)
        locator.dataSpace = 2
        #expect(locator.spaceEnd == 4096 + 1024)
        locator.dataSpace = 0
        #expect(locator.spaceEnd == 4096 + 600)
        locator.dataOffset = .max - 10
        #expect(locator.spaceEnd == .max)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// A descriptor as VMware Workstation writes it.
private let vmwareText = """
    # Disk DescriptorFile
    version=1
    encoding="UTF-8"
    CID=f879aea6
    parentCID=ffffffff
    isNativeSnapshot="no"
    createType="twoGbMaxExtentSparse"

    # Extent description
    RW 4192256 SPARSE "My disk-s001.vmdk"
    RW 20480 SPARSE "My disk-s002.vmdk"

    # The Disk Data Base
    #DDB

    ddb.adapterType = "ide"
    ddb.deletable = "true"
    ddb.geometry.cylinders = "20"
    ddb.geometry.heads = "16"
    ddb.geometry.sectors = "63"
    ddb.longContentID = "a586da03e45ef91444741b5ef879aea6"
    ddb.uuid = "60 00 C2 95 f2 fc 95 8b-59 71 f0 58 a4 63 3d d9"
    ddb.virtualHWVersion = "18"

    """

private func parse(_ text: String) throws(DiskError) -> VMDKDescriptor { try VMDKDescriptor(parsing: Array(text.utf8)) }

private func text(_ descriptor: VMDKDescriptor) throws -> String {
    String(decoding: try descriptor.encoded(), as: UTF8.self)
}

@Suite struct VMDKDescriptorTests {
    @Test func valuesOfVMwares() throws {
        let it = try parse(vmwareText)
        #expect(it.version == 1)
        #expect(it.contentID == 0xf879_aea6)
        #expect(it.parentContentID == VMDKDescriptor.noContentID)
        #expect(it.createType == .twoGbMaxExtentSparse)
        #expect(!it.isNativeSnapshot)
        #expect(it.parentFileNameHint == nil)
        #expect(!it.hasParent)
        #expect(it.extents.map(\.sectorCount) == [4_192_256, 20_480])
        #expect(it.extents.map(\.fileName) == ["My disk-s001.vmdk", "My disk-s002.vmdk"])
        #expect(it.sectorCount == 4_212_736)
        #expect(it.geometry == DiskGeometry(cylinders: 20, heads: 16, sectors: 63))
        #expect(it.biosGeometry == nil)
        #expect(it.adapterType == "ide")
        #expect(it.uuid == nil)
        #expect(it.diskDatabase("UUID")?.hasPrefix("60 00 C2") == true)
        #expect(try text(it) == vmwareText)
    }

    @Test func changesStayInTheirPlace() throws {
        var it = try parse(vmwareText)
        it.contentID = 0x12
        it.setDiskDatabase("geometry.CYLINDERS", "21")
        it.extents[1].fileName = "new name.vmdk"
        var expected = vmwareText
        for (old, new) in [
            ("CID=f879aea6", "CID=00000012"), ("cylinders = \"20\"", "cylinders = \"21\""),
            ("My disk-s002.vmdk", "new name.vmdk"),
        ] {
            let range = try #require(expected.firstRange(of: old))
            expected.replaceSubrange(range, with: new)
        }
        #expect(try text(it) == expected)
        it.setDiskDatabase("comment", nil)
        #expect(try text(it) == expected)
        it.setDiskDatabase("deletable", nil)
        #expect(try !text(it).contains("deletable"))
    }

    @Test func additionsGoToTheirSection() throws {
        var it = try parse(vmwareText)
        it.parentFileNameHint = "base.vmdk"
        it.comment = "two\nlines \\ and \"quotes\""
        it.extents.append(VMDKExtentDescription(sectorCount: 7, type: .zero))
        let lines = try text(it).split(separator: "\n", omittingEmptySubsequences: false)
        #expect(lines[7] == "parentFileNameHint=\"base.vmdk\"")
        #expect(lines.contains("RW 7 ZERO"))
        #expect(lines[lines.count - 2] == "ddb.comment = \"two\\nlines \\\\ and \"quotes\"\"")
        let again = try parse(try text(it))
        #expect(again.comment == "two\nlines \\ and \"quotes\"")
        #expect(again.extents == it.extents)
        #expect(again.parentFileNameHint == "base.vmdk")
    }

    @Test func removedExtents() throws {
        var it = try parse(vmwareText)
        it.extents.removeLast()
        #expect(try parse(try text(it)).extents.count == 1)
        it.extents = []
        #expect(try parse(try text(it)).extents.isEmpty)
    }

    @Test func unusualSpelling() throws {
        let source =
            "\u{feff}\r\n# disk descriptorfile\r\nVersion = 2\r\n  cid=52DB3B7  \r\nPARENTCID = 0xAbcdef01\r\n"
            + "createType = 2GbMaxExtentFlat\r\nrw  100 flat \"a\"b c.vmdk\"  12 partitionUUID \"x y\"\r\n"
            + "noaccess 5 ZERO\r\nRDONLY 8 VMFS \"x.vmdk\"\r\nsome rubbish\r\nunknown=1=2\r\n; what\r\n"
            + "parentFileNameHint=\"C:\\Bases\\a \"b\".vmdk\"\r\nddb.x=\r\nCID=1\r\n#DDB"
        var it = try parse(source)
        #expect(it.version == 2)
        #expect(it.contentID == 0x52d_b3b7, "the first of two counts")
        #expect(it.parentContentID == 0xabcd_ef01)
        #expect(it.createType == .twoGbMaxExtentFlat)
        #expect(it.parentFileNameHint == "C:\\Bases\\a \"b\".vmdk")
        #expect(it.diskDatabase("x") == "")
        #expect(it.value("unknown") == "1=2")
        try #require(it.extents.count == 3)
        #expect(it.extents[0].fileName == "a\"b c.vmdk")
        #expect(it.extents[0].fileOffsetSector == 12)
        #expect(it.extents[0].rest == "partitionUUID \"x y\"")
        #expect(it.extents[1].access == .noAccess)
        #expect(it.extents[2].type == .vmfs)
        #expect(try text(it) == source, "also what stands before the text")
        it.contentID = 2
        it.setDiskDatabase("new", "v")
        let changed = try text(it)
        #expect(changed.utf8.count(where: { $0 == 13 }) == changed.utf8.count(where: { $0 == 10 }))
        #expect(changed.contains("  cid=00000002  \r\n"))
        #expect(changed.contains("ddb.x=\r\nddb.new = \"v\"\r\n"))
    }

    @Test func paddingEndsTheText() throws {
        let it = try VMDKDescriptor(parsing: Array(vmwareText.utf8) + [0, 0] + Array("RW 1 FLAT nonsense\n".utf8))
        #expect(it.extents.count == 2)
        #expect(try text(it) == vmwareText)
    }

    @Test func identity() throws {
        var it = try parse(vmwareText)
        #expect(it.effectiveContentID == "f879aea6")
        it.contentID = VMDKDescriptor.longContentIDMark
        #expect(it.effectiveContentID == "a586da03e45ef91444741b5ef879aea6")
        it.renewContentIdentity()
        #expect(it.contentID < VMDKDescriptor.longContentIDMark && it.contentID != 0xf879_aea6)
        #expect(it.diskDatabase("longContentID")?.hasSuffix(VMDKDescriptor.hexadecimal(it.contentID)) == true)
        #expect(it.diskDatabase("longContentID")?.count == 32)
        #expect(it.modificationUUID == nil, "only where VirtualBox's UUIDs are in use")
        it.uuid = .random()
        it.renewContentIdentity()
        #expect(it.modificationUUID != nil)
    }

    @Test func parents() throws {
        var it = try parse(vmwareText)
        it.parentUUID = nil
        #expect(!it.hasParent, "a UUID of zeros is none")
        it.parentUUID = DiskUUID("11111111-2222-3333-4444-555555555555")
        #expect(it.hasParent, "VirtualBox links by UUID alone")
        it.parentUUID = nil
        it.parentContentID = 0
        #expect(it.hasParent)
    }

    @Test func names() throws {
        let names: [(String, VMDKCreateType)] = [
            ("VMFS", .vmfs), ("vmfsRawDeviceMap", .vmfsRDM), ("vmfsPassthroughRawDeviceMap", .vmfsRDMP),
            ("2gbMaxExtentSparse", .twoGbMaxExtentSparse), ("seSparse", .seSparse), ("custom", .custom),
        ]
        for (name, type) in names { #expect(VMDKCreateType(name: name) == type) }
        #expect(VMDKCreateType(name: "other") == nil)
    }

    @Test func looksLikeDescriptor() {
        let yes = [
            vmwareText, "\u{feff}# Disk DescriptorFile\n", "\n\r\n  # Disk Descriptor File\r\n", "#Disk DescriptorFile",
            "# a comment\n\nversion=1\nCID=1\nparentCID=ffffffff\n", "version = 3\ncreateType=\"custom\"",
        ]
        for text in yes { #expect(VMDKDescriptor.looksLikeDescriptor(Array(text.utf8)), "\(text)") }
        let no = [
            "", "\n", "version=1\nname=x\n", "version=5\ncreateType=\"x\"", "hello\n# Disk DescriptorFile", "# only",
        ]
        for text in no { #expect(!VMDKDescriptor.looksLikeDescriptor(Array(text.utf8)), "\(text)") }
        #expect(!VMDKDescriptor.looksLikeDescriptor([0] + Array(vmwareText.utf8)))
    }
}

@Suite struct VMDKDescriptorErrorTests {
    private let title = "# Disk DescriptorFile\n"

    @Test(arguments: [
        "RW x FLAT \"a\" 0", "RW 1", "RW 1 FLAT", "RW 1 FLAT a 0", "RW 1 FLAT \"a 0", "RW -1 FLAT \"a\" 0",
        "RW 1 FLAT \"a\" x", "RW 1 FLAT \"a\" -1", "RW 18446744073709551615 ZERO", "RW 18014398509481985 ZERO",
        "RW 1 FLAT \"a\" 18446744073709551616", "RW 1 FLUT \"a\" 0", "RW 1 SPARSE \"\"", "RW 1 SPARSE",
        "RW 18014398509481984 ZERO\nRW 1 ZERO", "version=5", "version=x", "version=", "version=0",
        "encoding=\"klingon\"\nparentFileNameHint=\"é\"",
    ])
    func refused(_ lines: String) {
        #expect(throws: DiskError.self) { try parse(title + lines + "\n") }
    }

    @Test func tooMuch() {
        #expect(throws: DiskError.self) { try parse(title + String(repeating: "#\n", count: VMDKDescriptor.lineLimit)) }
        #expect(throws: DiskError.self) { try parse(title + String(repeating: "x", count: VMDKDescriptor.textLimit)) }
        #expect(throws: DiskError.self) {
            try parse(title + String(repeating: "RW 1 ZERO\n", count: VMDKDescriptor.extentLimit + 1))
        }
        #expect(throws: Never.self) {
            try parse(title + String(repeating: "RW 1 ZERO\n", count: VMDKDescriptor.extentLimit))
        }
    }

    @Test func whatCannotBeWritten() throws {
        var it = try parse(vmwareText)
        it.parentFileNameHint = "a\nparentCID=0"
        #expect(throws: DiskError.self) { try it.encoded() }
        it.parentFileNameHint = "a"
        it.extents[0].fileName = "a\" 0\nRW 1 FLAT \"/etc/shadow"
        #expect(throws: DiskError.self) { try it.encoded() }
        it.extents[0].fileName = "quote\".vmdk"
        #expect(throws: DiskError.self) { try it.encoded() }
        it.extents[0].fileName = "nul\0.vmdk"
        #expect(throws: DiskError.self) { try it.encoded() }
        it.extents[0].fileName = "fine.vmdk"
        #expect(throws: Never.self) { try it.encoded() }
        it.setDiskDatabase("x", String(repeating: "y", count: VMDKDescriptor.textLimit))
        #expect(throws: DiskError.self) { try it.encoded() }
    }

    @Test func encodings() throws {
        let bytes =
            Array(title.utf8) + Array("encoding=\"windows-1251\"\nRW 1 SPARSE \"".utf8) + [0xe4, 0xe8, 0xf1, 0xea]
            + Array(".vmdk\"\nddb.comment = \"".utf8) + [0xe4] + Array("\"\n".utf8)
        var it = try VMDKDescriptor(parsing: bytes)
        #expect(it.extents.first?.fileName == "диск.vmdk")
        #expect(it.comment == "д")
        #expect(try it.encoded() == bytes)
        it.extents[0].fileName = "диски.vmdk"
        #expect(try it.encoded().count == bytes.count + 1)
        #expect(try VMDKDescriptor(parsing: try it.encoded()).extents.first?.fileName == "диски.vmdk")
        it.extents[0].fileName = "磁盘.vmdk"
        #expect(throws: DiskError.self) { try it.encoded() }
    }

    @Test func encodingsThatAreNotWhatTheySay() throws {
        for name in ["", "encoding=\"UTF-8\"\n", "ddb.encoding = \"UTF-8\"\n"] {
            let bytes = Array((title + name + "RW 1 SPARSE \"").utf8) + [0xfc] + Array(".vmdk\"\n".utf8)
            let it = try VMDKDescriptor(parsing: bytes)
            #expect(it.extents.first?.fileName == "ü.vmdk", "windows-1252 where it is not UTF-8")
            #expect(try it.encoded() == bytes)
        }
        let it = try parse(title + "encoding=\"GBK\"\nRW 1 SPARSE \"é.vmdk\"\n")
        #expect(it.extents.first?.fileName != nil)
        #expect(try parse(title + "encoding=\"klingon\"\nRW 1 ZERO\n").extents.count == 1, "it is ASCII all the same")
    }

    /// Bytes are dropped, doubled and changed at random: an error or a descriptor that survives a rewrite, no trap.
    @Test func damagedTexts() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededGenerator(seed: seed)
        for _ in 0..<1000 {
            var bytes = Array(vmwareText.utf8)
            for _ in 0..<Int.random(in: 1...6, using: &random) {
                let place = Int.random(in: 0..<bytes.count, using: &random)
                switch Int.random(in: 0..<4, using: &random) {
                case 0: bytes[place] = UInt8.random(in: 0...255, using: &random)
                case 1: bytes.remove(at: place)
                case 2:
                    bytes.insert(try #require(Array("\n\r\"= 09\u{e9}".utf8).randomElement(using: &random)), at: place)
                default: bytes.removeSubrange(place..<min(bytes.count, place + 9))
                }
            }
            guard let it = try? VMDKDescriptor(parsing: bytes) else { continue }
            let again = try VMDKDescriptor(parsing: try it.encoded())
            #expect(again.extents == it.extents, "seed \(seed)")
            #expect(again.contentID == it.contentID, "seed \(seed)")
            var changed = it
            changed.renewContentIdentity()
            #expect(try VMDKDescriptor(parsing: try changed.encoded()).contentID == changed.contentID, "seed \(seed)")
        }
    }
}

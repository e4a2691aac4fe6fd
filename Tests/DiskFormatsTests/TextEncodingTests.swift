import DiskStorage
import Testing

@testable import DiskFormats

@Suite struct TextEncodingTests {
    @Test func knownNames() throws {
        let names = [
            "UTF-8", "utf8", "windows-1250", "windows-1251", "WINDOWS-1252", "windows-1258", "Shift_JIS", "GBK",
            "gb2312",
            "Big5", "EUC-KR", "EUC-JP", "GB18030", "ISO-8859-1", "iso-8859-15", "KOI8-R", "cp866", "windows-874",
        ]
        let printable = Array(UInt8(32)..<127)
        for name in names {
            let encoding = try #require(TextEncoding(name: name), "\(name)")
            // No ASCII character may change: paths hold backslashes, and entries quotes.
            #expect(try encoding.decode(printable) == String(decoding: printable, as: UTF8.self), "\(name)")
            let mixed = try #require(try encoding.decode(printable), "\(name)")
            #expect(try encoding.encode(mixed) == printable, "\(name)")
        }
    }

    @Test func unknownNames() {
        for name in ["", "UTF-16", "utf-7", "windows-1259", "CP1252//TRANSLIT", "../x", "ISO-2022-JP", "iso-8859-12"] {
            #expect(TextEncoding(name: name) == nil, "\(name)")
        }
    }

    @Test(
        arguments: [
            (
                "windows-1252", "Größe € naïve",
                [0x47, 0x72, 0xf6, 0xdf, 0x65, 0x20, 0x80, 0x20, 0x6e, 0x61, 0xef, 0x76, 0x65]
            ),
            ("windows-1251", "диск", [0xe4, 0xe8, 0xf1, 0xea]),
            ("windows-1250", "łódź", [0xb3, 0xf3, 0x64, 0x9f]),
            ("Shift_JIS", "表\\ディスク", [0x95, 0x5c, 0x5c, 0x83, 0x66, 0x83, 0x42, 0x83, 0x58, 0x83, 0x4e]),
            ("GBK", "磁盘", [0xb4, 0xc5, 0xc5, 0xcc]),
            ("Big5", "磁碟", [0xba, 0xcf, 0xba, 0xd0]),
            ("EUC-KR", "디스크", [0xb5, 0xf0, 0xbd, 0xba, 0xc5, 0xa9]),
            ("UTF-8", "é", [0xc3, 0xa9]),
        ] as [(String, String, [UInt8])])
    func bothWays(_ name: String, _ text: String, _ bytes: [UInt8]) throws {
        let encoding = try #require(TextEncoding(name: name))
        #expect(try encoding.encode(text) == bytes)
        #expect(try encoding.decode(bytes) == text)
    }

    @Test func charactersThatDoNotExist() throws {
        #expect(try TextEncoding.windows1252.encode("диск") == nil)
        #expect(try TextEncoding.windows1252.decode([0x81]) == nil)
        #expect(try TextEncoding.ascii.encode("é") == nil)
        #expect(try TextEncoding.utf8.decode([0xc3]) == nil)
        #expect(try TextEncoding.utf8.decode([0xed, 0xa0, 0x80]) == nil)
        #expect(try TextEncoding(name: "Shift_JIS")?.decode([0x83]) == nil, "half a character")
    }
}

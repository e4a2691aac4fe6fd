internal import DiskStorage

/// The character encoding of a text, by the name that a VMDK descriptor gives it (`encoding="windows-1252"`).
///
/// Only encodings in which the ASCII characters are themselves are known: a descriptor's keys, quotes and line ends are
/// found before its encoding is. UTF-8 and ASCII are done here; for the others the C library's `iconv` is asked.
struct TextEncoding: Sendable, Equatable {
    static let utf8 = TextEncoding(name: "UTF-8", converter: .utf8)
    static let ascii = TextEncoding(name: "US-ASCII", converter: .ascii)
    static let windows1252 = TextEncoding(name: "windows-1252", converter: .iconv("CP1252"))

    /// The name as it was given.
    let name: String
    private let converter: Converter

    private enum Converter: Sendable, Equatable {
        case utf8
        case ascii
        /// The name that the C library knows it by.
        case iconv(String)
    }

    private init(name: String, converter: Converter) {
        self.name = name
        self.converter = converter
    }

    /// The encoding of that name, in any case and with `-`, `_` or nothing between its parts; nil if it is not known.
    init?(name: String) {
        var key = ""
        for byte in name.utf8 {
            switch byte {
            case UInt8(ascii: "A")...UInt8(ascii: "Z"): key.unicodeScalars.append(Unicode.Scalar(byte | 0x20))
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "0")...UInt8(ascii: "9"):
                key.unicodeScalars.append(Unicode.Scalar(byte))
            case UInt8(ascii: "-"), UInt8(ascii: "_"), UInt8(ascii: " "): continue
            default: return nil
            }
        }
        if ["utf8", "cp65001"].contains(key) {
            self.init(name: name, converter: .utf8)
        } else if ["ascii", "usascii"].contains(key) {
            self.init(name: name, converter: .ascii)
        } else if let library = Self.libraryName(key) {
            self.init(name: name, converter: .iconv(library))
        } else {
            return nil
        }
    }

    /// The C library's name for an encoding; `key` is in lower case and without separators.
    ///
    /// The Chinese, Japanese and Korean ones are Microsoft's code pages under these names: that is what VMware's
    /// programs on Windows write, and in them the ASCII characters are themselves (in Shift_JIS proper `\` is a yen
    /// sign).
    private static func libraryName(_ key: String) -> String? {
        switch key {
        case "shiftjis", "sjis", "mskanji", "windows31j", "cp932", "windows932", "ms932": return "CP932"
        case "gbk", "gb2312", "euccn", "cp936", "windows936", "ms936": return "CP936"
        case "gb18030", "cp54936": return "GB18030"
        case "euckr", "ksc56011987", "uhc", "cp949", "windows949", "ms949": return "CP949"
        case "big5", "cp950", "windows950", "ms950": return "CP950"
        case "eucjp", "cp51932": return "EUC-JP"
        case "koi8r": return "KOI8-R"
        case "koi8u": return "KOI8-U"
        case "cp866", "ibm866": return "CP866"
        case "cp874", "windows874", "tis620": return "CP874"
        case "latin1", "iso88591": return "ISO-8859-1"
        default: break
        }
        for prefix in ["windows125", "cp125"] where key.hasPrefix(prefix) {
            let page = key.dropFirst(prefix.count)
            return ["0", "1", "2", "3", "4", "5", "6", "7", "8"].contains(page) ? "CP125" + page : nil
        }
        guard key.hasPrefix("iso8859"), let part = Int(key.dropFirst(7)), (2...16).contains(part), part != 12 else {
            return nil
        }
        return "ISO-8859-\(part)"
    }

    /// The text that these bytes are, or nil if they are none in this encoding.
    func decode(_ bytes: [UInt8]) throws(DiskError) -> String? {
        if bytes.allSatisfy({ $0 < 0x80 }) { return String(decoding: bytes, as: UTF8.self) }
        switch converter {
        case .ascii: return nil
        case .utf8: return String(validating: bytes, as: UTF8.self)
        case .iconv(let library):
            guard let text = try Iconv.convert(bytes, from: library, to: "UTF-8") else { return nil }
            return String(validating: text, as: UTF8.self)
        }
    }

    /// The bytes of a text, or nil if one of its characters does not exist in this encoding.
    func encode(_ text: String) throws(DiskError) -> [UInt8]? {
        let bytes = Array(text.utf8)
        if bytes.allSatisfy({ $0 < 0x80 }) { return bytes }
        switch converter {
        case .ascii: return nil
        case .utf8: return bytes
        case .iconv(let library): return try Iconv.convert(bytes, from: "UTF-8", to: library)
        }
    }
}

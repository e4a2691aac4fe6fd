internal import DiskStorage

/// An entry of the dynamic header that says where in the file a path of the parent stands, and in which form.
///
/// Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 (2006), "Dynamic Disk Header Format".
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | platform code |
/// | 4 | 4 | platform data space: bytes (Microsoft's programs) or sectors (the specification) kept for the path |
/// | 8 | 4 | platform data length: bytes of the path |
/// | 12 | 4 | reserved |
/// | 16 | 8 | platform data offset: of the path, in bytes |
struct VHDParentLocator: Sendable, Equatable {
    static let byteCount = 24
    /// Bytes of a path at most that are believed.
    static let lengthLimit: UInt32 = 64 << 10

    /// In which form a path is given.
    enum Platform: String, Sendable, CaseIterable {
        /// From the child's folder, UTF-16 little endian.
        case windowsRelative = "W2ru"
        /// Whole, UTF-16 little endian.
        case windowsAbsolute = "W2ku"
        /// A URL (RFC 2396), UTF-8.
        case macURL = "MacX"
        /// From the child's folder, in some 8-bit code page; deprecated.
        case deprecatedRelative = "Wi2r"
        /// Whole, in some 8-bit code page; deprecated.
        case deprecatedAbsolute = "Wi2k"

        /// The order in which paths are tried: the ones that survive a move of the folder first.
        static let order: [Platform] = [
            .windowsRelative, .deprecatedRelative, .macURL, .windowsAbsolute, .deprecatedAbsolute,
        ]
    }

    var code: [UInt8]
    var dataSpace: UInt32
    var dataLength: UInt32
    var dataOffset: UInt64

    /// Nil: no path, or one that is of no use here (`Mac `, an alias record).
    var platform: Platform? { Platform(rawValue: String(decoding: code, as: UTF8.self)) }
    /// Whether the entry is used at all.
    var isUsed: Bool { code != [0, 0, 0, 0] }

    /// The bytes of the file that it takes; the length may be too short for what is kept, and the space in sectors.
    var spaceEnd: UInt64 {
        let space = dataSpace < 512 ? UInt64(dataSpace) * 512 : UInt64(dataSpace)
        return dataOffset.addingReportingOverflow(max(space, UInt64(dataLength))).overflow
            ? .max : dataOffset + max(space, UInt64(dataLength))
    }

    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        code = try fields.bytes(at: 0, count: 4)
        dataSpace = try fields.bigEndian(at: 4)
        dataLength = try fields.bigEndian(at: 8)
        dataOffset = try fields.bigEndian(at: 16)
    }

    init(_ platform: Platform, path: [UInt8], at offset: UInt64) {
        code = Array(platform.rawValue.utf8)
        dataLength = UInt32(path.count)
        dataSpace = (dataLength + 511) / 512 * 512
        dataOffset = offset
    }

    /// The 24 bytes.
    func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes(code, at: 0)
        fields.bigEndian(dataSpace, at: 4)
        fields.bigEndian(dataLength, at: 8)
        fields.bigEndian(dataOffset, at: 16)
        return fields.bytes
    }

    /// The path in `data`, the bytes that the entry leads to; nil if there is none.
    func path(in data: [UInt8]) -> String? {
        let text: String
        switch platform {
        case nil: return nil
        case .windowsRelative, .windowsAbsolute: text = VHDText.utf16(data, isUsuallyBigEndian: false)
        case .macURL: text = VHDText.path(ofURL: data)
        case .deprecatedRelative, .deprecatedAbsolute: text = VHDText.anyOf8Bits(data)
        }
        return text.isEmpty ? nil : text
    }

    /// A path as a locator of Windows keeps it: `\` between its parts, a relative one from `.\` on.
    static func windowsPath(_ path: String, isRelative: Bool) -> [UInt8] {
        var text = String(path.map { $0 == "/" ? "\\" : $0 })
        if isRelative, !text.hasPrefix("..\\") { text = ".\\" + text }
        return text.utf16.flatMap { [UInt8(truncatingIfNeeded: $0), UInt8(truncatingIfNeeded: $0 >> 8)] }
    }
}

/// Text as VHDs hold it.
enum VHDText {
    /// UTF-16 up to the first zero. Some writers have the other byte order: text with ASCII in it tells.
    static func utf16(_ bytes: [UInt8], isUsuallyBigEndian: Bool) -> String {
        var isBigEndian = isUsuallyBigEndian
        var (high, low) = (0, 0)
        var units = stride(from: 0, to: bytes.count / 2 * 2, by: 2).map { (bytes[$0], bytes[$0 + 1]) }
        if let end = units.firstIndex(where: { $0 == (0, 0) }) { units.removeLast(units.count - end) }
        for unit in units {
            if unit.0 == 0 { high += 1 }
            if unit.1 == 0 { low += 1 }
        }
        if high != low { isBigEndian = high > low }
        if let first = units.first, first == (0xfe, 0xff) || first == (0xff, 0xfe) {
            isBigEndian = first.0 == 0xfe
            units.removeFirst()
        }
        return String(
            decoding: units.map { isBigEndian ? UInt16($0.0) << 8 | UInt16($0.1) : UInt16($0.1) << 8 | UInt16($0.0) },
            as: UTF16.self)
    }

    /// A path of 8-bit characters up to the first zero: UTF-8, else Latin-1; UTF-16 after all where every second byte
    /// is zero.
    static func anyOf8Bits(_ bytes: [UInt8]) -> String {
        if bytes.count > 3, bytes[1] == 0, bytes[3] == 0 { return utf16(bytes, isUsuallyBigEndian: false) }
        let text = Array(bytes.prefix { $0 != 0 })
        if let known = String(validating: text, as: UTF8.self) { return known }
        var result = ""
        for byte in text { result.unicodeScalars.append(Unicode.Scalar(byte)) }
        return result
    }

    /// The path of a `file:` URL: without scheme and host, `%xx` decoded. What is no URL is taken for a path.
    static func path(ofURL bytes: [UInt8]) -> String {
        let text = Array(bytes.prefix { $0 != 0 })
        let scheme = Array("file:".utf8)
        guard text.count > scheme.count,
            zip(text, scheme).allSatisfy({ $0 == $1 || $0 | 0x20 == $1 })
        else { return anyOf8Bits(text) }
        var rest = text[scheme.count...]
        if rest.starts(with: "//".utf8) { rest = rest.dropFirst(2).drop { $0 != UInt8(ascii: "/") } }
        var path: [UInt8] = []
        while let byte = rest.popFirst() {
            if byte == UInt8(ascii: "%"), rest.count >= 2,
                let high = hexadecimalValue(rest[rest.startIndex]),
                let low = hexadecimalValue(rest[rest.startIndex + 1])
            {
                path.append(high << 4 | low)
                rest.removeFirst(2)
            } else {
                path.append(byte)
            }
        }
        return String(decoding: path.prefix { $0 != 0 }, as: UTF8.self)
    }
}

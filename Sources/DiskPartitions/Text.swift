/// Text that a disk holds. Whoever made the disk chose it, and it ends up in messages and listings: control characters
/// become U+FFFD, and so does what is no valid text.
enum DiskText {
    /// UTF-8 up to the first zero byte.
    static func utf8(_ bytes: some Sequence<UInt8>) -> String? {
        nonempty(String(decoding: Array(bytes.prefix { $0 != 0 }), as: UTF8.self))
    }

    /// UTF-16, least significant byte first, up to the first zero unit.
    static func utf16(_ bytes: some Collection<UInt8>) -> String? {
        var units: [UInt16] = []
        var low: UInt8?
        for byte in bytes {
            guard let first = low else {
                low = byte
                continue
            }
            let unit = UInt16(first) | UInt16(byte) << 8
            if unit == 0 { break }
            units.append(unit)
            low = nil
        }
        return nonempty(String(decoding: units, as: UTF16.self))
    }

    /// A field of FAT or ISO 9660, filled up with blanks. Beyond ASCII its meaning depends on a code page that the
    /// disk does not name.
    static func padded(_ bytes: some Sequence<UInt8>) -> String? {
        var text = Array(bytes.prefix { $0 != 0 })
        while text.last == UInt8(ascii: " ") { text.removeLast() }
        return nonempty(String(decoding: text, as: UTF8.self))
    }

    private static func nonempty(_ text: String) -> String? {
        guard !text.isEmpty else { return nil }
        var clean = String.UnicodeScalarView()
        for scalar in text.unicodeScalars {
            let isControl = scalar.value < 0x20 || (0x7f...0x9f).contains(scalar.value)
            clean.append(isControl ? "\u{fffd}" : scalar)
        }
        return String(clean)
    }

    /// `value` in hexadecimal, with zeros in front up to `digits`.
    static func hexadecimal(_ value: some FixedWidthInteger, digits: Int, uppercase: Bool = false) -> String {
        let text = String(value, radix: 16, uppercase: uppercase)
        return String(repeating: "0", count: max(0, digits - text.utf8.count)) + text
    }
}

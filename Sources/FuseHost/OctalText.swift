/// The way the kernel writes paths into /proc/self/mountinfo: what would break a line is a backslash and three octal
/// digits.
public enum OctalText {
    public static func decode(_ text: some Sequence<UInt8>) -> String {
        let bytes = Array(text)
        var decoded: [UInt8] = []
        decoded.reserveCapacity(bytes.count)
        var at = 0
        while at < bytes.count {
            if bytes[at] == UInt8(ascii: "\\"), at + 3 < bytes.count, let value = octal(bytes[(at + 1)...(at + 3)]) {
                decoded.append(value)
                at += 4
            } else {
                decoded.append(bytes[at])
                at += 1
            }
        }
        return String(decoding: decoded, as: UTF8.self)
    }

    public static func encode(_ text: String) -> String {
        var encoded = ""
        for scalar in text.unicodeScalars {
            if scalar == "\\" || scalar == " " || scalar.value < 32 || scalar.value == 127 {
                let digits = String(scalar.value, radix: 8)
                encoded += "\\" + String(repeating: "0", count: 3 - digits.count) + digits
            } else {
                encoded.unicodeScalars.append(scalar)
            }
        }
        return encoded
    }

    private static func octal(_ digits: ArraySlice<UInt8>) -> UInt8? {
        var value = 0
        for digit in digits {
            guard (0x30...0x37).contains(digit) else { return nil }
            value = value * 8 + Int(digit - 0x30)
        }
        return UInt8(exactly: value)
    }
}

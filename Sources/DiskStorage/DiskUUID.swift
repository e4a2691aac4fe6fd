internal import CLinux

/// A UUID (RFC 9562), kept in the order in which it is printed.
public struct DiskUUID: Hashable, Sendable {
    /// The 16 bytes, in the order in which they are printed (most significant first).
    public let bytes: [UInt8]

    /// All zeros: "none" in most formats.
    public static let null = DiskUUID(bytes: [UInt8](repeating: 0, count: 16))

    private init(bytes: [UInt8]) { self.bytes = bytes }

    /// Whether all bytes are zero.
    public var isNull: Bool { bytes.allSatisfy { $0 == 0 } }

    /// A fresh random UUID, version 4.
    public static func random() -> DiskUUID {
        var bytes: [UInt8] = []
        for word in [clinux_random(), clinux_random()] {
            for shift in stride(from: 0, to: 64, by: 8) {
                bytes.append(UInt8(truncatingIfNeeded: word >> UInt64(shift)))
            }
        }
        bytes[6] = bytes[6] & 0x0f | 0x40
        bytes[8] = bytes[8] & 0x3f | 0x80
        return DiskUUID(bytes: bytes)
    }

    /// The 16 bytes in printed (network) order.
    public init(bigEndian bytes: [UInt8]) throws(DiskError) {
        guard bytes.count == 16 else { throw DiskError(.invalidImage, "a UUID has \(bytes.count) bytes instead of 16") }
        self.bytes = bytes
    }

    /// The 16 bytes as Windows stores a GUID: the first three fields least significant byte first.
    public init(mixedEndian bytes: [UInt8]) throws(DiskError) {
        try self.init(bigEndian: bytes)
        self = DiskUUID(bytes: Self.swapFields(bytes))
    }

    /// As Windows stores a GUID: the first three fields least significant byte first.
    public var mixedEndian: [UInt8] { Self.swapFields(bytes) }

    private static func swapFields(_ b: [UInt8]) -> [UInt8] {
        [b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]] + b[8...]
    }
}

extension DiskUUID: LosslessStringConvertible {
    /// Parses 32 hexadecimal digits, with or without hyphens and braces, upper or lower case.
    public init?(_ text: String) {
        var digits = text.utf8.filter { $0 != UInt8(ascii: "-") }[...]
        if digits.first == UInt8(ascii: "{"), digits.last == UInt8(ascii: "}") {
            digits = digits.dropFirst().dropLast()
        }
        guard digits.count == 32 else { return nil }
        var bytes: [UInt8] = []
        var high: UInt8?
        for digit in digits {
            guard let value = hexadecimalValue(digit) else { return nil }
            if let first = high {
                bytes.append(first << 4 | value)
                high = nil
            } else {
                high = value
            }
        }
        self.bytes = bytes
    }

    /// `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, lower case.
    public var description: String {
        var text = ""
        for (index, byte) in bytes.enumerated() {
            if [4, 6, 8, 10].contains(index) { text += "-" }
            text += (byte < 16 ? "0" : "") + String(byte, radix: 16)
        }
        return text
    }
}

/// The value of an ASCII hexadecimal digit.
public func hexadecimalValue(_ digit: UInt8) -> UInt8? {
    switch digit {
    case UInt8(ascii: "0")...UInt8(ascii: "9"): digit - UInt8(ascii: "0")
    case UInt8(ascii: "a")...UInt8(ascii: "f"): digit - UInt8(ascii: "a") + 10
    case UInt8(ascii: "A")...UInt8(ascii: "F"): digit - UInt8(ascii: "A") + 10
    default: nil
    }
}

/// Reads integers at named offsets of an on-disk structure; a field outside the bytes at hand is an error, not a trap.
///
/// Every structure's `init(parsing:)` takes one of these. The byte order stands in the call.
public struct FieldReader: Sendable {
    /// The structure's bytes.
    public let bytes: [UInt8]

    public init(_ bytes: [UInt8]) { self.bytes = bytes }

    /// The number of bytes at hand.
    public var count: Int { bytes.count }

    /// An integer of the type asked for, least significant byte first.
    public func littleEndian<T: FixedWidthInteger>(at offset: Int, as type: T.Type = T.self) throws(DiskError) -> T {
        try checkRange(offset, T.bitWidth / 8)
        var value: T = 0
        for index in 0..<(T.bitWidth / 8) {
            value |= T(truncatingIfNeeded: bytes[offset + index]) &<< T(truncatingIfNeeded: index * 8)
        }
        return value
    }

    /// An integer of the type asked for, most significant byte first.
    public func bigEndian<T: FixedWidthInteger>(at offset: Int, as type: T.Type = T.self) throws(DiskError) -> T {
        T(bigEndian: T(littleEndian: try littleEndian(at: offset, as: type)))
    }

    /// A single byte.
    public func byte(at offset: Int) throws(DiskError) -> UInt8 {
        try checkRange(offset, 1)
        return bytes[offset]
    }

    /// `count` bytes.
    public func bytes(at offset: Int, count: Int) throws(DiskError) -> [UInt8] {
        try checkRange(offset, count)
        return Array(bytes[offset..<offset + count])
    }

    /// Whether the bytes at `offset` are those of `text`.
    public func matches(_ text: StaticString, at offset: Int) -> Bool {
        let count = text.utf8CodeUnitCount
        guard offset >= 0, count <= bytes.count, offset <= bytes.count - count else { return false }
        return text.withUTF8Buffer { wanted in
            unsafe bytes[offset..<offset + count].elementsEqual(wanted)
        }
    }

    private func checkRange(_ offset: Int, _ count: Int) throws(DiskError) {
        guard offset >= 0, count >= 0, count <= bytes.count, offset <= bytes.count - count else {
            throw DiskError(
                .invalidImage, "a structure ends after \(bytes.count) bytes, its field at \(offset) needs \(count)")
        }
    }
}

/// Writes integers at named offsets of an on-disk structure that starts out as zeros.
///
/// Offsets and sizes here are ours, never a file's: one outside the structure is a bug and traps.
public struct FieldWriter: Sendable {
    /// The structure so far.
    public private(set) var bytes: [UInt8]

    /// `count` zero bytes.
    public init(count: Int) { bytes = [UInt8](repeating: 0, count: count) }

    /// A structure to change in place.
    public init(_ bytes: [UInt8]) { self.bytes = bytes }

    /// Stores an integer, least significant byte first.
    public mutating func littleEndian<T: FixedWidthInteger>(_ value: T, at offset: Int) {
        for index in 0..<(T.bitWidth / 8) {
            bytes[offset + index] = UInt8(truncatingIfNeeded: value &>> T(truncatingIfNeeded: index * 8))
        }
    }

    /// Stores an integer, most significant byte first.
    public mutating func bigEndian<T: FixedWidthInteger>(_ value: T, at offset: Int) {
        littleEndian(value.byteSwapped, at: offset)
    }

    /// Stores a byte.
    public mutating func byte(_ value: UInt8, at offset: Int) { bytes[offset] = value }

    /// Stores bytes.
    public mutating func bytes(_ values: some Collection<UInt8>, at offset: Int) {
        bytes.replaceSubrange(offset..<offset + values.count, with: values)
    }
}

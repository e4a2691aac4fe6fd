internal import DiskStorage

/// How a differencing image names its parent: a list of keys and values. [MS-VHDX] 2.6.2.6.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 16 | LocatorType: `b04aefb7-d19e-4a81-b789-25b8e9445913` |
/// | 18 | 2 | KeyValueCount |
/// | 20 | 12 each | KeyOffset 4, ValueOffset 4, KeyLength 2, ValueLength 2, in bytes; from the locator's begin on |
///
/// Keys and values are UTF-16, little endian, without a zero at their end.
struct VHDXParentLocator: Sendable {
    static let type = DiskUUID(known: "b04aefb7-d19e-4a81-b789-25b8e9445913")
    private static let headerSize = 20
    private static let entrySize = 12

    /// The keys of 2.6.2.6.3.
    enum Key {
        /// The parent's DataWriteGuid, in braces.
        static let linkage = "parent_linkage"
        /// Another one that the parent may have.
        static let linkage2 = "parent_linkage2"
        static let relativePath = "relative_path"
        static let volumePath = "volume_path"
        static let absolutePath = "absolute_win32_path"
    }

    private(set) var values: [(key: String, value: String)] = []

    init(_ values: [(key: String, value: String)]) { self.values = values }

    init(parsing fields: FieldReader) throws(DiskError) {
        let type = try DiskUUID(mixedEndian: fields.bytes(at: 0, count: 16))
        guard type == Self.type else {
            throw DiskError(.unsupported, "its parent locator is of the type \(type), which nobody here knows")
        }
        let count: UInt16 = try fields.littleEndian(at: 18)
        for index in 0..<Int(count) {
            let place = Self.headerSize + index * Self.entrySize
            let key = try Self.text(
                fields, offset: fields.littleEndian(at: place), length: fields.littleEndian(at: place + 8))
            let value = try Self.text(
                fields, offset: fields.littleEndian(at: place + 4), length: fields.littleEndian(at: place + 10))
            guard self[key] == nil else {
                throw DiskError(.invalidImage, "the parent locator has the key '\(key.printable(limit: 40))' twice")
            }
            values.append((key, value))
            // More keys than any program writes; each is compared with the others.
            guard values.count <= 64 else {
                throw DiskError(.invalidImage, "the parent locator is said to have \(count) keys; 64 are read")
            }
        }
    }

    private static func text(_ fields: FieldReader, offset: UInt32, length: UInt16) throws(DiskError) -> String {
        guard UInt64(offset) + UInt64(length) <= UInt64(fields.count), length % 2 == 0 else {
            throw DiskError(
                .invalidImage,
                "the parent locator has text at byte \(offset) of \(length) bytes, which it does not hold")
        }
        let bytes = try fields.bytes(at: Int(offset), count: Int(length))
        var units = stride(from: 0, to: bytes.count, by: 2).map { UInt16(bytes[$0]) | UInt16(bytes[$0 + 1]) << 8 }
        // Some writers count a zero at the end.
        while units.last == 0 { units.removeLast() }
        return String(decoding: units, as: UTF16.self)
    }

    subscript(key: String) -> String? { values.first { $0.key == key }?.value }

    /// The same with another value for a key.
    func setting(_ key: String, _ value: String) -> VHDXParentLocator {
        VHDXParentLocator(values.filter { $0.key != key } + [(key, value)])
    }

    /// The DataWriteGuids by which the parent may be known; none that is null.
    var linkages: [DiskUUID] {
        [Key.linkage, Key.linkage2].compactMap { self[$0].flatMap { DiskUUID($0) } }.filter { !$0.isNull }
    }

    /// The paths, in the order in which the specification has them tried.
    var paths: [String] {
        [Key.relativePath, Key.volumePath, Key.absolutePath].compactMap { self[$0] }.filter { !$0.isEmpty }
    }

    /// The item's bytes.
    func encode() -> [UInt8] {
        var texts: [[UInt8]] = []
        for (key, value) in values {
            for text in [key, value] {
                texts.append(
                    text.utf16.flatMap { [UInt8(truncatingIfNeeded: $0), UInt8(truncatingIfNeeded: $0 >> 8)] })
            }
        }
        let textStart = Self.headerSize + values.count * Self.entrySize
        var fields = FieldWriter(count: textStart + texts.reduce(0) { $0 + $1.count })
        fields.bytes(Self.type.mixedEndian, at: 0)
        fields.littleEndian(UInt16(values.count), at: 18)
        var offset = textStart
        for (index, text) in texts.enumerated() {
            let place = Self.headerSize + index / 2 * Self.entrySize
            let isValue = index % 2
            fields.littleEndian(UInt32(offset), at: place + isValue * 4)
            fields.littleEndian(UInt16(text.count), at: place + 8 + isValue * 2)
            fields.bytes(text, at: offset)
            offset += text.count
        }
        return fields.bytes
    }
}

internal import DiskImage
internal import DiskStorage

/// The footer of a VHD: big endian, 512 bytes at the file's end. Dynamic and differencing images have a copy of it at
/// their beginning.
///
/// Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 (2006), "Hard Disk Footer Format".
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | cookie: `conectix` |
/// | 8 | 4 | features: bit 1 is always set |
/// | 12 | 4 | file format version: 0x00010000 |
/// | 16 | 8 | data offset: of the dynamic header; all ones in a fixed image |
/// | 24 | 4 | time stamp: when it was made, see ``VHDTimestamp`` |
/// | 28 | 4 | creator application, ASCII |
/// | 32 | 4 | creator version |
/// | 36 | 4 | creator host OS: `Wi2k` or `Mac ` |
/// | 40 | 8 | original size: bytes of the disk when it was made |
/// | 48 | 8 | current size: bytes of the disk |
/// | 56 | 4 | disk geometry: cylinders (2), heads (1), sectors per track (1) |
/// | 60 | 4 | disk type: 2 fixed, 3 dynamic, 4 differencing |
/// | 64 | 4 | checksum: ones' complement of the sum of all other bytes |
/// | 68 | 16 | unique ID |
/// | 84 | 1 | saved state |
/// | 85 | 427 | reserved: 0 |
///
/// Virtual PC before 2004 wrote the first 511 bytes alone.
struct VHDFooter: Sendable, Equatable {
    static let byteCount = 512
    private static let cookie: StaticString = "conectix"
    private static let checksumOffset = 64
    /// What stands for no place.
    static let noOffset = UInt64.max
    /// Bytes of a disk at most that are believed; no file system has so long files.
    private static let sizeLimit: UInt64 = 1 << 62

    /// What kind of image it is.
    enum DiskType: UInt32, Sendable {
        case fixed = 2
        case dynamic = 3
        case differencing = 4

        var name: String {
            switch self {
            case .fixed: "fixed"
            case .dynamic: "dynamic"
            case .differencing: "differencing"
            }
        }
    }

    var features: UInt32 = 2
    var dataOffset: UInt64 = Self.noOffset
    var timestamp: VHDTimestamp
    var creatorApplication: [UInt8]
    var creatorVersion: UInt32
    var creatorHostOS: [UInt8]
    var originalSize: UInt64
    var currentSize: UInt64
    var geometry: DiskGeometry
    var type: DiskType
    var uuid: DiskUUID
    var savedState: UInt8 = 0

    /// Whether the bytes begin like a footer.
    static func hasCookie(_ bytes: [UInt8]) -> Bool { FieldReader(bytes).matches(cookie, at: 0) }

    /// Whether the checksum of 512 bytes is right.
    static func hasRightChecksum(_ bytes: [UInt8]) -> Bool {
        let stored: UInt32? = try? FieldReader(bytes).bigEndian(at: checksumOffset)
        return stored == vhdChecksum(bytes, at: checksumOffset)
    }

    /// The same bytes with the right checksum.
    static func withChecksum(_ bytes: [UInt8]) -> [UInt8] {
        var fields = FieldWriter(bytes)
        fields.bigEndian(vhdChecksum(bytes, at: checksumOffset), at: checksumOffset)
        return fields.bytes
    }

    /// Takes 512 bytes apart, whatever their checksum.
    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard Self.hasCookie(bytes) else {
            throw DiskError(.invalidImage, "the footer does not begin with 'conectix'")
        }
        let version: UInt32 = try fields.bigEndian(at: 12)
        guard version >> 16 == 1 else {
            throw DiskError(.unsupported, "the footer's version is \(version >> 16).\(version & 0xffff); 1 is known")
        }
        features = try fields.bigEndian(at: 8)
        dataOffset = try fields.bigEndian(at: 16)
        timestamp = VHDTimestamp(seconds: try fields.bigEndian(at: 24))
        creatorApplication = try fields.bytes(at: 28, count: 4)
        creatorVersion = try fields.bigEndian(at: 32)
        creatorHostOS = try fields.bytes(at: 36, count: 4)
        originalSize = try fields.bigEndian(at: 40)
        currentSize = try fields.bigEndian(at: 48)
        geometry = DiskGeometry(
            cylinders: UInt64(try fields.bigEndian(at: 56, as: UInt16.self)), heads: UInt64(try fields.byte(at: 58)),
            sectors: UInt64(try fields.byte(at: 59)))
        let number: UInt32 = try fields.bigEndian(at: 60)
        guard let type = DiskType(rawValue: number) else {
            throw DiskError(
                .unsupported, "the disk type is \(number); 2 (fixed), 3 (dynamic), 4 (differencing) are known")
        }
        self.type = type
        uuid = try DiskUUID(bigEndian: fields.bytes(at: 68, count: 16))
        savedState = try fields.byte(at: 84)
        guard currentSize <= Self.sizeLimit else {
            throw DiskError(.invalidImage, "the disk is said to have \(currentSize) bytes")
        }
    }

    init(
        type: DiskType, size: UInt64, geometry: DiskGeometry, uuid: DiskUUID, timestamp: VHDTimestamp
    ) {
        self.type = type
        self.geometry = geometry
        self.uuid = uuid
        self.timestamp = timestamp
        (originalSize, currentSize) = (size, size)
        creatorApplication = Array(VHDSizeRule.creatorApplication.utf8)
        creatorVersion = 0x0001_0000
        creatorHostOS = Array("Wi2k".utf8)
        if type != .fixed { dataOffset = UInt64(Self.byteCount) }
    }

    /// The 512 bytes; what is reserved is taken from `bytes`, if they are given.
    func encode(over bytes: [UInt8]? = nil) -> [UInt8] {
        var fields = bytes.map { FieldWriter($0) } ?? FieldWriter(count: Self.byteCount)
        fields.bytes(Self.cookie.withUTF8Buffer { unsafe Array($0) }, at: 0)
        fields.bigEndian(features, at: 8)
        fields.bigEndian(UInt32(0x0001_0000), at: 12)
        fields.bigEndian(dataOffset, at: 16)
        fields.bigEndian(timestamp.seconds, at: 24)
        fields.bytes(creatorApplication, at: 28)
        fields.bigEndian(creatorVersion, at: 32)
        fields.bytes(creatorHostOS, at: 36)
        fields.bigEndian(originalSize, at: 40)
        fields.bigEndian(currentSize, at: 48)
        fields.bigEndian(UInt16(truncatingIfNeeded: geometry.cylinders), at: 56)
        fields.byte(UInt8(truncatingIfNeeded: geometry.heads), at: 58)
        fields.byte(UInt8(truncatingIfNeeded: geometry.sectors), at: 59)
        fields.bigEndian(type.rawValue, at: 60)
        fields.bytes(uuid.bytes, at: 68)
        fields.byte(savedState, at: 84)
        return Self.withChecksum(fields.bytes)
    }
}

/// The checksum of a footer or a dynamic header: the ones' complement of the sum of its bytes, without the four at
/// `place` that hold it.
func vhdChecksum(_ bytes: [UInt8], at place: Int) -> UInt32 {
    var sum: UInt32 = 0
    for (index, byte) in bytes.enumerated() where !(place..<place + 4).contains(index) { sum &+= UInt32(byte) }
    return ~sum
}

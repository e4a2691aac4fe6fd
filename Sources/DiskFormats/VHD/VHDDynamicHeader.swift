internal import DiskImage
internal import DiskStorage

/// The header of a dynamic or differencing VHD: big endian, 1024 bytes, where the footer's data offset says.
///
/// Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 (2006), "Dynamic Disk Header Format".
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | cookie: `cxsparse` |
/// | 8 | 8 | data offset: all ones |
/// | 16 | 8 | table offset: of the block allocation table (BAT) |
/// | 24 | 4 | header version: 0x00010000 |
/// | 28 | 4 | max table entries |
/// | 32 | 4 | block size: bytes of data of a block, without its sector bitmap; a power of two, usually 2 MiB |
/// | 36 | 4 | checksum: ones' complement of the sum of all other bytes |
/// | 40 | 16 | parent unique ID |
/// | 56 | 4 | parent time stamp |
/// | 60 | 4 | reserved |
/// | 64 | 512 | parent Unicode name, UTF-16 big endian |
/// | 576 | 8 × 24 | parent locator entries, see ``VHDParentLocator`` |
/// | 768 | 256 | reserved: 0 |
struct VHDDynamicHeader: Sendable, Equatable {
    static let byteCount = 1024
    static let locatorCount = 8
    private static let cookie: StaticString = "cxsparse"
    private static let checksumOffset = 36
    private static let nameOffset = 64
    private static let locatorsOffset = 576
    /// Code units of the parent's name, with a zero at their end.
    static let nameLimit = 256
    /// Bytes of a block. Below 4 KiB it is not agreed how long a sector bitmap is.
    static let blockSizes: ClosedRange<UInt64> = 1 << 12...1 << 31
    /// Entries of the table at most: it has 1 GiB then.
    static let entryLimit: UInt64 = 1 << 28

    var tableOffset: UInt64
    var maxTableEntries: UInt32
    var blockSize: UInt64
    var parentUUID = DiskUUID.null
    var parentTimestamp = VHDTimestamp(seconds: 0)
    var parentName = ""
    var locators: [VHDParentLocator] = []

    /// Whether the checksum of 1024 bytes is right.
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

    /// Takes 1024 bytes apart, whatever their checksum.
    init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard fields.matches(Self.cookie, at: 0) else {
            throw DiskError(.invalidImage, "the dynamic header does not begin with 'cxsparse'")
        }
        let version: UInt32 = try fields.bigEndian(at: 24)
        guard version >> 16 == 1 else {
            throw DiskError(
                .unsupported, "the dynamic header's version is \(version >> 16).\(version & 0xffff); 1 is known")
        }
        tableOffset = try fields.bigEndian(at: 16)
        maxTableEntries = try fields.bigEndian(at: 28)
        blockSize = UInt64(try fields.bigEndian(at: 32, as: UInt32.self))
        guard blockSize.isPowerOfTwo, Self.blockSizes.contains(blockSize) else {
            throw DiskError(
                .invalidImage, "a block is said to have \(blockSize) bytes: it can be a power of two from 4096 to 2^31")
        }
        parentUUID = try DiskUUID(bigEndian: fields.bytes(at: 40, count: 16))
        parentTimestamp = VHDTimestamp(seconds: try fields.bigEndian(at: 56))
        parentName = VHDText.utf16(
            try fields.bytes(at: Self.nameOffset, count: 2 * Self.nameLimit), isUsuallyBigEndian: true)
        for number in 0..<Self.locatorCount {
            let place = Self.locatorsOffset + number * VHDParentLocator.byteCount
            locators.append(
                try VHDParentLocator(parsing: fields.bytes(at: place, count: VHDParentLocator.byteCount)))
        }
    }

    init(tableOffset: UInt64, maxTableEntries: UInt32, blockSize: UInt64) {
        self.tableOffset = tableOffset
        self.maxTableEntries = maxTableEntries
        self.blockSize = blockSize
    }

    /// The 1024 bytes; what is reserved is taken from `bytes`, if they are given. At most 255 code units of the
    /// parent's name are kept.
    func encode(over bytes: [UInt8]? = nil) -> [UInt8] {
        var fields = bytes.map { FieldWriter($0) } ?? FieldWriter(count: Self.byteCount)
        let variable = Self.nameOffset..<Self.locatorsOffset + Self.locatorCount * VHDParentLocator.byteCount
        fields.bytes([UInt8](repeating: 0, count: variable.count), at: variable.lowerBound)
        fields.bytes(Self.cookie.withUTF8Buffer { unsafe Array($0) }, at: 0)
        fields.bigEndian(VHDFooter.noOffset, at: 8)
        fields.bigEndian(tableOffset, at: 16)
        fields.bigEndian(UInt32(0x0001_0000), at: 24)
        fields.bigEndian(maxTableEntries, at: 28)
        fields.bigEndian(UInt32(truncatingIfNeeded: blockSize), at: 32)
        fields.bytes(parentUUID.bytes, at: 40)
        fields.bigEndian(parentTimestamp.seconds, at: 56)
        for (index, unit) in parentName.utf16.prefix(Self.nameLimit - 1).enumerated() {
            fields.bigEndian(unit, at: Self.nameOffset + index * 2)
        }
        for (index, locator) in locators.prefix(Self.locatorCount).enumerated() {
            fields.bytes(locator.encode(), at: Self.locatorsOffset + index * VHDParentLocator.byteCount)
        }
        return Self.withChecksum(fields.bytes)
    }
}

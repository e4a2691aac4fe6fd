internal import DiskStorage

/// An entry of the metadata table. [MS-VHDX] 2.6.1.2.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 16 | ItemId |
/// | 16 | 4 | Offset: in the metadata region, in bytes |
/// | 20 | 4 | Length: bytes |
/// | 24 | 4 | flags: bit 0 IsUser, bit 1 IsVirtualDisk, bit 2 IsRequired |
struct VHDXMetadataEntry: Sendable {
    static let byteCount = 32
    let item: DiskUUID
    let offset: UInt32
    let length: UInt32
    let isUser: Bool
    let isVirtualDisk: Bool
    let isRequired: Bool

    init(_ item: DiskUUID, offset: UInt32, length: UInt32, isVirtualDisk: Bool) {
        self.item = item
        self.offset = offset
        self.length = length
        self.isVirtualDisk = isVirtualDisk
        isUser = false
        isRequired = true
    }

    init(parsing fields: FieldReader, at place: Int) throws(DiskError) {
        item = try DiskUUID(mixedEndian: fields.bytes(at: place, count: 16))
        offset = try fields.littleEndian(at: place + 16)
        length = try fields.littleEndian(at: place + 20)
        let flags: UInt32 = try fields.littleEndian(at: place + 24)
        isUser = flags & 1 != 0
        isVirtualDisk = flags & 2 != 0
        isRequired = flags & 4 != 0
    }

    func encode(at place: Int, into fields: inout FieldWriter) {
        fields.bytes(item.mixedEndian, at: place)
        fields.littleEndian(offset, at: place + 16)
        fields.littleEndian(length, at: place + 20)
        let flags: UInt32 = (isUser ? 1 : 0) | (isVirtualDisk ? 2 : 0) | (isRequired ? 4 : 0)
        fields.littleEndian(flags, at: place + 24)
    }
}

/// What the metadata region says of the disk. [MS-VHDX] 2.6.
///
/// The table, 64 KiB (2.6.1.1):
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | Signature: `metadata` |
/// | 10 | 2 | EntryCount: at most 2047 |
/// | 32 | 32 each | the entries |
///
/// The items (2.6.2): File Parameters are BlockSize (4 bytes) and flags (4: bit 0 LeaveBlockAllocated, bit 1
/// HasParent); Virtual Disk Size 8 bytes, Virtual Disk ID a GUID, Logical and Physical Sector Size 4 bytes each.
struct VHDXMetadata: Sendable {
    static let tableSize = 64 << 10
    static let entryLimit: UInt16 = 2047
    static let blockSizes: ClosedRange<UInt64> = 1 << 20...256 << 20
    static let sectorSizes: [UInt32] = [512, 4096]
    /// Bytes of a disk at most.
    static let sizeLimit: UInt64 = 64 << 40
    static let entriesOffset = 32
    static let entryCountOffset = 10
    /// Bytes of an item at most.
    private static let itemLimit: UInt32 = 1 << 20
    private static let signature: StaticString = "metadata"

    /// The items, by the names that the specification has for them.
    enum Item {
        static let fileParameters = DiskUUID(known: "caa16737-fa36-4d43-b3b6-33f0aa44e76b")
        static let virtualDiskSize = DiskUUID(known: "2fa54224-cd1b-4876-b211-5dbed83bf4b8")
        static let virtualDiskID = DiskUUID(known: "beca12ab-b2e6-4523-93ef-c309e000c746")
        static let logicalSectorSize = DiskUUID(known: "8141bf1d-a96f-4709-ba47-f233a8faab5f")
        static let physicalSectorSize = DiskUUID(known: "cda348c7-445d-4471-9cc9-e9885251c556")
        static let parentLocator = DiskUUID(known: "a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
        static let known = [
            fileParameters, virtualDiskSize, virtualDiskID, logicalSectorSize, physicalSectorSize, parentLocator,
        ]
    }

    var blockSize: UInt64
    /// Whether it is a fixed image: blocks stay allocated.
    var leavesBlocksAllocated: Bool
    var hasParent: Bool
    /// The size of the disk in bytes.
    var virtualDiskSize: UInt64
    /// What the SCSI page 83 of the disk says; a child has its parent's.
    var virtualDiskID: DiskUUID
    var logicalSectorSize: UInt32
    var physicalSectorSize: UInt32
    var parentLocator: VHDXParentLocator?

    init(
        blockSize: UInt64, leavesBlocksAllocated: Bool, virtualDiskSize: UInt64, virtualDiskID: DiskUUID,
        logicalSectorSize: UInt32, physicalSectorSize: UInt32, parentLocator: VHDXParentLocator?
    ) {
        self.blockSize = blockSize
        self.leavesBlocksAllocated = leavesBlocksAllocated
        self.virtualDiskSize = virtualDiskSize
        self.virtualDiskID = virtualDiskID
        self.logicalSectorSize = logicalSectorSize
        self.physicalSectorSize = physicalSectorSize
        self.parentLocator = parentLocator
        hasParent = parentLocator != nil
    }

    // MARK: - Reading

    /// Reads the table and the items that are known, in the region at `range` of the file.
    init(_ storage: any Storage, _ range: Range<UInt64>) throws(DiskError) {
        let entries = try Self.entries(storage, range)
        func bytes(_ item: DiskUUID, _ count: ClosedRange<UInt32>, _ what: String) throws(DiskError) -> FieldReader? {
            let found = entries.filter { $0.item == item && !$0.isUser }
            guard let entry = found.first else { return nil }
            guard found.count == 1 else {
                throw DiskError(.invalidImage, "the metadata has \(found.count) entries for \(what)")
            }
            guard count.contains(entry.length) else {
                throw DiskError(.invalidImage, "\(what) is said to take \(entry.length) bytes of the metadata")
            }
            return FieldReader(
                try storage.bytes(
                    at: range.lowerBound + UInt64(entry.offset), count: Int(entry.length), for: .header, "the metadata"
                ))
        }
        func required(_ item: DiskUUID, _ count: UInt32, _ what: String) throws(DiskError) -> FieldReader {
            guard let fields = try bytes(item, count...Self.itemLimit, what) else {
                throw DiskError(.invalidImage, "the metadata does not say \(what)", offset: range.lowerBound)
            }
            return fields
        }
        let parameters = try required(Item.fileParameters, 8, "the file parameters")
        blockSize = UInt64(try parameters.littleEndian(at: 0, as: UInt32.self))
        let flags: UInt32 = try parameters.littleEndian(at: 4)
        hasParent = flags & 2 != 0
        leavesBlocksAllocated = flags & 1 != 0 && flags & 2 == 0
        virtualDiskSize = try required(Item.virtualDiskSize, 8, "the disk's size").littleEndian(at: 0)
        logicalSectorSize = try required(Item.logicalSectorSize, 4, "the logical sector size").littleEndian(at: 0)
        physicalSectorSize =
            try bytes(Item.physicalSectorSize, 4...Self.itemLimit, "the physical sector size")?.littleEndian(at: 0)
            ?? logicalSectorSize
        virtualDiskID = .null
        if let fields = try bytes(Item.virtualDiskID, 16...Self.itemLimit, "the disk's ID") {
            virtualDiskID = try DiskUUID(mixedEndian: fields.bytes(at: 0, count: 16))
        }
        if hasParent {
            guard let fields = try bytes(Item.parentLocator, 20...Self.itemLimit, "the parent locator") else {
                throw DiskError(
                    .invalidImage, "it has a parent, and the metadata does not say which", offset: range.lowerBound)
            }
            parentLocator = try VHDXParentLocator(parsing: fields)
        }
        try check()
    }

    static func entries(
        _ storage: any Storage, _ range: Range<UInt64>
    ) throws(DiskError) -> [VHDXMetadataEntry] {
        let fields = FieldReader(
            try storage.bytes(at: range.lowerBound, count: tableSize, for: .header, "the metadata table"))
        guard fields.matches(signature, at: 0) else {
            throw DiskError(.invalidImage, "the metadata table has a wrong signature", offset: range.lowerBound)
        }
        let count: UInt16 = try fields.littleEndian(at: entryCountOffset)
        guard count <= entryLimit else {
            throw DiskError(.invalidImage, "the metadata table is said to have \(count) entries; \(entryLimit) can be")
        }
        let length = range.upperBound - range.lowerBound
        var entries: [VHDXMetadataEntry] = []
        for index in 0..<Int(count) {
            let entry = try VHDXMetadataEntry(
                parsing: fields, at: entriesOffset + index * VHDXMetadataEntry.byteCount)
            if entry.isRequired, entry.isUser || !Item.known.contains(entry.item) {
                throw DiskError(
                    .unsupported, "it needs the metadata item \(entry.item) to be understood, which nobody here knows")
            }
            guard entry.length == 0 || entry.offset >= UInt32(tableSize), entry.length <= itemLimit,
                UInt64(entry.offset) + UInt64(entry.length) <= length
            else {
                throw DiskError(
                    .invalidImage,
                    "the metadata item \(entry.item) is said to have \(entry.length) bytes from byte \(entry.offset) "
                        + "of the metadata on, which has \(length)")
            }
            entries.append(entry)
        }
        return entries
    }

    private func check() throws(DiskError) {
        guard blockSize.isPowerOfTwo, Self.blockSizes.contains(blockSize) else {
            throw DiskError(
                .invalidImage, "its blocks are said to have \(blockSize) bytes; they have 1 to 256 MiB, a power of two")
        }
        for size in [logicalSectorSize, physicalSectorSize] where !Self.sectorSizes.contains(size) {
            throw DiskError(.invalidImage, "its sectors are said to have \(size) bytes; they have 512 or 4096")
        }
        guard virtualDiskSize > 0, virtualDiskSize <= Self.sizeLimit,
            virtualDiskSize % UInt64(logicalSectorSize) == 0
        else {
            throw DiskError(
                .invalidImage,
                "the disk is said to have \(virtualDiskSize) bytes; it has whole sectors of \(logicalSectorSize) "
                    + "bytes, and 64 TiB at most")
        }
    }

    // MARK: - Writing

    /// The region: the table, and the items behind it.
    func encode() -> [UInt8] {
        var parameters = FieldWriter(count: 8)
        parameters.littleEndian(UInt32(blockSize), at: 0)
        parameters.littleEndian((leavesBlocksAllocated ? 1 : 0) | (hasParent ? 2 : 0) as UInt32, at: 4)
        func number<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
            var fields = FieldWriter(count: T.bitWidth / 8)
            fields.littleEndian(value, at: 0)
            return fields.bytes
        }
        var items: [(DiskUUID, bytes: [UInt8], isVirtualDisk: Bool)] = [
            (Item.fileParameters, parameters.bytes, false),
            (Item.virtualDiskSize, number(virtualDiskSize), true),
            (Item.virtualDiskID, virtualDiskID.mixedEndian, true),
            (Item.logicalSectorSize, number(logicalSectorSize), true),
            (Item.physicalSectorSize, number(physicalSectorSize), true),
        ]
        if let parentLocator { items.append((Item.parentLocator, parentLocator.encode(), false)) }
        var end = Self.tableSize
        for item in items { end += item.bytes.count }
        var fields = FieldWriter(count: end)
        fields.bytes(Self.signature.bytes, at: 0)
        fields.littleEndian(UInt16(items.count), at: Self.entryCountOffset)
        var offset = Self.tableSize
        for (index, item) in items.enumerated() {
            let entry = VHDXMetadataEntry(
                item.0, offset: UInt32(offset), length: UInt32(item.bytes.count), isVirtualDisk: item.isVirtualDisk)
            entry.encode(at: Self.entriesOffset + index * VHDXMetadataEntry.byteCount, into: &fields)
            fields.bytes(item.bytes, at: offset)
            offset += item.bytes.count
        }
        return fields.bytes
    }
}

internal import DiskImage
internal import DiskStorage

/// The metadata region's bytes, to be changed: items that nobody here knows stay as they are. [MS-VHDX] 2.6.
struct VHDXMetadataRegion {
    private typealias Item = VHDXMetadata.Item

    private let start: UInt64
    private let length: Int
    private let original: [UInt8]
    private var bytes: FieldWriter
    private var entries: [VHDXMetadataEntry]

    /// Bytes of a region that are looked at; all programs make it 1 MiB long.
    private static let byteLimit: UInt64 = 4 << 20

    init(_ storage: any Storage, _ range: Range<UInt64>) throws(DiskError) {
        start = range.lowerBound
        length = Int(min(range.upperBound - range.lowerBound, Self.byteLimit))
        entries = try VHDXMetadata.entries(storage, range)
        original = try storage.bytes(at: start, count: length, for: .header, "the metadata")
        bytes = FieldWriter(original)
        guard entries.allSatisfy({ UInt64($0.offset) + UInt64($0.length) <= UInt64(length) }) else {
            throw DiskError(
                .unsupported, "its metadata has more than \(Self.byteLimit) bytes, which are not changed here")
        }
    }

    private func index(of item: DiskUUID) -> Int? { entries.firstIndex { $0.item == item && !$0.isUser } }

    // MARK: - Items

    mutating func setVirtualDiskID(_ uuid: DiskUUID) throws(DiskError) {
        try set(Item.virtualDiskID, uuid.mixedEndian, isVirtualDisk: true)
    }

    mutating func setVirtualDiskSize(_ size: UInt64) throws(DiskError) {
        var field = FieldWriter(count: 8)
        field.littleEndian(size, at: 0)
        try set(Item.virtualDiskSize, field.bytes, isVirtualDisk: true)
    }

    /// Names another parent, or none.
    mutating func setParent(_ locator: VHDXParentLocator?) throws(DiskError) {
        guard let number = index(of: Item.fileParameters) else { return }
        let place = Int(entries[number].offset) + 4
        var flags: UInt32 = try FieldReader(bytes.bytes).littleEndian(at: place)
        flags = locator == nil ? flags & ~2 : flags | 2
        bytes.littleEndian(flags, at: place)
        if let locator {
            try set(Item.parentLocator, locator.encode(), isVirtualDisk: false)
        } else {
            remove(Item.parentLocator)
        }
    }

    // MARK: - Bytes

    private mutating func set(_ item: DiskUUID, _ data: [UInt8], isVirtualDisk: Bool) throws(DiskError) {
        let number = index(of: item)
        if let number, Int(entries[number].length) == data.count || item != Item.parentLocator {
            return bytes.bytes(data, at: Int(entries[number].offset))
        }
        guard number != nil || entries.count < Int(VHDXMetadata.entryLimit) else {
            throw DiskError(.unsupported, "its metadata table is full")
        }
        let place = try room(for: data.count, besides: number)
        let entry = VHDXMetadataEntry(
            item, offset: UInt32(place), length: UInt32(data.count), isVirtualDisk: isVirtualDisk)
        if let number { entries[number] = entry } else { entries.append(entry) }
        bytes.bytes(data, at: place)
        writeTable(from: number ?? entries.count - 1)
    }

    private mutating func remove(_ item: DiskUUID) {
        guard let number = index(of: item) else { return }
        entries.remove(at: number)
        writeTable(from: number)
        let end = VHDXMetadata.entriesOffset + entries.count * VHDXMetadataEntry.byteCount
        bytes.bytes([UInt8](repeating: 0, count: VHDXMetadataEntry.byteCount), at: end)
    }

    private mutating func writeTable(from first: Int) {
        for number in first..<entries.count {
            entries[number].encode(
                at: VHDXMetadata.entriesOffset + number * VHDXMetadataEntry.byteCount, into: &bytes)
        }
        bytes.littleEndian(UInt16(entries.count), at: VHDXMetadata.entryCountOffset)
    }

    /// Where `count` bytes lie in no item's way, that of the one they replace excepted: the log makes both one change.
    private func room(for count: Int, besides number: Int?) throws(DiskError) -> Int {
        var place = VHDXMetadata.tableSize
        let others = entries.indices.filter { $0 != number && entries[$0].length > 0 }.map { entries[$0] }
        for other in others.sorted(by: { $0.offset < $1.offset }) {
            if place + count <= Int(other.offset) { break }
            place = max(place, (Int(other.offset) + Int(other.length) + 7) & ~7)
        }
        guard place + count <= length else {
            throw DiskError(.unsupported, "its metadata has no room for \(count) bytes")
        }
        return place
    }

    /// The pages of the file that are different now.
    var changedPages: [TablePage] {
        TablePage.changed(from: original, to: bytes.bytes, at: start)
    }
}

extension TablePage {
    /// The pages in which two versions of what lies at `offset` differ; both have the same length, of whole pages.
    static func changed(from old: [UInt8], to new: [UInt8], at offset: UInt64) -> [TablePage] {
        let size = VHDXLogEntryHeader.sectorSize
        var pages: [TablePage] = []
        for start in stride(from: 0, to: new.count, by: size)
        where old[start..<start + size] != new[start..<start + size] {
            pages.append(TablePage(offset: offset + UInt64(start), bytes: Array(new[start..<start + size])))
        }
        return pages
    }
}

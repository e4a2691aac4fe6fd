internal import DiskStorage

/// The header of a GUID partition table (UEFI 2.10, table 5-5), least significant byte first.
///
/// | offset | size | name | |
/// |---|---|---|---|
/// | 0 | 8 | Signature | `EFI PART` |
/// | 12 | 4 | HeaderSize | at least 92, at most a sector |
/// | 16 | 4 | HeaderCRC32 | of HeaderSize bytes, with this field as 0 |
/// | 24 | 8 | MyLBA | the sector that this header is in |
/// | 32 | 8 | AlternateLBA | the sector of the other header |
/// | 40 | 8 | FirstUsableLBA | the first sector that a partition may have |
/// | 48 | 8 | LastUsableLBA | and the last one |
/// | 56 | 16 | DiskGUID | |
/// | 72 | 8 | PartitionEntryLBA | the first sector of the entries |
/// | 80 | 4 | NumberOfPartitionEntries | |
/// | 84 | 4 | SizeOfPartitionEntry | 128 × 2ⁿ |
/// | 88 | 4 | PartitionEntryArrayCRC32 | |
struct GUIDTableHeader {
    let myLBA: UInt64
    let alternateLBA: UInt64
    let firstUsableLBA: UInt64
    let lastUsableLBA: UInt64
    let diskGUID: DiskUUID
    let entriesLBA: UInt64
    let entryCount: UInt32
    let entrySize: UInt32
    let entriesChecksum: UInt32

    /// Bytes that every header has.
    static let minimumSize = 92

    /// Parses a sector; a header that is not what its checksum says is an error, and so is none.
    init(parsing fields: FieldReader) throws(DiskError) {
        guard fields.matches("EFI PART", at: 0) else { throw DiskError(.invalidImage, "there is no header") }
        let size: UInt32 = try fields.littleEndian(at: 12)
        guard size >= Self.minimumSize, size <= fields.count else {
            throw DiskError(.invalidImage, "its header has \(size) bytes")
        }
        var copy = FieldWriter(try fields.bytes(at: 0, count: Int(size)))
        copy.littleEndian(UInt32(0), at: 16)
        guard try fields.littleEndian(at: 16) == crc32(copy.bytes) else {
            throw DiskError(.invalidImage, "its header's checksum is wrong")
        }
        myLBA = try fields.littleEndian(at: 24)
        alternateLBA = try fields.littleEndian(at: 32)
        firstUsableLBA = try fields.littleEndian(at: 40)
        lastUsableLBA = try fields.littleEndian(at: 48)
        diskGUID = try DiskUUID(mixedEndian: try fields.bytes(at: 56, count: 16))
        entriesLBA = try fields.littleEndian(at: 72)
        entryCount = try fields.littleEndian(at: 80)
        entrySize = try fields.littleEndian(at: 84)
        entriesChecksum = try fields.littleEndian(at: 88)
    }
}

/// An entry of a GUID partition table (UEFI 2.10, table 5-6), least significant byte first.
///
/// | offset | size | name | |
/// |---|---|---|---|
/// | 0 | 16 | PartitionTypeGUID | all zeros: the entry is not used |
/// | 16 | 16 | UniquePartitionGUID | |
/// | 32 | 8 | StartingLBA | |
/// | 40 | 8 | EndingLBA | the last sector, not the one behind it |
/// | 48 | 8 | Attributes | table 5-8; bit 2: a BIOS boots from it |
/// | 56 | 72 | PartitionName | UTF-16 |
struct GUIDTableEntry {
    let type: DiskUUID
    let uniqueGUID: DiskUUID
    let firstLBA: UInt64
    let lastLBA: UInt64
    let attributes: UInt64
    let name: String?

    init(parsing fields: FieldReader, at offset: Int) throws(DiskError) {
        type = try DiskUUID(mixedEndian: try fields.bytes(at: offset, count: 16))
        uniqueGUID = try DiskUUID(mixedEndian: try fields.bytes(at: offset + 16, count: 16))
        firstLBA = try fields.littleEndian(at: offset + 32)
        lastLBA = try fields.littleEndian(at: offset + 40)
        attributes = try fields.littleEndian(at: offset + 48)
        name = DiskText.utf16(try fields.bytes(at: offset + 56, count: 72))
    }

    var isLegacyBootable: Bool { attributes & 1 << 2 != 0 }
}

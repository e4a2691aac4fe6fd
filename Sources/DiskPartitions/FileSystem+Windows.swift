internal import DiskStorage

/// The boot sector of FAT12, FAT16 and FAT32 (Microsoft's FAT specification of 2000, "Boot Sector and BPB"), least
/// significant byte first.
///
/// | offset | size | name | | offset | size | name |
/// |---|---|---|---|---|---|---|
/// | 11 | 2 | BytsPerSec | | 36 | 4 | FAT32: FATSz32 |
/// | 13 | 1 | SecPerClus | | 44 | 4 | FAT32: RootClus |
/// | 14 | 2 | RsvdSecCnt | | 67 | 4 | FAT32: VolID |
/// | 16 | 1 | NumFATs | | 71 | 11 | FAT32: VolLab |
/// | 17 | 2 | RootEntCnt | | 39 | 4 | FAT12 and 16: VolID |
/// | 19 | 2 | TotSec16 | | 43 | 11 | FAT12 and 16: VolLab |
/// | 21 | 1 | Media | | 510 | 2 | signature, 0xaa55 |
/// | 22 | 2 | FATSz16 | | | | |
/// | 32 | 4 | TotSec32 | | | | |
struct FATBootSector {
    let version: String
    let label: String?
    let serial: UInt32
    /// Where the root directory is, or its first cluster.
    let rootDirectory: Range<UInt64>

    static let size = 512
    /// The label in place of none.
    private static let noName = "NO NAME"

    init?(parsing fields: FieldReader) throws(DiskError) {
        let sectorSize = UInt64(try fields.littleEndian(at: 11, as: UInt16.self))
        let clusterSectors = UInt64(try fields.byte(at: 13))
        let reserved = UInt64(try fields.littleEndian(at: 14, as: UInt16.self))
        let tables = UInt64(try fields.byte(at: 16))
        let media = try fields.byte(at: 21)
        guard try fields.littleEndian(at: 510, as: UInt16.self) == 0xaa55,
            sectorSize.isPowerOfTwo, (512...4096).contains(sectorSize), clusterSectors.isPowerOfTwo,
            reserved > 0, (1...4).contains(tables), media == 0xf0 || media >= 0xf8
        else { return nil }
        let shortTable = UInt64(try fields.littleEndian(at: 22, as: UInt16.self))
        let longTable = UInt64(try fields.littleEndian(at: 36, as: UInt32.self))
        let rootEntries = UInt64(try fields.littleEndian(at: 17, as: UInt16.self))
        let shortTotal = UInt64(try fields.littleEndian(at: 19, as: UInt16.self))
        let total = shortTotal > 0 ? shortTotal : UInt64(try fields.littleEndian(at: 32, as: UInt32.self))
        let table = shortTable > 0 ? shortTable : longTable
        // No term of these sums has more than 42 bits.
        let rootSectors = (rootEntries * 32).dividedRoundingUp(by: sectorSize)
        let rootStart = reserved + tables * table
        let dataStart = rootStart + rootSectors
        guard table > 0, total > dataStart else { return nil }
        let clusters = (total - dataStart) / clusterSectors
        let isLarge = shortTable == 0
        if isLarge {
            version = "FAT32"
            let cluster = UInt64(try fields.littleEndian(at: 44, as: UInt32.self))
            let start = dataStart + (max(cluster, 2) - 2) * clusterSectors
            rootDirectory = start * sectorSize..<(start + clusterSectors) * sectorSize
        } else {
            guard rootEntries > 0 else { return nil }
            version = clusters < 4085 ? "FAT12" : "FAT16"
            rootDirectory = rootStart * sectorSize..<dataStart * sectorSize
        }
        serial = try fields.littleEndian(at: isLarge ? 67 : 39)
        let text = DiskText.padded(try fields.bytes(at: isLarge ? 71 : 43, count: 11))
        label = text == Self.noName ? nil : text
    }
}

/// An entry of a FAT directory (same source, "FAT Directory Structure"), of which only a volume's label is of interest.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 11 | DIR_Name; first byte 0: there are no more; 0xe5: deleted |
/// | 11 | 1 | DIR_Attr: 0x08 of a label, 0x0f of a part of a long name, 0x10 of a directory |
struct FATDirectoryEntry {
    let isEnd: Bool
    /// If it is a volume's label.
    let label: String?

    static let size = 32

    init(parsing fields: FieldReader, at offset: Int) throws(DiskError) {
        var name = try fields.bytes(at: offset, count: 11)
        let attributes = try fields.byte(at: offset + 11)
        isEnd = name[0] == 0
        let isLabel = attributes & 0x18 == 0x08 && attributes & 0x0f != 0x0f && name[0] != 0xe5
        if name[0] == 0x05 { name[0] = 0xe5 }
        label = isLabel ? DiskText.padded(name) : nil
    }
}

/// The boot sector of exFAT (Microsoft's exFAT specification, 3.1), least significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 3 | 8 | FileSystemName, `EXFAT   ` |
/// | 88 | 4 | ClusterHeapOffset |
/// | 96 | 4 | FirstClusterOfRootDirectory |
/// | 100 | 4 | VolumeSerialNumber |
/// | 108 | 1 | BytesPerSectorShift, 9 to 12 |
/// | 109 | 1 | SectorsPerClusterShift, up to 25 less that |
struct ExFATBootSector {
    let serial: UInt32
    /// The first cluster of the root directory.
    let rootDirectory: Range<UInt64>

    static let size = 512

    init?(parsing fields: FieldReader) throws(DiskError) {
        let sectorShift = try fields.byte(at: 108)
        let clusterShift = try fields.byte(at: 109)
        guard fields.matches("EXFAT   ", at: 3), (9...12).contains(sectorShift), clusterShift <= 25 - sectorShift else {
            return nil
        }
        serial = try fields.littleEndian(at: 100)
        let heap = UInt64(try fields.littleEndian(at: 88, as: UInt32.self))
        let cluster = UInt64(try fields.littleEndian(at: 96, as: UInt32.self))
        // Less than 60 bits.
        let start = heap << UInt64(sectorShift) + (max(cluster, 2) - 2) << UInt64(sectorShift + clusterShift)
        rootDirectory = start..<start + 1 << UInt64(sectorShift + clusterShift)
    }

    /// The label in an entry of the root directory (same source, 7.3): type 0x83, the number of UTF-16 units at 1, and
    /// these from 2 on. Nil for other entries.
    static func label(parsing fields: FieldReader, at offset: Int) throws(DiskError) -> String? {
        guard try fields.byte(at: offset) == 0x83 else { return nil }
        return DiskText.utf16(
            try fields.bytes(at: offset + 2, count: 2 * min(11, Int(try fields.byte(at: offset + 1)))))
    }
}

/// The boot sector of NTFS (NTFS documentation of the Linux-NTFS project, "$Boot"), least significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 3 | 8 | OEM ID, `NTFS    ` |
/// | 11 | 2 | bytes of a sector |
/// | 13 | 1 | sectors of a cluster, or if above 0x80 the negative of its binary logarithm |
/// | 48 | 8 | first cluster of $MFT |
/// | 64 | 1 | clusters of a file record, or if negative the negative of the binary logarithm of its bytes |
/// | 72 | 8 | serial number |
struct NTFSBootSector {
    let serial: UInt64
    /// Where the record of $Volume is, the fourth one; nil if the numbers make no sense.
    let volumeRecord: Range<UInt64>?

    static let size = 512

    init?(parsing fields: FieldReader) throws(DiskError) {
        let sectorSize = UInt64(try fields.littleEndian(at: 11, as: UInt16.self))
        guard fields.matches("NTFS    ", at: 3), sectorSize.isPowerOfTwo, (256...4096).contains(sectorSize) else {
            return nil
        }
        serial = try fields.littleEndian(at: 72)
        let clusterSectors = try fields.byte(at: 13)
        let clusterShift =
            clusterSectors > 0x80 ? UInt64(0 &- clusterSectors) : UInt64(clusterSectors.trailingZeroBitCount)
        guard clusterSectors <= 0x80 ? clusterSectors.isPowerOfTwo : clusterShift <= 12 else { return nil }
        let clusterSize = sectorSize << clusterShift
        let recordClusters = Int8(bitPattern: try fields.byte(at: 64))
        let recordSize = recordClusters > 0 ? UInt64(recordClusters) * clusterSize : 1 << UInt64(-Int(recordClusters))
        let table: UInt64 = try fields.littleEndian(at: 48)
        guard recordSize >= 512, recordSize <= 64 << 10, let start = try? table.multiplied(by: clusterSize),
            let record = try? start.adding(3 * recordSize), let end = try? record.adding(recordSize)
        else {
            volumeRecord = nil
            return
        }
        volumeRecord = record..<end
    }
}

/// The file record of NTFS' $Volume (same source, "$MFT" and "$VOLUME_NAME"), least significant byte first.
///
/// | offset | size | name | | offset | size | attribute |
/// |---|---|---|---|---|---|---|
/// | 0 | 4 | magic, `FILE` | | 0 | 4 | type, 0x60: the name; 0xffffffff: the end |
/// | 4 | 2 | place of the update sequence | | 4 | 4 | length |
/// | 6 | 2 | its words, one more than sectors | | 8 | 1 | 0: the value is here |
/// | 20 | 2 | place of the first attribute | | 16 | 4 | bytes of the value |
/// | | | | | 20 | 2 | its place |
struct NTFSVolumeRecord {
    let label: String?

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard fields.matches("FILE", at: 0) else { return nil }
        let record = try Self.restored(fields)
        var position = Int(try record.littleEndian(at: 20, as: UInt16.self))
        // Attributes are ascending in type, at least 24 bytes long, and inside the record.
        while true {
            let type: UInt32 = try record.littleEndian(at: position)
            let length = Int(try record.littleEndian(at: position + 4, as: UInt32.self))
            guard type < 0x60 else {
                label = type == 0x60 ? try Self.value(record, at: position) : nil
                return
            }
            guard length >= 24 else { return nil }
            position += length
        }
    }

    private static func value(_ record: FieldReader, at position: Int) throws(DiskError) -> String? {
        guard try record.byte(at: position + 8) == 0 else { return nil }
        let count = Int(try record.littleEndian(at: position + 16, as: UInt32.self))
        let place = Int(try record.littleEndian(at: position + 20, as: UInt16.self))
        return DiskText.utf16(try record.bytes(at: position + place, count: count))
    }

    /// The record as it was before the last two bytes of each sector were exchanged for the update sequence number.
    private static func restored(_ fields: FieldReader) throws(DiskError) -> FieldReader {
        let place = Int(try fields.littleEndian(at: 4, as: UInt16.self))
        let words = Int(try fields.littleEndian(at: 6, as: UInt16.self))
        guard words > 0, (words - 1) * 512 <= fields.count else {
            throw DiskError(.invalidImage, "a file record has \(words) words of an update sequence")
        }
        var bytes = fields.bytes
        for sector in 1..<max(1, words) {
            let word = try fields.bytes(at: place + 2 * sector, count: 2)
            bytes.replaceSubrange(sector * 512 - 2..<sector * 512, with: word)
        }
        return FieldReader(bytes)
    }
}

extension Probe {
    /// Bytes of a root directory that are looked through for a label.
    private static var directoryLimit: UInt64 { 64 << 10 }

    func vfat() throws(DiskError) -> FileSystem? {
        let sector = try structure(at: 0, count: FATBootSector.size) { (fields) throws(DiskError) in
            try FATBootSector(parsing: fields)
        }
        guard let sector else { return nil }
        var label: String?
        if let directory = try directory(sector.rootDirectory) {
            for offset in stride(from: 0, to: directory.count, by: FATDirectoryEntry.size) {
                let entry = try FATDirectoryEntry(parsing: directory, at: offset)
                if entry.isEnd { break }
                label = entry.label
                if label != nil { break }
            }
        }
        return FileSystem(
            .vfat, version: sector.version, label: label ?? sector.label, uuid: serialText(sector.serial))
    }

    func exfat() throws(DiskError) -> FileSystem? {
        let sector = try structure(at: 0, count: ExFATBootSector.size) { (fields) throws(DiskError) in
            try ExFATBootSector(parsing: fields)
        }
        guard let sector else { return nil }
        var label: String?
        if let directory = try directory(sector.rootDirectory) {
            for offset in stride(from: 0, to: directory.count, by: 32) where label == nil {
                label = try ExFATBootSector.label(parsing: directory, at: offset)
            }
        }
        return FileSystem(.exfat, label: label, uuid: serialText(sector.serial))
    }

    func ntfs() throws(DiskError) -> FileSystem? {
        let sector = try structure(at: 0, count: NTFSBootSector.size) { (fields) throws(DiskError) in
            try NTFSBootSector(parsing: fields)
        }
        guard let sector else { return nil }
        var label: String?
        if let range = sector.volumeRecord,
            let record = try fields(at: range.lowerBound, count: Int(range.upperBound - range.lowerBound))
        {
            // A file system whose label cannot be found is still one.
            label = (try? NTFSVolumeRecord(parsing: record))?.label
        }
        let serial = DiskText.hexadecimal(sector.serial, digits: 16, uppercase: true)
        return FileSystem(.ntfs, label: label, uuid: sector.serial == 0 ? nil : serial)
    }

    /// ReFS' boot sector (libfsrefs, "Resilient File System (ReFS)") has its name at 3 and `FSRS` at 16.
    func refs() throws(DiskError) -> FileSystem? {
        guard let sector = try fields(at: 0, count: 512) else { return nil }
        let isReFS = sector.matches([0, 0, 0] + Array("ReFS".utf8) + [0], at: 0)
        return isReFS ? FileSystem(.refs) : nil
    }

    /// A BitLocker volume (libbde, "BitLocker Drive Encryption (BDE) format"): `-FVE-FS-` at 3, or, of removable media,
    /// a FAT boot sector with an identifier of BitLocker's at 424.
    func bitLocker() throws(DiskError) -> FileSystem? {
        guard let sector = try fields(at: 0, count: 512) else { return nil }
        if sector.matches("-FVE-FS-", at: 3) { return FileSystem(.bitLocker) }
        guard sector.matches("MSWIN4.1", at: 3), let identifier = DiskUUID("4967d63b-2e29-4ad8-8399-f6a339e3d001"),
            sector.matches(identifier.mixedEndian, at: 424)
        else { return nil }
        return FileSystem(.bitLocker, version: "To Go")
    }

    /// What is looked through of a directory: whole entries of 32 bytes, or nil if it is not inside the range.
    private func directory(_ range: Range<UInt64>) throws(DiskError) -> FieldReader? {
        let count = min(Self.directoryLimit, range.upperBound - range.lowerBound) & ~31
        return try fields(at: range.lowerBound, count: Int(count))
    }

    private func serialText(_ serial: UInt32) -> String? {
        guard serial != 0 else { return nil }
        let digits = DiskText.hexadecimal(serial, digits: 8, uppercase: true)
        return digits.prefix(4) + "-" + digits.suffix(4)
    }
}

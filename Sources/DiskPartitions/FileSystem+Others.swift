internal import DiskStorage

/// The container superblock of APFS, in block 0 (Apple File System Reference, "nx_superblock_t"), least significant
/// byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 24 | 2 | o_type, 1: a container superblock |
/// | 32 | 4 | nx_magic, `NXSB` |
/// | 36 | 4 | nx_block_size |
/// | 72 | 16 | nx_uuid |
struct APFSContainer {
    let uuid: DiskUUID

    static let size = 88

    init?(parsing fields: FieldReader) throws(DiskError) {
        let blockSize: UInt32 = try fields.littleEndian(at: 36)
        guard fields.matches("NXSB", at: 32), try fields.littleEndian(at: 24, as: UInt16.self) == 1,
            blockSize.isPowerOfTwo, (4096...65_536).contains(blockSize)
        else { return nil }
        uuid = try DiskUUID(bigEndian: try fields.bytes(at: 72, count: 16))
    }
}

/// The volume header of HFS Plus, at byte 1024 (Apple's Technical Note 1150), most significant byte first; in its place
/// may be the master directory block of HFS, round an HFS Plus volume or not.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 2 | signature, `H+`, `HX`, or of HFS `BD` |
/// | 2 | 2 | version, 4 of `H+`, 5 of `HX` |
/// | 124 | 2 | of HFS: drEmbedSigWord, `H+` |
struct HFSHeader {
    let kind: FileSystemKind

    static let size = 162

    init?(parsing fields: FieldReader) throws(DiskError) {
        let version: UInt16 = try fields.bigEndian(at: 2)
        switch try fields.bigEndian(at: 0, as: UInt16.self) {
        case 0x482b where version == 4, 0x4858 where version == 5: kind = .hfsplus
        case 0x4244: kind = fields.matches("H+", at: 124) ? .hfsplus : .hfs
        default: return nil
        }
    }
}

/// A volume descriptor of ISO 9660, of which the first is at byte 32768 (ECMA-119, 8.4).
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 1 | type, 1: primary |
/// | 1 | 5 | standard identifier, `CD001` |
/// | 40 | 32 | volume identifier |
struct ISOVolumeDescriptor {
    let isPrimary: Bool
    let label: String?

    static let size = 2048

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard fields.matches("CD001", at: 1) else { return nil }
        isPrimary = try fields.byte(at: 0) == 1
        label = DiskText.padded(try fields.bytes(at: 40, count: 32))
    }
}

extension Probe {
    func apfs() throws(DiskError) -> FileSystem? {
        try structure(at: 0, count: APFSContainer.size) { (fields) throws(DiskError) in
            try APFSContainer(parsing: fields)
        }
        .map { FileSystem(.apfs, uuid: $0.uuid.text) }
    }

    func hfs() throws(DiskError) -> FileSystem? {
        try structure(at: 1024, count: HFSHeader.size) { (fields) throws(DiskError) in
            try HFSHeader(parsing: fields)
        }
        .map { FileSystem($0.kind) }
    }

    func iso9660() throws(DiskError) -> FileSystem? {
        try structure(at: 32_768, count: ISOVolumeDescriptor.size) { (fields) throws(DiskError) in
            try ISOVolumeDescriptor(parsing: fields)
        }
        .map { FileSystem(.iso9660, label: $0.isPrimary ? $0.label : nil) }
    }
}

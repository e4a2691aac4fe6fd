internal import DiskStorage

/// The superblock of ext2, ext3 and ext4, at byte 1024 (Linux, Documentation/filesystems/ext4/super.rst), least
/// significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 56 | 2 | s_magic, 0xef53 |
/// | 92 | 4 | s_feature_compat |
/// | 96 | 4 | s_feature_incompat |
/// | 100 | 4 | s_feature_ro_compat |
/// | 104 | 16 | s_uuid |
/// | 120 | 16 | s_volume_name |
struct ExtSuperblock {
    let kind: FileSystemKind
    let uuid: DiskUUID
    let label: String?

    static let size = 136

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard try fields.littleEndian(at: 56, as: UInt16.self) == 0xef53 else { return nil }
        let compatible: UInt32 = try fields.littleEndian(at: 92)
        let incompatible: UInt32 = try fields.littleEndian(at: 96)
        let readOnlyCompatible: UInt32 = try fields.littleEndian(at: 100)
        // The journal of another file system, alone on a device (INCOMPAT_JOURNAL_DEV).
        guard incompatible & 0x8 == 0 else { return nil }
        let hasJournal = compatible & 0x4 != 0
        // What ext3 knows: FILETYPE, RECOVER and META_BG, SPARSE_SUPER, LARGE_FILE and BTREE_DIR.
        let isOld = incompatible & ~0x16 == 0 && readOnlyCompatible & ~0x7 == 0
        kind = !isOld ? .ext4 : hasJournal ? .ext3 : .ext2
        uuid = try DiskUUID(bigEndian: try fields.bytes(at: 104, count: 16))
        label = DiskText.utf8(try fields.bytes(at: 120, count: 16))
    }
}

/// The superblock of XFS, at byte 0 (XFS Algorithms & Data Structures, chapter 13), most significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | sb_magicnum, `XFSB` |
/// | 4 | 4 | sb_blocksize |
/// | 32 | 16 | sb_uuid |
/// | 108 | 12 | sb_fname |
struct XFSSuperblock {
    let uuid: DiskUUID
    let label: String?

    static let size = 120

    init?(parsing fields: FieldReader) throws(DiskError) {
        let blockSize: UInt32 = try fields.bigEndian(at: 4)
        guard fields.matches("XFSB", at: 0), blockSize.isPowerOfTwo, (512...65_536).contains(blockSize) else {
            return nil
        }
        uuid = try DiskUUID(bigEndian: try fields.bytes(at: 32, count: 16))
        label = DiskText.utf8(try fields.bytes(at: 108, count: 12))
    }
}

/// The superblock of btrfs, at byte 65536 (btrfs' on-disk format, "Superblock").
///
/// | offset | size | name |
/// |---|---|---|
/// | 32 | 16 | UUID |
/// | 64 | 8 | magic, `_BHRfS_M` |
/// | 299 | 256 | label |
struct BtrfsSuperblock {
    let uuid: DiskUUID
    let label: String?

    static let size = 555

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard fields.matches("_BHRfS_M", at: 64) else { return nil }
        uuid = try DiskUUID(bigEndian: try fields.bytes(at: 32, count: 16))
        label = DiskText.utf8(try fields.bytes(at: 299, count: 256))
    }
}

/// The superblock of F2FS, at byte 1024 (Linux, include/linux/f2fs_fs.h), least significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | magic, 0xf2f52010 |
/// | 108 | 16 | uuid |
/// | 124 | 1024 | volume_name, UTF-16 |
struct F2FSSuperblock {
    let uuid: DiskUUID
    let label: String?

    static let size = 1148

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard try fields.littleEndian(at: 0, as: UInt32.self) == 0xf2f5_2010 else { return nil }
        uuid = try DiskUUID(bigEndian: try fields.bytes(at: 108, count: 16))
        label = DiskText.utf16(try fields.bytes(at: 124, count: 1024))
    }
}

/// The superblock of SquashFS, at byte 0 (Linux, fs/squashfs/squashfs_fs.h), least significant byte first since 4.0.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | magic, `hsqs` |
/// | 28 | 2 | major version |
/// | 30 | 2 | minor version |
struct SquashFSSuperblock {
    let version: String

    static let size = 96

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard fields.matches("hsqs", at: 0) else { return nil }
        let major: UInt16 = try fields.littleEndian(at: 28)
        let minor: UInt16 = try fields.littleEndian(at: 30)
        version = "\(major).\(minor)"
    }
}

/// The header of a Linux swap area: it is a page, and the signature its last ten bytes (Linux, include/linux/swap.h).
///
/// | offset | size | name |
/// |---|---|---|
/// | 1024 | 4 | version, 1 |
/// | 1036 | 16 | UUID |
/// | 1052 | 16 | label |
struct SwapHeader {
    let uuid: DiskUUID
    let label: String?

    static let size = 1068
    /// Sizes of pages on the machines that Linux runs on.
    static let pageSizes: [UInt64] = [4096, 8192, 16_384, 32_768, 65_536]
    /// What stands in the signature's place while a system sleeps (kernel and user-space suspend).
    static let suspended: [StaticString] = ["S1SUSPEND", "S2SUSPEND", "ULSUSPEND", "LINHIB0001"]

    init(parsing fields: FieldReader) throws(DiskError) {
        // Version 0, whose signature is another one, has neither.
        uuid = try DiskUUID(bigEndian: try fields.bytes(at: 1036, count: 16))
        label = DiskText.utf8(try fields.bytes(at: 1052, count: 16))
    }
}

extension Probe {
    func ext() throws(DiskError) -> FileSystem? {
        try structure(at: 1024, count: ExtSuperblock.size) { (fields) throws(DiskError) in
            try ExtSuperblock(parsing: fields)
        }
        .map { FileSystem($0.kind, label: $0.label, uuid: $0.uuid.text) }
    }

    func xfs() throws(DiskError) -> FileSystem? {
        try structure(at: 0, count: XFSSuperblock.size) { (fields) throws(DiskError) in
            try XFSSuperblock(parsing: fields)
        }
        .map { FileSystem(.xfs, label: $0.label, uuid: $0.uuid.text) }
    }

    func btrfs() throws(DiskError) -> FileSystem? {
        try structure(at: 65_536, count: BtrfsSuperblock.size) { (fields) throws(DiskError) in
            try BtrfsSuperblock(parsing: fields)
        }
        .map { FileSystem(.btrfs, label: $0.label, uuid: $0.uuid.text) }
    }

    func f2fs() throws(DiskError) -> FileSystem? {
        try structure(at: 1024, count: F2FSSuperblock.size) { (fields) throws(DiskError) in
            try F2FSSuperblock(parsing: fields)
        }
        .map { FileSystem(.f2fs, label: $0.label, uuid: $0.uuid.text) }
    }

    func squashfs() throws(DiskError) -> FileSystem? {
        try structure(at: 0, count: SquashFSSuperblock.size) { (fields) throws(DiskError) in
            try SquashFSSuperblock(parsing: fields)
        }
        .map { FileSystem(.squashfs, version: $0.version) }
    }

    func swap() throws(DiskError) -> FileSystem? {
        for pageSize in SwapHeader.pageSizes {
            guard let signature = try fields(at: pageSize - 10, count: 10) else { return nil }
            if signature.matches("SWAP-SPACE", at: 0) { return FileSystem(.swap, version: "0") }
            let isSuspended = SwapHeader.suspended.contains { signature.matches($0, at: 0) }
            guard isSuspended || signature.matches("SWAPSPACE2", at: 0) else { continue }
            let header = try structure(at: 0, count: SwapHeader.size) { (fields) throws(DiskError) in
                try SwapHeader(parsing: fields)
            }
            return FileSystem(
                isSuspended ? .swapSuspended : .swap, version: "1", label: header?.label, uuid: header?.uuid.text)
        }
        return nil
    }
}

extension DiskUUID {
    /// Nil if it is none.
    var text: String? { isNull ? nil : description }
}

internal import DiskStorage

/// The superblock of a member of a Linux software RAID, metadata version 1 (Linux, include/uapi/linux/raid/md_p.h),
/// least significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | magic, 0xa92b4efc |
/// | 4 | 4 | major_version, 1 |
/// | 16 | 16 | set_uuid |
/// | 32 | 32 | set_name |
/// | 144 | 8 | super_offset: the sector of 512 bytes that this superblock is in |
struct RAIDSuperblock {
    let uuid: DiskUUID
    let label: String?
    let superblockSector: UInt64

    static let size = 256

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard try fields.littleEndian(at: 0, as: UInt32.self) == 0xa92b_4efc,
            try fields.littleEndian(at: 4, as: UInt32.self) == 1
        else { return nil }
        uuid = try DiskUUID(bigEndian: try fields.bytes(at: 16, count: 16))
        label = DiskText.utf8(try fields.bytes(at: 32, count: 32))
        superblockSector = try fields.littleEndian(at: 144)
    }
}

/// The superblock of metadata version 0.90 (same source), in the byte order of the machine that wrote it.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | md_magic, 0xa92b4efc |
/// | 4 | 4 | major_version, 0 |
/// | 8 | 4 | minor_version, 90 |
/// | 20 | 4 | set_uuid0 |
/// | 52 | 12 | set_uuid1 to set_uuid3 |
struct OldRAIDSuperblock {
    let uuid: DiskUUID

    static let size = 64
    /// It lies in the last whole 64 KiB.
    static let alignment: UInt64 = 64 << 10

    init?(parsing fields: FieldReader) throws(DiskError) {
        let magic: UInt32 = try fields.littleEndian(at: 0)
        let isLittleEndian = magic == 0xa92b_4efc
        guard isLittleEndian || magic.byteSwapped == 0xa92b_4efc else { return nil }
        let major: UInt32 = try fields.littleEndian(at: 4)
        let minor: UInt32 = try fields.littleEndian(at: 8)
        guard major == 0, (isLittleEndian ? minor : minor.byteSwapped) == 90 else { return nil }
        var bytes: [UInt8] = []
        for offset in [20, 52, 56, 60] {
            let word = try fields.bytes(at: offset, count: 4)
            bytes += isLittleEndian ? word.reversed() : word
        }
        uuid = try DiskUUID(bigEndian: bytes)
    }
}

/// The header of LUKS 1 and 2 (LUKS2 On-Disk Format Specification, 2.1; LUKS On-Disk Format Specification 1.2.3,
/// figure 1), most significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 6 | magic, `LUKS`, 0xba, 0xbe |
/// | 6 | 2 | version |
/// | 24 | 48 | label, of version 2 |
/// | 168 | 40 | uuid, as text |
struct LUKSHeader {
    let version: UInt16
    let label: String?
    let uuid: String?

    static let size = 208

    init?(parsing fields: FieldReader) throws(DiskError) {
        version = try fields.bigEndian(at: 6)
        guard fields.matches(Array("LUKS".utf8) + [0xba, 0xbe], at: 0), (1...2).contains(version) else { return nil }
        label = version == 2 ? DiskText.utf8(try fields.bytes(at: 24, count: 48)) : nil
        uuid = DiskText.utf8(try fields.bytes(at: 168, count: 40))
    }
}

/// The label of an LVM physical volume, in one of the first four sectors of 512 bytes (LVM2, lib/label/label.h and
/// lib/format_text/layout.h), least significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | id, `LABELONE` |
/// | 8 | 8 | sector, the number of this sector |
/// | 20 | 4 | offset of the volume's header, from here |
/// | 24 | 8 | type, `LVM2 001` |
/// | offset | 32 | pv_uuid, as text |
struct LVMLabel {
    let sector: UInt64
    let uuid: String?

    static let size = 512

    init?(parsing fields: FieldReader) throws(DiskError) {
        guard fields.matches("LABELONE", at: 0), fields.matches("LVM2 001", at: 24) else { return nil }
        sector = try fields.littleEndian(at: 8)
        let offset = Int(try fields.littleEndian(at: 20, as: UInt32.self))
        guard let bytes = try? fields.bytes(at: offset, count: 32) else {
            uuid = nil
            return
        }
        // Printed in groups of these sizes.
        var groups: [String] = []
        var rest = bytes[...]
        for count in [6, 4, 4, 4, 4, 4, 6] {
            groups.append(DiskText.utf8(rest.prefix(count)) ?? "")
            rest = rest.dropFirst(count)
        }
        uuid = groups.joined(separator: "-")
    }
}

extension Probe {
    func linuxRAID() throws(DiskError) -> FileSystem? {
        // 1.1 at the front, 1.2 behind 4 KiB, 1.0 in the last 8 KiB or some more, at 4 KiB.
        var places: [(version: String, position: UInt64)] = [("1.1", 0), ("1.2", 4096)]
        if length >= 16 << 10 { places.append(("1.0", (length - (8 << 10)) & ~4095)) }
        for (version, position) in places {
            let found = try structure(at: position, count: RAIDSuperblock.size) { (fields) throws(DiskError) in
                try RAIDSuperblock(parsing: fields)
            }
            if let found, found.superblockSector == position / 512 {
                return FileSystem(.linuxRAID, version: version, label: found.label, uuid: found.uuid.text)
            }
        }
        guard length >= 2 * OldRAIDSuperblock.alignment else { return nil }
        let position = (length & ~(OldRAIDSuperblock.alignment - 1)) - OldRAIDSuperblock.alignment
        return try structure(at: position, count: OldRAIDSuperblock.size) { (fields) throws(DiskError) in
            try OldRAIDSuperblock(parsing: fields)
        }
        .map { FileSystem(.linuxRAID, version: "0.90", uuid: $0.uuid.text) }
    }

    func luks() throws(DiskError) -> FileSystem? {
        try structure(at: 0, count: LUKSHeader.size) { (fields) throws(DiskError) in try LUKSHeader(parsing: fields) }
            .map { FileSystem(.luks, version: "\($0.version)", label: $0.label, uuid: $0.uuid) }
    }

    func lvm2() throws(DiskError) -> FileSystem? {
        for sector in UInt64(0)..<4 {
            let found = try structure(at: sector * 512, count: LVMLabel.size) { (fields) throws(DiskError) in
                try LVMLabel(parsing: fields)
            }
            if let found, found.sector == sector { return FileSystem(.lvm2, uuid: found.uuid) }
        }
        return nil
    }

    /// A ZFS device begins with a label: at 16 KiB a list of names and values in XDR (its first byte is 1, its second
    /// the byte order), at 128 KiB the uberblocks, each 1 KiB or a multiple of that long (ZFS On-Disk Specification,
    /// 1.2 and 1.3). Their magic is 0x00bab10c, in either byte order.
    func zfs() throws(DiskError) -> FileSystem? {
        guard let list = try fields(at: 16 << 10, count: 4), list.matches([1, 1, 0, 0]) || list.matches([1, 0, 0, 0]),
            let blocks = try fields(at: 128 << 10, count: 128 << 10)
        else { return nil }
        for offset in stride(from: 0, to: blocks.count, by: 1 << 10) {
            let magic: UInt64 = try blocks.littleEndian(at: offset)
            if magic == 0xbab10c || magic.byteSwapped == 0xbab10c { return FileSystem(.zfs) }
        }
        return nil
    }
}

extension FieldReader {
    fileprivate func matches(_ bytes: [UInt8]) -> Bool { matches(bytes, at: 0) }
}

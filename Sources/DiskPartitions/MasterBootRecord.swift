internal import DiskStorage

/// A master boot record, or an extended boot record in the chain of logical partitions.
///
/// No standard describes it; UEFI 2.10, table 5-1 ("Legacy MBR") has the layout that all systems share.
///
/// | offset | size | name | |
/// |---|---|---|---|
/// | 0 | 440 | boot code | |
/// | 440 | 4 | disk signature | 5.2.1; of the first sector only |
/// | 446 | 4 × 16 | partition records | ``Entry`` |
/// | 510 | 2 | signature, 0xaa55 | 5.2.1 |
struct MasterBootRecord {
    let diskSignature: UInt32
    let entries: [Entry]

    /// A partition record (UEFI 2.10, table 5-2). The cylinders, heads and sectors in it say nothing on disks of today.
    ///
    /// | offset | size | name |
    /// |---|---|---|
    /// | 0 | 1 | boot indicator: 0x80, or 0 |
    /// | 4 | 1 | type |
    /// | 8 | 4 | first sector; in extended boot records relative to another one |
    /// | 12 | 4 | number of sectors |
    struct Entry {
        let bootIndicator: UInt8
        let type: UInt8
        let start: UInt64
        let count: UInt64

        init(parsing fields: FieldReader, at offset: Int) throws(DiskError) {
            bootIndicator = try fields.byte(at: offset)
            type = try fields.byte(at: offset + 4)
            start = UInt64(try fields.littleEndian(at: offset + 8, as: UInt32.self))
            count = UInt64(try fields.littleEndian(at: offset + 12, as: UInt32.self))
        }

        var isUsed: Bool { type != 0 && count > 0 }
        /// DOS's, Windows' and Linux' types of a partition that holds logical ones.
        var isExtended: Bool { isUsed && [0x05, 0x0f, 0x85].contains(type) }
        /// Whether it is a partition and not a container of others.
        var isData: Bool { isUsed && !isExtended }
        /// The first sector behind it.
        var end: UInt64 { start + count }
    }

    /// Nil if the signature is missing.
    init?(parsing fields: FieldReader) throws(DiskError) {
        guard try fields.littleEndian(at: 510, as: UInt16.self) == 0xaa55 else { return nil }
        diskSignature = try fields.littleEndian(at: 440)
        var entries: [Entry] = []
        for offset in stride(from: 446, to: 510, by: 16) { entries.append(try Entry(parsing: fields, at: offset)) }
        self.entries = entries
    }

    /// The record in the first 512 bytes from `offset` on; nil if there is none, or the source ends before.
    init?(reading source: some SectorSource, at offset: UInt64) throws(DiskError) {
        guard let fields = try source.fields(at: offset, count: 512) else { return nil }
        try self.init(parsing: fields)
    }

    /// Whether the boot indicators have the values that they may have: what stands there in other boot sectors is code
    /// or text.
    var isPlausible: Bool { entries.allSatisfy { $0.bootIndicator & 0x7f == 0 } }
    /// Whether it announces a GUID partition table (UEFI 2.10, 5.2.3), alone or beside partitions of its own.
    var isProtective: Bool { entries.contains { $0.type == 0xee && $0.count > 0 } }
    var isEmpty: Bool { !entries.contains { $0.isUsed } }
}

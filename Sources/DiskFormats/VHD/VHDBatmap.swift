internal import DiskStorage

/// XenServer's map of the blocks that are held as a whole, whose sector bitmaps need not be looked at. It follows the
/// block allocation table, and is not part of Microsoft's format. Here it is neither read nor written; but it must not
/// be overwritten, nor become wrong: see ``VHDImage/keepsBlocks``.
///
/// As XenServer's `libvhd` lays it out; big endian:
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | cookie: `tdbatmap` |
/// | 8 | 8 | batmap offset: in bytes |
/// | 16 | 4 | batmap size: in sectors |
struct VHDBatmap {
    /// Where the map ends in the file.
    let end: UInt64

    /// Looks for it; nil if the image has none.
    init?(_ structure: VHDStructure, _ storage: any Storage) throws(DiskError) {
        guard let place = structure.tableEnd.alignedUp(to: 512) else { return nil }
        let bytes = try storage.availableBytes(at: place, count: 24, for: .header)
        let fields = FieldReader(bytes)
        guard bytes.count == 24, fields.matches("tdbatmap", at: 0) else { return nil }
        let offset: UInt64 = try fields.bigEndian(at: 8)
        let sectors: UInt32 = try fields.bigEndian(at: 16)
        let (mapEnd, overflow) = offset.addingReportingOverflow(UInt64(sectors) * 512)
        // Something that cannot be is not believed beyond its header.
        end = overflow || mapEnd > structure.fileLength ? place + 512 : max(place + 512, mapEnd)
    }
}

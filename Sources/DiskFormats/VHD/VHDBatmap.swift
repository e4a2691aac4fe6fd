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
    /// Where its header lies.
    let headerOffset: UInt64
    /// The 512 bytes of its header.
    let headerBytes: [UInt8]
    /// Where the map lies; empty if it cannot be.
    let map: Range<UInt64>

    /// Looks for it; nil if the image has none.
    init?(_ structure: VHDStructure, _ storage: any Storage) throws(DiskError) {
        guard let place = structure.tableEnd.alignedUp(to: 512) else { return nil }
        headerBytes = try storage.availableBytes(at: place, count: 512, for: .header)
        let fields = FieldReader(headerBytes)
        guard headerBytes.count == 512, fields.matches("tdbatmap", at: 0) else { return nil }
        let offset: UInt64 = try fields.bigEndian(at: 8)
        let sectors: UInt32 = try fields.bigEndian(at: 16)
        let (mapEnd, overflow) = offset.addingReportingOverflow(UInt64(sectors) * 512)
        // Something that cannot be is not believed beyond its header.
        let isPossible = !overflow && mapEnd <= structure.fileLength
        headerOffset = place
        map = isPossible ? offset..<mapEnd : 0..<0
        end = isPossible ? max(place + 512, mapEnd) : place + 512
    }

    /// Header and map for a table of `count` blocks that ends, in whole sectors, at `offset`: the new blocks are none
    /// that are known to be held as a whole. At byte 24 the header has its version, at 28 the ones' complement of the
    /// sum of the map's bytes.
    func moved(to offset: UInt64, count: UInt64, _ storage: any Storage) throws(DiskError) -> [UInt8] {
        let sectors = max(count.dividedRoundingUp(by: 8 * 512), (map.upperBound - map.lowerBound) / 512)
        var bits = FieldWriter(count: Int(sectors) * 512)
        bits.bytes(
            try storage.bytes(
                at: map.lowerBound, count: Int(map.upperBound - map.lowerBound), for: .header, "the batmap"), at: 0)
        var header = FieldWriter(headerBytes)
        header.bigEndian(offset + 512, at: 8)
        header.bigEndian(UInt32(sectors), at: 16)
        header.bigEndian(~bits.bytes.reduce(0 as UInt32) { $0 &+ UInt32($1) }, at: 28)
        return header.bytes + bits.bytes
    }
}

internal import DiskImage
internal import DiskStorage

/// An open dynamic or differencing VHD.
///
/// It needs no unclean mark: what points somewhere is written after what it points to, and nothing that an entry on the
/// disk may point to is used again before that entry is gone. So whatever a power cut leaves is sound; at worst there
/// is space that nothing points to.
// Sendable: what changes is in cells and behind locks of its own.
@safe
final class VHDImage: RelocatingBackend, CompactableBackend, @unchecked Sendable {
    let format = "vhd"
    let virtualSize: UInt64
    let blockSize: UInt64
    let sectorSize: UInt32 = 512
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    /// What the headers say; like all that follows from it, it changes only while nobody uses the image.
    private(set) var structure: VHDStructure
    private(set) var isDifferencing: Bool
    let tables: TableSet
    let table: Table
    let bitmap: SectorBitmap
    /// Where the block allocation table lies.
    let tableOffset: UInt64
    /// The bytes of a sector bitmap in the file, and how many bits of it count.
    let bitmapSize: UInt64
    let sectorsPerBlock: UInt64
    /// log2 of a block's bytes.
    let shift: UInt64
    private(set) var places: VHDBlockPlaces
    /// Where blocks end: those of an image that is being written to, as far as space for them was taken.
    let end: FileEndCell
    let fileEnd: FileEnd
    /// What is known of the blocks' sector bitmaps: ``VHDBitmapState``. Nil where there are too many blocks, or where
    /// bitmaps mean nothing: in dynamic images for who only reads.
    let marks: BlockMarks?
    /// The file, if it is open for writing.
    let file: VHDFile?
    /// The way of blocks to the front, while the image is compacted.
    let mover = Locked(BlockSlots())
    /// Whether blocks of a differencing image are never given up: XenServer's batmap says of them, by number, that they
    /// are held as a whole.
    private(set) var keepsBlocks: Bool
    /// By what rule the disk's size was asked to be found.
    let askedRule: VHDSizeRule?
    /// Whether the disk has got another size, so that nothing but closing the image is left to do.
    var isResized = false

    init(_ structure: VHDStructure, _ request: OpenRequest) throws(DiskError) {
        guard let header = structure.header else { preconditionFailure("a fixed image has no table") }
        self.structure = structure
        askedRule = try VHDSizeRule.asked(request)
        virtualSize = structure.virtualSize
        blockSize = header.blockSize
        bitmapSize = structure.bitmapSize
        sectorsPerBlock = header.blockSize / 512
        shift = UInt64(header.blockSize.trailingZeroBitCount)
        isDifferencing = structure.isDifferencing
        isWritable = request.isWritable
        files = [request.path]
        let handle = StorageHandle(request.storage)
        storages = [handle]
        tables = TableSet(cache: request.cache)
        table = tables.table(in: request.storage)
        bitmap = SectorBitmap(table: table, order: .mostSignificantFirst, sectorShift: 9)
        tableOffset = header.tableOffset
        places = VHDBlockPlaces(structure)
        let dataEnd = structure.endFooterOffset ?? structure.fileLength
        marks = isDifferencing || request.isWritable ? BlockMarks(count: structure.blockCount) : nil
        guard request.isWritable else {
            end = FileEndCell(dataEnd)
            (file, keepsBlocks) = (nil, true)
            fileEnd = end.reader
            return
        }
        if let damage = structure.damages.first(where: { $0.part == .dynamicHeader }) {
            throw DiskError(.needsRepair, damage.message + ": run 'vdimg check --repair' first")
        }
        let scan = try VHDTableScan(structure, request.storage, limit: dataEnd)
        let room = try Self.room(scan, structure, request.storage)
        end = FileEndCell(room.lowerBound)
        fileEnd = end.reader
        let batmap = isDifferencing ? try VHDBatmap(structure, request.storage) : nil
        keepsBlocks = batmap != nil
        file = VHDFile(
            handle: handle, structure: structure, end: end, footerOffset: room.upperBound,
            allocatedBlocks: scan.allocatedBlocks,
            isFooterAhead: structure.endFooterOffset != nil && room.lowerBound < room.upperBound)
    }

    /// Where new blocks may lie before the footer has to move: from the end of what is in use to the footer.
    private static func room(
        _ scan: VHDTableScan, _ structure: VHDStructure, _ storage: any Storage
    ) throws(DiskError) -> Range<UInt64> {
        let length = structure.fileLength
        if storage.traits.hasFixedLength {
            let footer = structure.endFooterOffset ?? length & ~511
            return scan.end..<max(scan.end, footer)
        }
        guard let footer = structure.endFooterOffset else {
            // A damaged footer is replaced where it is, a missing one goes behind everything.
            if let damaged = structure.damagedFooterOffset, damaged % 512 == 0, damaged >= scan.end {
                return damaged..<damaged
            }
            guard let place = max(scan.end, length).alignedUp(to: 512) else {
                throw DiskError(.invalidImage, "the file is too long for a footer", offset: length)
            }
            return place..<place
        }
        // What lies between the last block and the footer may be anything, except where it is a hole of the file, as a
        // session leaves it that was cut off.
        var used = scan.end
        while let data = try storage.nextData(from: used), data.lowerBound < footer {
            // The last page of the file is data because of the footer.
            if data.upperBound > footer, data.lowerBound >= footer & ~4095 { break }
            used = min(data.upperBound, footer)
        }
        return used..<max(used, footer)
    }

    /// Takes over what the headers in the file say now.
    func adoptFile() throws(DiskError) {
        let storage = storages[0].storage
        structure = try VHDStructure(storage, rule: askedRule, describesDamage: false)
        isDifferencing = structure.isDifferencing
        places = VHDBlockPlaces(structure)
        let batmap = isDifferencing ? try VHDBatmap(structure, storage) : nil
        keepsBlocks = batmap != nil
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        preconditionFailure("a VHD has no encoded extents")
    }

    var identity: ImageIdentity { structure.identity }
    var parentLink: ParentLink? { structure.parentLink }

    func checkLink(to parent: any ImageBackend) throws(DiskError) { try structure.checkLink(to: parent) }

    var properties: [ImageProperty] { structure.properties }
}

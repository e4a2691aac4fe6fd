internal import DiskImage
internal import DiskStorage

/// An open VDI image.
///
/// It has no unclean mark, and needs none: an entry is written after what it leads to is durable, and no place that an
/// entry on the disk may lead to is used again. Other programs do not keep to that, so that an image is looked through
/// when it is opened for writing; one whose entries cannot be right is not written to.
// Sendable: what changes is behind locks and in the cell.
@safe
final class VDIImage: RelocatingBackend, CompactableBackend, @unchecked Sendable {
    let format = "vdi"
    let header: VDIHeader
    let virtualSize: UInt64
    let blockSize: UInt64
    let sectorSize: UInt32 = 512
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    let tables: TableSet
    let table: Table
    /// Where the file ends, or will end after the next flush.
    let end: FileEndCell
    let space: VDISpace
    /// The header as it is on the disk now, but for the count of allocated blocks.
    let stored: Locked<VDIHeader>
    /// Whether what children compare stays as it is.
    let keepsIdentity: Bool
    /// Whether the disk has another size since it was opened: nothing is written any more then.
    let isResized = Locked(false)
    /// Blocks that lie so far back that they should move: the last one is to move first.
    let movers = Locked<[VDIMover]>([])
    /// What is dropped while the image is compacted.
    let releasedPlaces = ReleasedPlaces()
    /// What is wrong with the file as a whole, for people; only where information alone is asked for.
    let damage: String?
    private let fileEnd: FileEnd
    private let shift: UInt64
    private let mapOffset: UInt64
    /// Where the data of the file's first block lies.
    private let dataOffset: UInt64
    private let stride: UInt64

    init(_ request: OpenRequest) throws(DiskError) {
        let storage = request.storage
        let header = try VDIHeader(
            parsing: storage.availableBytes(at: 0, count: VDIHeader.byteCount, for: .header))
        self.header = header
        virtualSize = header.virtualSize
        blockSize = header.blockSize
        isWritable = request.isWritable
        storages = [StorageHandle(storage)]
        files = [request.path]
        tables = TableSet(cache: request.cache)
        // Version 0.x has the first block begin where the map ends, inside a sector.
        table = tables.table(in: storage, endingAt: header.mapEnd)
        shift = UInt64(header.blockSize.trailingZeroBitCount)
        mapOffset = header.mapOffset
        dataOffset = header.blocksOffset + header.blockExtra
        stride = header.stride
        let length = try storage.length()
        damage = try Self.damage(header, length, request.mode)
        end = FileEndCell(length)
        fileEnd = end.reader
        stored = Locked(header)
        keepsIdentity = request.keepsIdentity
        space = VDISpace(
            header, handle: storages[0], table: table, fileEnd: end, places: VDIMapScan.places(header, length).count)
        if request.isWritable, !request.skipsConsistencyChecks { try lookThrough(length) }
    }

    /// What makes the image useless, which is an error unless information alone is asked for.
    private static func damage(_ header: VDIHeader, _ length: UInt64, _ mode: OpenMode) throws(DiskError) -> String? {
        var damage: DiskError?
        if length < header.mapEnd {
            damage = DiskError(
                .invalidImage,
                "the file is cut short: it has \(length) bytes, and the block map ends at \(header.mapEnd)",
                offset: length)
        } else if header.isChild, header.parentUUID.isNull {
            damage = DiskError(
                .invalidImage, "the image is \(header.type.name), and names no parent",
                offset: header.isVersion0 ? 404 : 424)
        }
        guard let damage else { return nil }
        guard mode == .information else { throw damage }
        return damage.message
    }

    /// Finds the places that nothing leads to, and refuses a map that cannot be right.
    private func lookThrough(_ length: UInt64) throws(DiskError) {
        var scan = VDIMapScan(header, table: table, length: length)
        try scan.run { (fault, blocks, entry) throws(DiskError) in
            let what =
                switch fault {
                case .outside: "which the file does not have"
                case .cutShort: "of which the file holds a part"
                case .duplicate: "where another one lies"
                }
            throw DiskError(
                .needsRepair,
                "block \(blocks.lowerBound) is said to lie in block \(entry) of the file, \(what): "
                    + "run 'vdimg check --repair' before writing to it", offset: entryOffset(blocks.lowerBound))
        } onHole: { run in
            space.addFree(run)
        }
    }

    // MARK: - Translation

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let inBlock = position & (blockSize &- 1)
            var run = min(length &- done, blockSize &- inBlock)
            let place = mapOffset &+ (position >> shift) &* 4
            let entry = try table.entry32(at: place)
            let extent: Extent
            if entry >= VDIEntry.zero {
                if length &- done > 64 << shift {
                    run = try endOfRun(of: entry, position, offset &+ length) &- position
                }
                extent = Extent(entry == VDIEntry.free ? .absent : .zero, length: run)
            } else {
                let start = dataOffset &+ UInt64(entry) &* stride &+ inBlock
                guard start &+ run <= fileEnd.value else { throw outside(entry, place) }
                extent = Extent(.data, length: run, fileOffset: start)
            }
            guard batch.append(extent) else { return }
            done &+= run
        }
    }

    /// Where the run of blocks with the same entry ends in which `position` lies, up to `end`.
    func endOfRun(of entry: UInt32, _ position: UInt64, _ end: UInt64) throws(DiskError) -> UInt64 {
        let first = mapOffset + (position >> shift) * 4
        let last = mapOffset + end.dividedRoundingUp(by: blockSize) * 4
        let stop = try table.endOfRun(of: entry, in: first..<last)
        return min(end, ((stop - mapOffset) / 4) << shift)
    }

    @inline(never)
    private func outside(_ entry: UInt32, _ place: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "an entry leads to block \(entry) of the file, which has no such block, or a part of it: "
                + "'vdimg check' shows how many do", offset: place)
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        preconditionFailure("a VDI has no encoded extents")
    }

    /// Where the entry of a block stands.
    func entryOffset(_ block: UInt64) -> UInt64 { mapOffset + block * 4 }
}

internal import DiskImage
internal import DiskStorage

/// An open overlay.
///
/// It needs no unclean mark: an entry is written after what it points to is durable, and nothing that an entry on the
/// disk may point to is used again before that entry is gone. So whatever a power cut leaves is sound; at worst blocks
/// at the file's end are not pointed to.
// Sendable: what changes is behind the lock and in the cell.
@safe
final class OverlayImage: RelocatingBackend, CompactableBackend, @unchecked Sendable {
    let format = "overlay"
    let header: OverlayHeader
    /// What is recorded of the image below now.
    let parentRecord: Locked<OverlayHeader.Parent>
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    let sectorSize: UInt32 = 512
    let tables: TableSet
    let table: Table
    /// Where the file ends, or will end after the next flush.
    let end: FileEndCell
    private let fileEnd: FileEnd
    private let shift: UInt64
    private let space: Locked<Space>
    /// Places that nothing points to.
    let blocks: ReusableBlocks
    /// What is dropped while the overlay is compacted.
    let releasedPlaces = ReleasedPlaces()
    /// The way of blocks to the front then.
    let mover = BlockMover()

    private struct Space {
        /// The length that the file was last told to have.
        var length: UInt64
    }

    var virtualSize: UInt64 { header.virtualSize }
    var blockSize: UInt64 { header.blockSize }

    init(_ request: OpenRequest) throws(DiskError) {
        header = try OverlayHeader(request.storage, isWritable: request.isWritable)
        parentRecord = Locked(header.parent)
        isWritable = request.isWritable
        storages = [StorageHandle(request.storage)]
        files = [request.path]
        tables = TableSet(cache: request.cache)
        table = tables.table(in: request.storage)
        shift = header.blockShift
        let length = try request.storage.length()
        end = FileEndCell(max(length, header.dataOffset))
        fileEnd = end.reader
        blocks = ReusableBlocks(blockSize: header.blockSize)
        space = Locked(Space(length: length))
    }

    // MARK: - Translation

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let inBlock = position & (header.blockSize &- 1)
            var run = min(length &- done, header.blockSize &- inBlock)
            let place = OverlayHeader.tableOffset &+ (position >> shift) &* 4
            let entry = try table.entry32(at: place)
            let extent: Extent
            switch entry {
            case 0, 1:
                if length &- done > 64 << shift {
                    run = try endOfRun(of: entry, position, offset &+ length) &- position
                }
                extent = Extent(entry == 0 ? .absent : .zero, length: run)
            default:
                let block = UInt64(entry) << shift
                guard block >= header.dataOffset, block < fileEnd.value else { throw outside(entry, place) }
                extent = Extent(.data, length: run, fileOffset: block &+ inBlock)
            }
            guard batch.append(extent) else { return }
            done &+= run
        }
    }

    /// Where the run of blocks with the same entry ends in which `position` lies, up to `end`.
    private func endOfRun(of entry: UInt32, _ position: UInt64, _ end: UInt64) throws(DiskError) -> UInt64 {
        let first = OverlayHeader.tableOffset + (position >> shift) * 4
        let last = OverlayHeader.tableOffset + end.dividedRoundingUp(by: blockSize) * 4
        let stop = try table.endOfRun(of: entry, in: first..<last)
        return min(end, ((stop - OverlayHeader.tableOffset) / 4) << shift)
    }

    @inline(never)
    private func outside(_ entry: UInt32, _ place: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "an entry leads to block \(entry) of the file, which has no such block: 'vdimg check' shows how many do",
            offset: place)
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        preconditionFailure("an overlay has no encoded extents")
    }

    // MARK: - Writing

    func beginWriting() {}

    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        if tables.needsFlush { try flush() }
        let first = offset & ~(blockSize - 1)
        let wanted = (min(offset + length, virtualSize) - first).dividedRoundingUp(by: blockSize)
        let run = try take(wanted)
        return Reservation(
            offset: first, length: min(run.count << shift, virtualSize - first), storage: 0, fileOffset: run.offset,
            isZero: run.isZero)
    }

    private func take(_ count: UInt64) throws(DiskError) -> FreeBlocks.Run {
        try space.withLock { (space) throws(DiskError) in
            if let run = blocks.take(count) { return run }
            let limit = (UInt64(UInt32.max) + 1) << shift
            guard let start = end.value.alignedUp(to: blockSize), start < limit else {
                throw DiskError(.system, "the overlay is full", image: files[0], errno: 28)  // ENOSPC
            }
            let fitting = min(count, (limit - start) >> shift)
            end.value = start + fitting << shift
            return FreeBlocks.Run(offset: start, count: fitting, isZero: true)
        }
    }

    func commit(_ reservation: consuming Reservation) throws(DiskError) {
        let first = reservation.offset >> shift
        let block = reservation.fileOffset >> shift
        for number in 0..<reservation.length.dividedRoundingUp(by: blockSize) {
            try store(UInt32(truncatingIfNeeded: block + number), block: first + number)
        }
    }

    func abandon(_ reservation: consuming Reservation) {
        for number in 0..<reservation.length.dividedRoundingUp(by: blockSize) {
            let offset = reservation.fileOffset + number << shift
            blocks.putBack(offset)
        }
    }

    /// Stores an entry; if no page is free for it, after a flush.
    func store(_ entry: UInt32, block: UInt64) throws(DiskError) {
        while try !table.store32(entry, at: OverlayHeader.tableOffset + block * 4, .entry) { try flush() }
    }

    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        let wanted: UInt32 = kind == .zero ? 1 : 0
        var position = offset
        while position < offset + length {
            let entry = try table.entry32(at: OverlayHeader.tableOffset + (position >> shift) * 4)
            if entry == wanted {
                position = try endOfRun(of: wanted, position, offset + length)
                continue
            }
            if tables.needsFlush { try flush() }
            try store(wanted, block: position >> shift)
            if entry > 1 { try giveUp(UInt64(entry) << shift) }
            position = (position >> shift + 1) << shift
        }
        return true
    }

    /// Gives up a block whose entry was just removed: its space goes back to the file system, and to us after a flush.
    private func giveUp(_ block: UInt64) throws(DiskError) {
        guard block >= header.dataOffset, block < end.value else { return }
        let range = block..<min(block + blockSize, end.value)
        if releasedPlaces.add(range, in: storages[0]) { return blocks.giveUp(block, isZero: false) }
        try storages[0].discard(range, for: .guestData)
        blocks.giveUp(block)
    }

    // MARK: - Durability

    func flush() throws(DiskError) {
        try blocks.release { () throws(DiskError) in
            try tables.flush { () throws(DiskError) in
                try growFile()
                try storages[0].flushIfWritten()
            }
        }
    }

    /// Cuts the file off behind all that is in use; nothing is taken any more.
    func cut(at newEnd: UInt64) throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            guard newEnd < space.length else { return }
            blocks.removeAll()
            end.value = newEnd
            space.length = newEnd
            try storages[0].storage.setLength(newEnd)
            try storages[0].storage.flush()
        }
    }

    /// Makes the file long enough for all that was taken, before entries point there. Under the lock under which space
    /// is taken, so that nobody can have written behind the new length.
    private func growFile() throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            let wanted = end.value
            guard space.length < wanted else { return }
            if try storages[0].storage.length() < wanted { try storages[0].storage.setLength(wanted) }
            space.length = wanted
            storages[0].noteWrite()
        }
    }

    func close() throws(DiskError) { if isWritable { try flush() } }

    // MARK: - Identity

    var identity: ImageIdentity { ImageIdentity(uuid: header.uuid) }

    var parentLink: ParentLink? {
        let parent = parentRecord.withLock { $0 }
        return ParentLink(
            paths: parent.path.isEmpty ? [] : [parent.path], uuid: parent.identity.uuid, format: parent.format)
    }

    /// Whatever both sides have of UUID, modification UUID and content ID must agree; an image without any must have
    /// the size and the time of change that it had when the overlay was made.
    func checkLink(to parent: any ImageBackend) throws(DiskError) {
        let recorded = parentRecord.withLock { $0 }
        let found = parent.identity
        let name = parent.files.first ?? ""
        func require(_ holds: Bool, _ what: String) throws(DiskError) {
            if !holds {
                throw DiskError(
                    .brokenLink, "was made over \(recorded.path); \(name) is not it, or was changed since: \(what)")
            }
        }
        try require(
            parent.format == recorded.format, "its format is \(parent.format) instead of \(recorded.format)")
        try require(
            parent.virtualSize == recorded.size, "its disk has \(parent.virtualSize) bytes instead of \(recorded.size)")
        if let uuid = recorded.identity.uuid {
            try require(uuid == found.uuid, "its UUID is \(found.uuid?.description ?? "(none)") instead of \(uuid)")
        }
        if let uuid = recorded.identity.modificationUUID {
            try require(
                uuid == found.modificationUUID,
                "its modification UUID is \(found.modificationUUID?.description ?? "(none)") instead of \(uuid)")
        }
        if let content = recorded.identity.contentID {
            let other = found.contentID.map { String($0, radix: 16) } ?? "(none)"
            try require(
                content == found.contentID, "its content ID is \(other) instead of \(String(content, radix: 16))")
        }
        if let modified = recorded.modified, let now = try parent.modificationTime() {
            try require(
                modified == now,
                "it has another time of change (a copy keeps the time with 'cp --preserve=timestamps')")
        }
    }

    var properties: [ImageProperty] {
        let parent = parentRecord.withLock { $0 }
        var list = [
            ImageProperty("uuid", "UUID", header.uuid.description),
            ImageProperty("parent-name", "image below", parent.path),
            ImageProperty("parent-format", "its format", parent.format),
        ]
        if let uuid = parent.identity.uuid { list.append(ImageProperty("parent-uuid", "its UUID", uuid.description)) }
        if let content = parent.identity.contentID {
            list.append(ImageProperty("parent-content-id", "its content ID", String(content, radix: 16)))
        }
        return list
    }
}

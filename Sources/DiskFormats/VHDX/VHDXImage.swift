internal import DiskImage
internal import DiskStorage

/// An open VHDX.
// Sendable: what changes is in cells and behind locks of its own.
@safe
final class VHDXImage: RelocatingBackend, CompactableBackend, @unchecked Sendable {
    let format = "vhdx"
    let virtualSize: UInt64
    let blockSize: UInt64
    let sectorSize: UInt32
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    /// What headers and metadata say; like all that follows from it, it changes only while nobody uses the image.
    private(set) var structure: VHDXStructure
    private(set) var isDifferencing: Bool
    private(set) var tables: TableSet
    private(set) var table: Table
    private(set) var entries: VHDXBlockAllocationTable
    private(set) var bitmap: SectorBitmap
    private(set) var places: VHDXBlockPlaces
    /// Where blocks end: those of an image that is being written to, as far as space for them was taken.
    let end: FileEndCell
    let fileEnd: FileEnd
    /// The file, if it is open for writing.
    let file: VHDXFile?
    /// The way of blocks to the front, while the image is compacted.
    let mover = Locked(BlockSlots())
    /// Held while a block of the sector bitmap is made.
    let addingBitmap = Locked(false)
    private let cache: TableCache

    init(_ request: OpenRequest) throws(DiskError) {
        structure = try VHDXStructure(request.storage, forgivesLog: request.mode == .information)
        virtualSize = structure.metadata.virtualDiskSize
        blockSize = structure.metadata.blockSize
        sectorSize = structure.metadata.logicalSectorSize
        isDifferencing = structure.isDifferencing
        isWritable = request.isWritable
        files = [request.path]
        cache = request.cache
        entries = structure.table
        // A file that is cut short is found when it is opened, not where somebody reads what is missing.
        let scan =
            request.mode == .information
            ? nil
            : try VHDXTableScan(
                structure, structure.storage, fileLength: structure.fileLength, findsPlaces: request.isWritable)
        // Where the log is still to be replayed, it is in memory or, before the image is used, in the file.
        let storage = request.isWritable ? request.storage : structure.storage
        let handle = StorageHandle(storage)
        storages = [handle]
        places = VHDXBlockPlaces(structure, end: structure.fileLength)
        if let scan, request.isWritable {
            end = FileEndCell(scan.end)
            let file = VHDXFile(handle, structure, scan, end: end, keepsIdentity: request.keepsIdentity)
            tables = TableSet(cache: request.cache, journal: file.log)
            self.file = file
        } else {
            end = FileEndCell(structure.fileLength)
            tables = TableSet(cache: request.cache)
            file = nil
        }
        fileEnd = end.reader
        table = tables.table(in: storage)
        bitmap = SectorBitmap(table: table, order: .leastSignificantFirst, sectorShift: entries.sectorShift)
    }

    /// Takes over what the file says now, in which everything is durable.
    func adoptFile() throws(DiskError) {
        guard let file else { return }
        let storage = storages[0].storage
        structure = try VHDXStructure(storage, forgivesLog: true)
        isDifferencing = structure.isDifferencing
        entries = structure.table
        places = VHDXBlockPlaces(structure, end: end.value)
        // Another set: what the cache knows of the file may be old.
        tables = TableSet(cache: cache, journal: file.log)
        table = tables.table(in: storage)
        bitmap = SectorBitmap(table: table, order: .leastSignificantFirst, sectorShift: entries.sectorShift)
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        preconditionFailure("a VHDX has no encoded extents")
    }

    var identity: ImageIdentity {
        var identity = structure.identity
        if let file { identity.modificationUUID = file.dataWriteGUID }
        return identity
    }

    var parentLink: ParentLink? { structure.parentLink }

    func checkLink(to parent: any ImageBackend) throws(DiskError) { try structure.checkLink(to: parent) }

    var properties: [ImageProperty] { structure.properties }
}

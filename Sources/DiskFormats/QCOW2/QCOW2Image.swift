internal import DiskImage
internal import DiskStorage

/// An open QCOW2 image, or one of its internal snapshots.
// Sendable: what changes is behind the allocator's locks.
@safe
final class QCOW2Image: RelocatingBackend, CompactableBackend, @unchecked Sendable {
    let format = "qcow2"
    /// As it was when the image was opened, but for what names the backing file, the L1 table and the disk's size.
    var header: QCOW2Header
    var extensions: QCOW2HeaderExtensions
    /// The backing file's name as the image has it.
    var backingName: String?
    /// The internal snapshot that is shown; nil: the present state.
    let snapshot: QCOW2Snapshot?
    let virtualSize: UInt64
    let isWritable: Bool
    let sectorSize: UInt32 = 512
    /// The image's file and, where there is one, the external data file.
    let storages: [StorageHandle]
    let files: [String]
    let tables: TableSet
    let table: Table
    var map: QCOW2Map
    let end: FileEndCell
    /// Takes clusters; nil if the image is only read.
    let allocator: QCOW2Allocator?
    /// What is dropped while the image is compacted.
    let releasedPlaces = ReleasedPlaces()
    /// The way of clusters to the front then.
    let mover = BlockMover()
    /// Held while an L2 table is made.
    let addingTable = Locked(false)
    /// Whether the disk has got another size, so that nothing but closing the image is left to do.
    var isResized = false
    private let decompressed: DecompressedBlocks
    private let cache: TableCache

    var blockSize: UInt64 { header.clusterSize }
    /// Whether the external data file must be the disk also without this image.
    var keepsRawData: Bool { header.hasDataFile && header.autoclear.contains(.rawExternalData) }

    init(_ opened: QCOW2Opener, _ request: OpenRequest) throws(DiskError) {
        header = opened.header
        extensions = opened.extensions
        backingName = opened.backingName
        snapshot = opened.snapshot
        storages = opened.storages
        files = opened.files
        isWritable = request.isWritable
        end = opened.end
        cache = request.cache
        tables = TableSet(cache: request.cache)
        table = tables.table(in: request.storage)
        virtualSize = opened.snapshot?.diskSize ?? opened.header.size
        map = QCOW2Map(
            opened.header, table: table, l1Offset: opened.snapshot?.l1TableOffset ?? opened.header.l1TableOffset,
            l1Size: UInt64(opened.snapshot?.l1Size ?? opened.header.l1Size),
            // Nothing is shared where no snapshot can be.
            tellsSharedClusters: request.isWritable && !opened.header.hasDataFile, end: opened.end.reader)
        decompressed = DecompressedBlocks(blockSize: opened.header.clusterSize)
        allocator =
            request.isWritable
            ? try QCOW2Allocator(
                opened.header, handles: opened.storages, tables: tables, table: table, end: opened.end) : nil
    }

    /// An image whose writer put off its refcounts, and did not come to it, gets them before it is written to.
    func prepareForUse() throws(DiskError) {
        guard isWritable, header.incompatible.contains(.dirty) else { return }
        let report = try QCOW2Repair(self, file: files[0]).run(.refcounts)
        guard report.remaining(.repairable) + report.remaining(.loss) == 0 else {
            throw DiskError(
                .needsRepair, "was not closed by its last writer, and is damaged: run 'vdimg check --repair' first",
                image: files[0])
        }
    }

    // MARK: - Translation

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        try map.map(offset, length, into: &batch)
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        try decompressed.read(extent.fileOffset, skipping: Int(extent.skip), into: buffer) {
            (bytes) throws(DiskError) in
            try decompress(QCOW2CompressedCluster(extent.fileOffset, clusterBits: map.clusterBits), into: bytes)
        }
    }

    private func decompress(_ cluster: QCOW2CompressedCluster, into output: IOBuffer) throws(DiskError) {
        // What was written last may end with the file, before the end of its last sector.
        let input = try storages[0].storage.availableBytes(
            at: cluster.offset, count: Int(cluster.count), for: .guestData)
        do throws(DiskError) {
            try input.withIOBytes { (data) throws(DiskError) in
                switch header.compressionType {
                case .zstd: try Zstandard.decompress(data, into: output)
                case .deflate: try Deflate.inflateCluster(data, into: output)
                }
            }
        } catch {
            throw error.about(storages[0].storage.name).at(cluster.offset)
        }
    }

    // MARK: - Identity

    /// QCOW2 has no identity that a child could record; what a snapshot holds never changes, and has one.
    var identity: ImageIdentity { ImageIdentity(uuid: snapshot?.uuid) }

    var parentLink: ParentLink? {
        guard let backingName else { return nil }
        return ParentLink(
            paths: [QEMUFileName.path(backingName)],
            format: extensions.backingFormatName.map(QEMUFileName.format))
    }

    /// A backing file is what lies where the image says.
    func checkLink(to parent: any ImageBackend) {}
}

internal import DiskImage
internal import DiskStorage

/// An open QED image.
// Sendable: what changes is behind locks and the cell.
@safe
final class QEDImage: RelocatingBackend, CompactableBackend, @unchecked Sendable {
    let format = "qed"
    /// As it is in the file; see ``QEDFile/writeHeader(_:name:)``.
    var header: QEDHeader
    let virtualSize: UInt64
    let blockSize: UInt64
    let sectorSize: UInt32 = 512
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    let tableSet: TableSet
    let tables: QEDTables
    /// What writes need; nil in an image that was opened read-only.
    let file: QEDFile?
    /// The name of the backing file as the header has it.
    var backingFilename: String?
    /// What is wrong with the whole, in an image that was opened for information.
    private let damage: String?
    /// What is dropped while the image is compacted.
    let releasedPlaces = ReleasedPlaces()
    /// The way of clusters to the front then.
    let mover = BlockMover()
    /// Held while an L2 table is made.
    let addingTable = Locked(false)
    let end: FileEndCell
    private let fileLength: UInt64
    /// Whether the disk has got another size, so that nothing but closing the image is left to do.
    var isResized = false

    init(_ request: OpenRequest) throws(DiskError) {
        let storage = request.storage
        header = try QEDHeader(
            parsing: storage.bytes(at: 0, count: QEDHeader.byteCount, for: .header, "the header"))
        fileLength = try storage.length()
        // What comes after the last whole cluster belongs to nothing.
        let wholeLength = fileLength & ~(header.clusterSize - 1)
        var damage: String?
        do throws(DiskError) {
            try header.checkPlaces(end: min(wholeLength, TableSet.offsetLimit))
        } catch {
            // Who asks for information wants to hear of it.
            guard request.mode == .information else { throw error }
            damage = error.message
        }
        self.damage = damage
        backingFilename = try Self.backingFilename(header, storage)
        if let backingFilename, request.mode != .information {
            try QEMUFileName.check(backingFilename, image: request.path, request.companions)
        }
        var tableStorage = storage
        let isUnclean = header.features.contains(.needCheck)
        if isUnclean, request.mode == .readOnly, !request.skipsConsistencyChecks {
            var check = QEDCheck(header, storage, file: request.path, length: fileLength, isRepairing: false)
            try check.run()
            if !check.dropped.isEmpty { tableStorage = QEDRepairedTables(storage, clearing: check.dropped) }
        }
        tableSet = TableSet(cache: request.cache)
        end = FileEndCell(wholeLength)
        tables = QEDTables(
            header, tableSet.table(in: tableStorage), end: end.reader,
            forgivesOutside: isUnclean && request.mode == .readOnly)
        virtualSize = header.imageSize
        blockSize = header.clusterSize
        isWritable = request.isWritable
        let handle = StorageHandle(storage)
        storages = [handle]
        files = [request.path]
        file = request.isWritable ? QEDFile(handle, header, end: end, length: fileLength) : nil
    }

    private static func backingFilename(_ header: QEDHeader, _ storage: any Storage) throws(DiskError) -> String? {
        guard header.features.contains(.backingFile) else { return nil }
        let bytes = try storage.bytes(
            at: header.backingFilenameOffset, count: Int(header.backingFilenameSize), for: .header,
            "the backing file's name")
        let name = bytes.prefix { $0 != 0 }
        guard !name.isEmpty else {
            throw DiskError(
                .invalidImage, "the backing file's name is empty", offset: header.backingFilenameOffset)
        }
        return String(decoding: name, as: UTF8.self)
    }

    /// An image that its last writer did not close is looked through and repaired.
    func prepareForUse() throws(DiskError) {
        guard isWritable else { return }
        let isUnclean = header.features.contains(.needCheck)
        // New clusters come after whatever follows the last whole one; no entry may lead there already.
        if isUnclean || end.value < fileLength {
            var check = QEDCheck(
                header, storages[0].storage, file: files[0], length: fileLength, isRepairing: isUnclean)
            try check.run()
            guard check.report.remaining(.loss) == 0 else {
                throw DiskError(
                    .needsRepair,
                    "the file ends inside a cluster and is damaged (\(check.report.findings.first?.message ?? "")): "
                        + "run 'vdimg check --repair' first", image: files[0])
            }
        }
        guard let end = fileLength.alignedUp(to: blockSize) else {
            throw DiskError(.invalidImage, "the file is too long", image: files[0])
        }
        self.end.value = end
    }

    // MARK: - Translation

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        try tables.map(offset: offset, length: length, into: &batch)
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        preconditionFailure("a QED image has no encoded extents")
    }

    // MARK: - Identity

    /// QED stores nothing by which an image could be recognised.
    var identity: ImageIdentity { ImageIdentity() }

    var parentLink: ParentLink? {
        guard let backingFilename else { return nil }
        let isRaw = header.features.contains(.backingFormatNoProbe)
        return ParentLink(
            paths: [QEMUFileName.path(backingFilename)], format: isRaw ? "raw" : nil, mustBeRecognized: true)
    }

    /// Any image may be the backing file, of any size: the name is all that links them.
    func checkLink(to parent: any ImageBackend) {}

    // MARK: - Properties

    var properties: [ImageProperty] {
        func bits(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
        var list = [
            ImageProperty("table-size", "table size", "\(header.tableSize) clusters"),
            ImageProperty("header-size", "header size", "\(header.headerSize) clusters"),
            ImageProperty("l1-table-offset", "L1 table at byte", String(header.l1TableOffset)),
            ImageProperty("features", "features", bits(header.features.rawValue)),
        ]
        if header.compatFeatures != 0 {
            list.append(ImageProperty("compat-features", "compatible features", bits(header.compatFeatures)))
        }
        if header.autoclearFeatures != 0 {
            list.append(ImageProperty("autoclear-features", "autoclear features", bits(header.autoclearFeatures)))
        }
        if let backingFilename {
            let isRaw = header.features.contains(.backingFormatNoProbe)
            list.append(ImageProperty("parent-name", "backing file name", backingFilename))
            list.append(ImageProperty("parent-format", "backing file format", isRaw ? "raw" : "detected"))
        }
        if header.features.contains(.needCheck) {
            list.append(ImageProperty("unclean", "needs check", "yes: not closed by its last writer"))
        }
        if let damage { list.append(ImageProperty("damage", "damage", damage)) }
        return list
    }
}

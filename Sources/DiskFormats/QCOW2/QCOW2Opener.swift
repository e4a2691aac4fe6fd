internal import DiskImage
internal import DiskStorage

/// What opening an image finds in its file, before anything is translated.
struct QCOW2Opener {
    let header: QCOW2Header
    let extensions: QCOW2HeaderExtensions
    let backingName: String?
    let snapshot: QCOW2Snapshot?
    let storages: [StorageHandle]
    let files: [String]
    let end: FileEndCell

    /// Opens the image that a request names.
    static func open(_ request: OpenRequest) throws(DiskError) -> QCOW2Image {
        let opener = try QCOW2Opener(request)
        if !request.skipsConsistencyChecks { try opener.checkState(request) }
        return try QCOW2Image(opener, request)
    }

    init(_ request: OpenRequest) throws(DiskError) {
        let storage = request.storage
        (header, extensions, backingName) = try Self.readHeader(of: storage)
        let length = try storage.length()
        guard let rounded = length.alignedUp(to: header.clusterSize), rounded <= TableSet.offsetLimit else {
            throw DiskError(.invalidImage, "the file has \(length) bytes, which is more than a QCOW2 image can have")
        }
        let snapshots = QCOW2SnapshotTable(header, storage)
        let snapshot = try request.snapshot.map { (name) throws(DiskError) in try snapshots.find(name) }
        self.snapshot = snapshot
        var end = rounded
        if storage.traits.hasFixedLength, request.isWritable {
            end = try Self.usedEnd(storage, header, length: rounded, request.cache)
        }
        self.end = FileEndCell(end)
        try Self.checkTable("L1 table", header.l1TableOffset, UInt64(header.l1Size) * 8, rounded)
        try Self.checkTable("refcount table", header.refcountTableOffset, header.refcountTableByteCount, rounded)
        if let snapshot { try Self.check(snapshot, header, rounded) }
        guard header.hasDataFile else {
            storages = [StorageHandle(storage)]
            files = [request.path]
            return
        }
        guard let name = extensions.dataFileName, !name.isEmpty else {
            throw DiskError(.invalidImage, "the header does not name the external data file")
        }
        guard header.snapshotCount == 0 else {
            throw DiskError(.invalidImage, "an image with an external data file has internal snapshots")
        }
        try QEMUFileName.check(name, image: request.path, request.companions)
        do throws(DiskError) {
            let file = try request.companions.openCompanion(
                QEMUFileName.path(name), of: request.path, isWritable: request.isWritable, what: "the data file")
            storages = [StorageHandle(storage), StorageHandle(file.storage)]
            files = [request.path, file.path]
        } catch {
            guard request.mode == .information, error.kind == .notFound else { throw error }
            storages = [StorageHandle(storage), StorageHandle(MemoryStorage(name: name))]
            files = [request.path]
        }
    }

    private static func readHeader(
        of storage: any Storage
    ) throws(DiskError) -> (QCOW2Header, QCOW2HeaderExtensions, String?) {
        let head = try storage.availableBytes(at: 0, count: QCOW2Header.byteCount3, for: .header)
        // Features come first: who does not know them cannot tell what else the header says.
        if let early = try? QCOW2Header(featuresOf: head), !early.incompatible.isSubset(of: .known) {
            let cluster = try storage.availableBytes(at: 0, count: 4096, for: .header)
            let names = (try? QCOW2HeaderExtensions(parsing: cluster, early)) ?? QCOW2HeaderExtensions()
            try names.checkFeatures(early)
        }
        let header = try QCOW2Header(parsing: head)
        let cluster = try storage.availableBytes(
            at: 0, count: Int(min(header.clusterSize, 64 << 10)), for: .header)
        let extensions = try QCOW2HeaderExtensions(parsing: cluster, header)
        guard header.backingFileOffset != 0, header.backingFileSize > 0 else { return (header, extensions, nil) }
        let name = try storage.bytes(
            at: header.backingFileOffset, count: Int(header.backingFileSize), for: .header, "the backing file's name")
        return (header, extensions, String(decoding: name.prefix { $0 != 0 }, as: UTF8.self))
    }

    private static func checkTable(
        _ what: StaticString, _ offset: UInt64, _ count: UInt64, _ end: UInt64
    ) throws(DiskError) {
        guard count <= end, offset <= end - count else {
            throw DiskError(
                .invalidImage, "the file is cut short: the \(what) needs \(count) bytes, and the file ends at \(end)",
                offset: offset)
        }
    }

    private static func check(_ snapshot: QCOW2Snapshot, _ header: QCOW2Header, _ end: UInt64) throws(DiskError) {
        let size = snapshot.diskSize ?? header.size
        guard snapshot.l1TableOffset & (header.clusterSize - 1) == 0, size <= UInt64(Int64.max),
            UInt64(snapshot.l1Size) * 8 <= QCOW2Header.l1ByteLimit,
            header.l1EntryCount(for: size) <= UInt64(snapshot.l1Size)
        else {
            throw DiskError(
                .invalidImage,
                "the L1 table of snapshot '\(snapshot.name)' is said to have \(snapshot.l1Size) entries at byte "
                    + "\(snapshot.l1TableOffset), for a disk of \(size) bytes")
        }
        try checkTable("snapshot's L1 table", snapshot.l1TableOffset, UInt64(snapshot.l1Size) * 8, end)
    }

    /// The end of what is used of a device, by the refcounts.
    private static func usedEnd(
        _ storage: any Storage, _ header: QCOW2Header, length: UInt64, _ cache: TableCache
    ) throws(DiskError) -> UInt64 {
        let tables = TableSet(cache: cache)
        let table = tables.table(in: storage)
        let layout = QCOW2RefcountLayout(order: header.refcountOrder)
        let bits = UInt64(header.clusterBits)
        for index in (0..<header.refcountTableByteCount / 8).reversed() {
            let entry = try table.bigEndian64(at: header.refcountTableOffset + index * 8)
            let block = entry & QCOW2Entry.refcountBlockMask
            guard block != 0, block & (header.clusterSize - 1) == 0, block < length else { continue }
            for word in (0..<header.clusterSize / 8).reversed() where try table.entry64(at: block + word * 8) != 0 {
                let cluster = index << layout.perBlockBits(bits) + (word + 1) << layout.perWordBits
                return min(cluster << bits, length & ~(header.clusterSize - 1))
            }
        }
        return header.clusterSize
    }

    // MARK: - What speaks against using it

    private func checkState(_ request: OpenRequest) throws(DiskError) {
        if let backingName, request.mode != .information {
            try QEMUFileName.check(backingName, image: request.path, request.companions)
        }
        guard request.isWritable else { return }
        if header.incompatible.contains(.corrupt) {
            throw DiskError(
                .needsRepair,
                "is marked as corrupt: it can be read; to write to it, run 'vdimg check --repair' first",
                image: request.path)
        }
    }
}

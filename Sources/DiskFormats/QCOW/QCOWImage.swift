internal import DiskImage
internal import DiskStorage

/// An open image of QCOW version 1, which is only read.
///
/// An L1 table of 64-bit entries, 0 or where an L2 table begins; in these, 0 or where a cluster begins, or with bit 63
/// set a compressed one: below it as many bits as a cluster's size has say how many bytes there are, the rest where.
@safe
final class QCOWImage: ImageBackend, @unchecked Sendable {  // nothing changes after init
    let format = "qcow"
    let header: QCOWHeader
    let virtualSize: UInt64
    let sectorSize: UInt32 = 512
    let isWritable = false
    let storages: [StorageHandle]
    let files: [String]
    private let backingName: String?
    private let tables: TableSet
    private let table: Table
    private let length: UInt64
    private let decompressed: DecompressedBlocks
    private let cache: TableCache

    private static let compressed: UInt64 = 1 << 63

    var blockSize: UInt64 { header.clusterSize }

    init(_ request: OpenRequest) throws(DiskError) {
        guard !request.isWritable else {
            throw DiskError(
                .unsupported,
                "version 1 of QCOW can be read, not written: make a snapshot with "
                    + "'vdimg create --parent', and mount that"
            )
        }
        let storage = request.storage
        header = try QCOWHeader(
            parsing: storage.bytes(at: 0, count: QCOWHeader.byteCount, for: .header, "the header"))
        length = try storage.length()
        // Whole sectors, as QEMU shows them.
        virtualSize = header.size & ~511
        guard header.l1Count * 8 <= length, header.l1TableOffset <= length - header.l1Count * 8 else {
            throw DiskError(.invalidImage, "the file is cut short: the L1 table lies outside it", offset: 40)
        }
        if header.backingFileOffset != 0, header.backingFileSize > 0 {
            let name = try storage.bytes(
                at: header.backingFileOffset, count: Int(header.backingFileSize), for: .header,
                "the backing file's name")
            backingName = String(decoding: name.prefix { $0 != 0 }, as: UTF8.self)
        } else {
            backingName = nil
        }
        if let backingName, request.mode != .information, !request.skipsConsistencyChecks {
            try QEMUFileName.check(backingName, image: request.path, request.companions)
        }
        storages = [StorageHandle(storage)]
        files = [request.path]
        cache = request.cache
        tables = TableSet(cache: request.cache)
        table = tables.table(in: storage)
        decompressed = DecompressedBlocks(blockSize: header.clusterSize)
    }

    // MARK: - Translation

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let inCluster = position & (header.clusterSize &- 1)
            var run = min(length &- done, header.clusterSize &- inCluster)
            let l1Place = header.l1TableOffset &+ (position >> header.coverageShift) &* 8
            let l2Offset = try entry(at: l1Place)
            let extent: Extent
            if l2Offset == 0 {
                run = min(length &- done, 1 << header.coverageShift &- position & (1 << header.coverageShift &- 1))
                extent = Extent(.absent, length: run)
            } else {
                guard l2Offset & 7 == 0, l2Offset <= self.length, header.l2ByteCount <= self.length - l2Offset else {
                    throw outside("L2 table", l2Offset, l1Place)
                }
                let place = l2Offset &+ (position >> header.clusterBits & (1 << header.l2Bits &- 1)) &* 8
                extent = try cluster(try entry(at: place), inCluster, run, place)
            }
            guard batch.append(extent) else { return }
            done &+= run
        }
    }

    private func entry(at offset: UInt64) throws(DiskError) -> UInt64 { try table.entry64(at: offset).byteSwapped }

    private func cluster(
        _ entry: UInt64, _ inCluster: UInt64, _ length: UInt64, _ place: UInt64
    ) throws(DiskError) -> Extent {
        if entry == 0 { return Extent(.absent, length: length) }
        if entry & Self.compressed != 0 {
            guard compressedPlace(entry).offset < self.length else {
                throw outside("compressed cluster", compressedPlace(entry).offset, place)
            }
            return Extent(
                .encoded, length: length, fileOffset: entry, skip: UInt32(truncatingIfNeeded: inCluster))
        }
        // Of the file's last cluster there may be a part.
        guard entry & 511 == 0, entry < self.length else { throw outside("data cluster", entry, place) }
        return Extent(.data, length: length, fileOffset: entry &+ inCluster)
    }

    private func compressedPlace(_ entry: UInt64) -> (offset: UInt64, count: Int) {
        let shift = 63 - header.clusterBits
        return (entry & (1 << shift - 1), Int(entry >> shift & (header.clusterSize - 1)))
    }

    @inline(never)
    private func outside(_ what: StaticString, _ offset: UInt64, _ place: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "an entry puts a \(what) at byte \(offset), where none can be: the file is damaged or cut short",
            offset: place)
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        try decompressed.read(extent.fileOffset, skipping: Int(extent.skip), into: buffer) {
            (output) throws(DiskError) in
            let (offset, count) = compressedPlace(extent.fileOffset)
            let input = try storages[0].storage.availableBytes(at: offset, count: count, for: .guestData)
            do throws(DiskError) {
                try input.withIOBytes { (data) throws(DiskError) in try Deflate.inflateCluster(data, into: output) }
            } catch {
                throw error.about(storages[0].storage.name).at(offset)
            }
        }
    }

    // MARK: - Writing is for later versions

    func beginWriting() throws(DiskError) { preconditionFailure("an image that is only read is written") }
    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        preconditionFailure("an image that is only read is written")
    }
    func commit(_ reservation: consuming Reservation) {}
    func abandon(_ reservation: consuming Reservation) {}
    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) -> Bool { false }
    func flush() {}
    func close() {}

    // MARK: - Identity

    let identity = ImageIdentity()

    var parentLink: ParentLink? { backingName.map { ParentLink(paths: [QEMUFileName.path($0)]) } }

    func checkLink(to parent: any ImageBackend) {}

    var properties: [ImageProperty] {
        var list = [ImageProperty("l2-entries", "entries of an L2 table", String(1 << header.l2Bits))]
        if let backingName { list.append(ImageProperty("backing-file", "backing file", backingName)) }
        return list
    }
}

internal import DiskImage
internal import DiskStorage

/// Makes a new image: header, refcount table, refcount blocks and L1 table one after the other, then, if asked, L2
/// tables and clusters for the whole disk. The header is written last.
struct QCOW2Creator {
    private let request: CreateRequest
    private let companions: any CompanionOpener
    private let variant: QCOW2Variant
    private let options: QCOW2CreateOptions
    private var header: QCOW2Header
    /// What follows the header in the first cluster.
    private var rest: [UInt8] = []

    /// Bytes written at once.
    private static let step = 64 << 10

    init(_ request: CreateRequest, _ companions: any CompanionOpener) throws(DiskError) {
        self.request = request
        self.companions = companions
        variant = try request.variant.map { (name) throws(DiskError) in try QCOW2Variant(named: name) } ?? .dynamic
        options = try QCOW2CreateOptions(request, variant)
        guard request.comment == nil, request.uuid == nil else {
            throw DiskError(.unsupported, "QCOW2 stores no comment and no UUID")
        }
        // The parent may be of any size; disks of QCOW2 have whole sectors.
        let size = request.parent == nil ? request.virtualSize : request.virtualSize.alignedUp(to: 512) ?? .max
        guard size % 512 == 0, size <= UInt64(Int64.max) & ~511 else {
            throw DiskError(
                .invalidArgument, "a disk of \(size) bytes cannot be: it must be a multiple of 512, below 2^63")
        }
        header = QCOW2Header(size: size)
        header.version = options.version
        header.headerLength = UInt32(options.version == 2 ? QCOW2Header.byteCount2 : QCOW2Header.byteCount3)
        header.clusterBits = try Self.clusterBits(request, options)
        header.refcountOrder = options.refcountOrder
        header.compressionType = options.compressionType
        if options.hasExtendedL2 { header.incompatible.insert(.extendedL2) }
        if options.compressionType != .deflate { header.incompatible.insert(.compressionType) }
        if options.dataFile != nil { header.incompatible.insert(.externalDataFile) }
        if options.hasLazyRefcounts { header.compatible.insert(.lazyRefcounts) }
        if options.isDataFileRaw { header.autoclear.insert(.rawExternalData) }
    }

    private static func clusterBits(
        _ request: CreateRequest, _ options: QCOW2CreateOptions
    ) throws(DiskError) -> UInt32 {
        let size = request.blockSize ?? 64 << 10
        let least = options.hasExtendedL2 ? QCOW2Header.leastExtendedClusterBits : QCOW2Header.clusterBits.lowerBound
        let limits = UInt64(1) << UInt64(least)...1 << UInt64(QCOW2Header.clusterBits.upperBound)
        guard size.isPowerOfTwo, limits.contains(size) else {
            throw DiskError(
                .invalidArgument,
                "a cluster of \(size) bytes cannot be: a power of two from \(limits.lowerBound) to \(limits.upperBound)"
            )
        }
        return UInt32(size.trailingZeroBitCount)
    }

    /// Extensions and the backing file's name, which must fit into the first cluster.
    private mutating func addExtensions(dataFile: String?) throws(DiskError) {
        if let parent = request.parent {
            let format = Array(QEMUFileName.peerFormat(parent.format).utf8)
            rest += QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.backingFormat, format)
        }
        if let name = dataFile {
            rest += QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.externalDataFile, Array(name.utf8))
        }
        let names = QCOW2FeatureName.all.flatMap { $0.encode() }
        let table = QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.featureNameTable, names)
        let name = request.parent.map { Array(QEMUFileName.stored($0.path).utf8) } ?? []
        let fixed = Int(header.headerLength) + rest.count + 8 + name.count
        // For messages of others alone, and only where there is room.
        if header.version >= 3, fixed + table.count <= Int(header.clusterSize) { rest += table }
        rest += QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.end, [])
        guard fixed <= Int(header.clusterSize) else {
            throw DiskError(
                .invalidArgument, "the names have no room in a first cluster of \(header.clusterSize) bytes")
        }
        guard !name.isEmpty else { return }
        guard name.count <= QCOW2Header.backingNameLimit, fixed <= Int(header.clusterSize) else {
            throw DiskError(
                .invalidArgument,
                "the parent's path has \(name.count) bytes, for which the first cluster has no room")
        }
        header.backingFileOffset = UInt64(Int(header.headerLength) + rest.count)
        header.backingFileSize = UInt32(name.count)
        rest += name
    }

    /// What decides how the image grows.
    var growthHeader: QCOW2Header { header }
    /// Whether clusters are made as they are written.
    var isGrowing: Bool { variant == .dynamic && !header.hasDataFile }
    /// The clusters of the refcount table, of refcount blocks and of all that is there from the beginning.
    func initialClusters() throws(DiskError) -> (table: UInt64, blocks: UInt64, all: UInt64) {
        let layout = try layout()
        return (layout.tableClusters, layout.blockCount, layout.count)
    }

    // MARK: - Layout

    /// Where everything goes, in clusters.
    private struct Layout {
        var tableClusters: UInt64 = 1
        var blockCount: UInt64 = 1
        let l1Clusters: UInt64
        let l2Count: UInt64
        /// Clusters for data in the image's own file.
        let dataClusters: UInt64
        var firstBlock: UInt64 { 1 + tableClusters }
        var firstL1: UInt64 { firstBlock + blockCount }
        var firstL2: UInt64 { firstL1 + l1Clusters }
        var firstData: UInt64 { firstL2 + l2Count }
        var count: UInt64 { firstData + dataClusters }
    }

    private func layout() throws(DiskError) -> Layout {
        let l1Count = header.l1EntryCount(for: header.size)
        guard l1Count * 8 <= QCOW2Header.l1ByteLimit else {
            let limit = QCOW2Header.l1ByteLimit / 8 * header.l2Coverage
            throw DiskError(
                .invalidArgument,
                "with clusters of \(header.clusterSize) bytes a disk has \(limit) bytes at most: give a larger "
                    + "--block-size")
        }
        let isAllocated = variant != .dynamic
        let clusters = header.size.dividedRoundingUp(by: header.clusterSize)
        var layout = Layout(
            l1Clusters: max(1, (l1Count * 8).dividedRoundingUp(by: header.clusterSize)),
            l2Count: isAllocated ? l1Count : 0, dataClusters: isAllocated && !header.hasDataFile ? clusters : 0)
        let perBlock =
            UInt64(1) << QCOW2RefcountLayout(order: header.refcountOrder).perBlockBits(UInt64(header.clusterBits))
        while true {
            let blocks = layout.count.dividedRoundingUp(by: perBlock)
            let tables = (blocks * 8).dividedRoundingUp(by: header.clusterSize)
            if blocks <= layout.blockCount, tables <= layout.tableClusters { break }
            layout.blockCount = max(blocks, layout.blockCount)
            layout.tableClusters = max(tables, layout.tableClusters)
        }
        guard layout.tableClusters << UInt64(header.clusterBits) <= QCOW2Header.refcountTableByteLimit else {
            throw DiskError(
                .invalidArgument,
                "the refcount table would be too long: give a larger --block-size, or fewer refcount-bits")
        }
        return layout
    }

    // MARK: - Writing

    /// Creates the file of an image of compressed clusters.
    mutating func createCompressed() throws(DiskError) -> QCOW2CompressedWriter {
        guard variant == .dynamic, !header.hasDataFile else {
            throw DiskError(.unsupported, "only dynamic images without a data file have compressed clusters")
        }
        // What is checked of the layout is checked here too.
        _ = try layout()
        let name = String(request.path.split(separator: "/").last ?? "")
        let file = try companions.createCompanion(name, of: request.path).storage
        try addExtensions(dataFile: nil)
        return try QCOW2CompressedWriter(file, header: header, rest: rest)
    }

    mutating func create() throws(DiskError) {
        let layout = try layout()
        let size = header.clusterSize
        header.refcountTableOffset = size
        header.refcountTableClusters = UInt32(layout.tableClusters)
        header.l1TableOffset = layout.firstL1 * size
        header.l1Size = UInt32(header.l1EntryCount(for: header.size))
        let name = String(request.path.split(separator: "/").last ?? "")
        let file = try companions.createCompanion(name, of: request.path).storage
        try addExtensions(dataFile: try options.dataFile.map(createDataFile))
        let length = layout.count * size
        if variant == .fixed, !header.hasDataFile { try file.allocate(length) } else { try file.setLength(length) }
        try write(file, at: size, count: layout.blockCount) { (layout.firstBlock + $0) * size }
        try writeRefcounts(file, at: layout.firstBlock * size, count: layout.count)
        if layout.l2Count > 0 {
            try write(file, at: layout.firstL1 * size, count: layout.l2Count) {
                (layout.firstL2 + $0) * size | QCOW2Entry.copied
            }
            try writeEntries(file, layout)
        }
        try file.flush()
        try file.write(header.encode() + rest, at: 0, for: .header)
        try file.flush()
    }

    /// Makes the data file; answers its path as the image names it: in full, since QEMU looks for other names in its
    /// working folder.
    private func createDataFile(_ name: String) throws(DiskError) -> String {
        let file = try companions.createCompanion(name, of: request.path)
        if variant == .fixed {
            try file.storage.allocate(header.size)
        } else {
            try file.storage.setLength(header.size)
        }
        try file.storage.flush()
        return file.path
    }

    /// Writes `count` 64-bit words.
    private func write(
        _ file: any Storage, at offset: UInt64, count: UInt64, _ word: (UInt64) -> UInt64
    ) throws(DiskError) {
        var number: UInt64 = 0
        while number < count {
            let part = min(count - number, UInt64(Self.step / 8))
            var piece = FieldWriter(count: Int(part) * 8)
            for index in 0..<part { piece.bigEndian(word(number + index), at: Int(index) * 8) }
            try file.write(piece.bytes, at: offset + number * 8, for: .table)
            number += part
        }
    }

    /// Writes the refcount 1 for the first `count` clusters.
    private func writeRefcounts(_ file: any Storage, at offset: UInt64, count: UInt64) throws(DiskError) {
        let layout = QCOW2RefcountLayout(order: header.refcountOrder)
        let perWord = UInt64(1) << layout.perWordBits
        var full: UInt64 = 0
        for index in 0..<perWord { full = layout.set(full, index, 1) }
        var last: UInt64 = 0
        for index in 0..<count % perWord { last = layout.set(last, index, 1) }
        let words = count.dividedRoundingUp(by: perWord)
        // (Words are made with their first byte lowest.)
        try write(file, at: offset, count: words) {
            ($0 + 1 == words && count % perWord != 0 ? last : full).byteSwapped
        }
    }

    /// Writes the L2 entries for the whole disk.
    private func writeEntries(_ file: any Storage, _ layout: Layout) throws(DiskError) {
        let size = header.clusterSize
        let clusters = header.size.dividedRoundingUp(by: size)
        let start = layout.firstL2 * size
        func entry(_ cluster: UInt64) -> UInt64 {
            (header.hasDataFile ? cluster : layout.firstData + cluster) * size | QCOW2Entry.copied
        }
        guard header.hasExtendedL2 else { return try write(file, at: start, count: clusters, entry) }
        // Under a parent, a place is all that they have.
        let bitmap = request.parent == nil ? QCOW2SubclusterBitmap.allAllocated : .none
        try write(file, at: start, count: clusters * 2) { $0 % 2 == 0 ? entry($0 / 2) : bitmap.rawValue }
    }
}

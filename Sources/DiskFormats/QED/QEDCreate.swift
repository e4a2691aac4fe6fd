internal import DiskImage
internal import DiskStorage

/// What a new QED image is asked to be, checked.
struct QEDCreator {
    private let request: CreateRequest
    private var header: QEDHeader
    /// As the image names it; empty: there is none.
    private var backingFilename: [UInt8] = []

    private static let usualClusterSize: UInt64 = 64 << 10
    private static let usualTableSize: UInt64 = 4
    /// Bytes of a backing file's name at most: QEMU reads no longer ones.
    private static let backingFilenameLimit = 1023

    init(_ request: CreateRequest) throws(DiskError) {
        self.request = request
        guard request.variant == nil || request.variant == "dynamic" else {
            throw DiskError(
                .invalidArgument, "QED has no variant '\(request.variant ?? "")'; there is dynamic alone")
        }
        guard request.comment == nil, request.uuid == nil else {
            throw DiskError(.unsupported, "a QED image stores neither comment nor UUID")
        }
        let clusterSize = request.blockSize ?? Self.usualClusterSize
        guard clusterSize.isPowerOfTwo, QEDHeader.clusterSizes.contains(clusterSize) else {
            throw DiskError(
                .invalidArgument, "a cluster of \(clusterSize) bytes cannot be: a power of two from 4K to 64M")
        }
        let tableSize = try Self.tableSize(request, clusterSize)
        let limit = QEDHeader.imageSizeLimit(clusterSize: clusterSize, tableSize: tableSize)
        guard request.virtualSize % 512 == 0, 1...limit ~= request.virtualSize else {
            throw DiskError(
                .invalidArgument,
                "a disk of \(request.virtualSize) bytes cannot be: a multiple of 512 up to \(limit) "
                    + "(larger clusters, or the option table-size, reach further)")
        }
        header = QEDHeader(clusterSize: clusterSize, tableSize: tableSize, imageSize: request.virtualSize)
        guard let parent = request.parent else { return }
        backingFilename = Array(QEMUFileName.stored(parent.path).utf8)
        guard 1...Self.backingFilenameLimit ~= backingFilename.count else {
            throw DiskError(
                .invalidArgument,
                "the backing file's path has \(backingFilename.count) bytes; \(Self.backingFilenameLimit) can be")
        }
        header.features = parent.format == "raw" ? [.backingFile, .backingFormatNoProbe] : .backingFile
        header.backingFilenameOffset = UInt64(QEDHeader.byteCount)
        header.backingFilenameSize = UInt64(backingFilename.count)
    }

    /// The table size that was asked for; else the usual one, or as much more as the disk needs.
    private static func tableSize(_ request: CreateRequest, _ clusterSize: UInt64) throws(DiskError) -> UInt64 {
        for name in request.options.keys.sorted() where name != "table-size" {
            throw DiskError(.invalidArgument, "QED has no option '\(name)'; there is table-size")
        }
        if let text = request.options["table-size"] {
            guard let size = UInt64(text), size.isPowerOfTwo, QEDHeader.tableSizes.contains(size) else {
                throw DiskError(
                    .invalidArgument, "the option table-size=\(text) cannot be: 1, 2, 4, 8 or 16 clusters")
            }
            return size
        }
        var size = usualTableSize
        while size < QEDHeader.tableSizes.upperBound,
            request.virtualSize > QEDHeader.imageSizeLimit(clusterSize: clusterSize, tableSize: size)
        { size *= 2 }
        return size
    }

    /// Bytes of a cluster, and of a table.
    var layout: (clusterSize: UInt64, tableBytes: UInt64) { (header.clusterSize, header.tableBytes) }

    /// Makes the file: header, name, and an L1 table that is a hole. Flushed when it returns.
    func create(_ companions: any CompanionOpener) throws(DiskError) {
        let name = String(request.path.split(separator: "/").last ?? "")
        let file = try companions.createCompanion(name, of: request.path).storage
        try file.setLength(header.l1TableOffset + header.tableBytes)
        // What makes it an image is written when all else is there.
        if !backingFilename.isEmpty {
            try file.write(backingFilename, at: header.backingFilenameOffset, for: .header)
        }
        try file.flush()
        try file.write(header.encode(), at: 0, for: .header)
        try file.flush()
    }
}

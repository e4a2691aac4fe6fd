internal import DiskImage
internal import DiskStorage

/// Makes a new image: headers, log, metadata and table; the file identifier, by which it is known, last.
struct VHDXCreator {
    private let request: CreateRequest
    private let metadata: VHDXMetadata
    private let isFixed: Bool
    private let preallocates: Bool
    private let fileName: String

    /// Bytes of a block: what Hyper-V takes.
    static func usualBlockSize(hasParent: Bool) -> UInt64 { hasParent ? 2 << 20 : 32 << 20 }
    private static let logLength: UInt32 = 1 << 20
    /// A child's sector bitmaps go through the log too: more of it takes more of them at once.
    private static let childLogLength: UInt32 = 4 << 20
    private static let logOffset: UInt64 = 1 << 20
    private static let metadataLength: UInt64 = 1 << 20
    /// UTF-16 units of a path that a locator keeps.
    private static let pathLimit = 4096

    init(_ request: CreateRequest) throws(DiskError) {
        self.request = request
        fileName = String(request.path.split(separator: "/").last ?? "")
        switch (request.variant, request.parent != nil) {
        case (nil, _), ("dynamic", _): isFixed = false
        case ("fixed", false): isFixed = true
        case ("fixed", true):
            throw DiskError(.invalidArgument, "a fixed VHDX cannot have a parent", image: request.path)
        case (let other?, _):
            throw DiskError(
                .invalidArgument, "VHDX has no variant '\(other)'; there are dynamic, fixed", image: request.path)
        }
        guard request.comment == nil else {
            throw DiskError(.unsupported, "a VHDX stores no comment", image: request.path)
        }
        let options = try Options(request, isFixed: isFixed)
        preallocates = options.preallocates
        let size = request.virtualSize
        guard size > 0, size % UInt64(options.logicalSectorSize) == 0, size <= VHDXMetadata.sizeLimit else {
            throw DiskError(
                .invalidArgument,
                "a disk of \(size) bytes cannot be: it must be a multiple of \(options.logicalSectorSize), "
                    + "up to 64 TiB", image: request.path)
        }
        let blockSize = request.blockSize ?? Self.usualBlockSize(hasParent: request.parent != nil)
        guard blockSize.isPowerOfTwo, VHDXMetadata.blockSizes.contains(blockSize) else {
            throw DiskError(
                .invalidArgument, "a VHDX's blocks have 1M to 256M, a power of two, not \(blockSize) bytes",
                image: request.path)
        }
        metadata = VHDXMetadata(
            blockSize: blockSize, leavesBlocksAllocated: isFixed, virtualDiskSize: size,
            virtualDiskID: request.uuid ?? request.parent?.identity.uuid ?? .random(),
            logicalSectorSize: options.logicalSectorSize, physicalSectorSize: options.physicalSectorSize,
            parentLocator: try request.parent.map { (parent) throws(DiskError) in
                try Self.locator(parent, request.path)
            })
    }

    /// What `-o` may say.
    private struct Options {
        var preallocates = true
        var logicalSectorSize: UInt32
        var physicalSectorSize: UInt32 = 4096

        init(_ request: CreateRequest, isFixed: Bool) throws(DiskError) {
            logicalSectorSize = request.parent?.sectorSize ?? 512
            for (name, value) in request.options.sorted(by: { $0.key < $1.key }) {
                switch (name, value) {
                case ("preallocation", "full") where isFixed: preallocates = true
                case ("preallocation", "off") where isFixed: preallocates = false
                case ("logical-sector-size", "512"), ("logical-sector-size", "4096"):
                    logicalSectorSize = value == "512" ? 512 : 4096
                case ("physical-sector-size", "512"), ("physical-sector-size", "4096"):
                    physicalSectorSize = value == "512" ? 512 : 4096
                default:
                    throw DiskError(
                        .invalidArgument,
                        "VHDX has no option \(name)=\(value) here; there are logical-sector-size=512|4096, "
                            + "physical-sector-size=512|4096 and, for fixed images, preallocation=full|off",
                        image: request.path)
                }
            }
            // (That a raw disk's have 512 bytes nobody says.)
            if let parent = request.parent, parent.sectorSize != logicalSectorSize,
                parent.sectorSize != 512 || parent.format == "vhdx"
            {
                throw DiskError(
                    .invalidArgument,
                    "the parent's disk has sectors of \(parent.sectorSize) bytes: a child's are the same",
                    image: request.path)
            }
            guard physicalSectorSize >= logicalSectorSize else {
                throw DiskError(
                    .invalidArgument, "a physical sector cannot be smaller than a logical one", image: request.path)
            }
        }
    }

    /// How the child names its parent: by its DataWriteGuid, and where it is.
    static func locator(
        _ parent: CreateRequest.ParentDescription, _ path: String
    ) throws(DiskError) -> VHDXParentLocator {
        let linkage = VHDXStructure.linkage(of: parent.identity) ?? .null
        var values = [
            (key: VHDXParentLocator.Key.linkage, value: "{\(linkage)}"),
            (key: VHDXParentLocator.Key.linkage2, value: "{\(DiskUUID.null)}"),
        ]
        for (key, path, isRelative) in [
            (VHDXParentLocator.Key.relativePath, parent.relativePath, true),
            (VHDXParentLocator.Key.absolutePath, parent.absolutePath, false),
        ] where isRelative != path.hasPrefix("/") {
            var text = String(path.map { $0 == "/" ? "\\" : $0 })
            if isRelative, !text.hasPrefix("..\\") { text = ".\\" + text }
            values.append((key, text))
        }
        guard values.allSatisfy({ $0.value.utf16.count <= pathLimit }) else {
            throw DiskError(.invalidArgument, "the parent's path is too long for a VHDX", image: path)
        }
        return VHDXParentLocator(values)
    }

    func create(_ companions: any CompanionOpener) throws(DiskError) {
        let storage = try companions.createCompanion(fileName, of: request.path).storage
        let logLength = metadata.hasParent ? Self.childLogLength : Self.logLength
        let metadataStart = Self.logOffset + UInt64(logLength)
        let tableStart = metadataStart + Self.metadataLength
        let table = VHDXBlockAllocationTable(metadata, offset: tableStart)
        let alignment = UInt64(VHDXRegion.alignment)
        let dataStart = tableStart + table.byteCount.dividedRoundingUp(by: alignment) * alignment
        let regions = VHDXRegionTable(regions: [
            VHDXRegion(guid: VHDXRegionTable.metadata, range: metadataStart..<tableStart, isRequired: true),
            VHDXRegion(guid: VHDXRegionTable.blockAllocationTable, range: tableStart..<dataStart, isRequired: true),
        ])
        let length = dataStart + (isFixed ? table.blockCount * metadata.blockSize : 0)
        if isFixed, preallocates { try storage.allocate(length) } else { try storage.setLength(length) }
        for offset in VHDXRegionTable.offsets { try storage.write(regions.bytes, at: offset, for: .header) }
        try storage.write(metadata.encode(), at: metadataStart, for: .header)
        if isFixed { try writeTable(table, dataStart, to: storage) }
        var header = VHDXHeader(
            sequenceNumber: 0, fileWriteGUID: .random(), dataWriteGUID: .random(), logLength: logLength,
            logOffset: Self.logOffset)
        for offset in VHDXHeader.offsets {
            header.sequenceNumber += 1
            try storage.write(header.encode(), at: offset, for: .header)
        }
        try storage.write(Self.identifier, at: 0, for: .header)
        try storage.flush()
    }

    /// The file identifier: the signature, and who made it. [MS-VHDX] 2.2.1.
    private static var identifier: [UInt8] {
        var bytes = VHDXStructure.signature.bytes
        for unit in "vdmount".utf16 { bytes += [UInt8(truncatingIfNeeded: unit), UInt8(unit >> 8)] }
        return bytes + [UInt8](repeating: 0, count: 4096 - bytes.count)
    }

    /// All blocks of a fixed image, one after the other.
    private func writeTable(
        _ table: VHDXBlockAllocationTable, _ dataStart: UInt64, to storage: any Storage
    ) throws(DiskError) {
        let entriesAtOnce: UInt64 = 64 << 10
        for first in stride(from: 0, to: table.entryCount, by: Int(entriesAtOnce)) {
            let end = min(table.entryCount, first + entriesAtOnce)
            var fields = FieldWriter(count: Int((end - first) * VHDXBlockAllocationTable.entrySize))
            for index in first..<end where !table.isBitmap(index) {
                let block = index - index / (1 << table.chunkShift + 1)
                let entry = VHDXEntry(
                    VHDXEntry.PayloadState.fullyPresent, at: dataStart + block * metadata.blockSize)
                fields.littleEndian(entry.rawValue, at: Int((index - first) * VHDXBlockAllocationTable.entrySize))
            }
            try storage.write(
                fields.bytes, at: table.offset + first * VHDXBlockAllocationTable.entrySize, for: .table)
        }
    }
}

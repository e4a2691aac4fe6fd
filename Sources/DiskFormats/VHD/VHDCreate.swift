internal import DiskImage
internal import DiskStorage

/// Makes a new image: everything that its footer leads to first, the footer at the end last.
struct VHDCreator {
    private let request: CreateRequest
    private let type: VHDFooter.DiskType
    private let blockSize: UInt64
    private let preallocates: Bool
    private let fileName: String

    /// Bytes of a disk at most, by the specification: 2040 GiB.
    static let sizeLimit: UInt64 = 2040 << 30
    /// Bytes of a block: what the specification calls the default.
    static let usualBlockSize: UInt64 = 2 << 20
    private static let blockSizes: ClosedRange<UInt64> = 4 << 10...256 << 20
    /// Entries of a new table at most: 64 MiB of them are written.
    private static let entryLimit: UInt64 = 1 << 24
    private static let tableOffset: UInt64 = 1536

    init(_ request: CreateRequest) throws(DiskError) {
        self.request = request
        fileName = String(request.path.split(separator: "/").last ?? "")
        switch (request.variant, request.parent != nil) {
        case (nil, true), ("dynamic", true): type = .differencing
        case (nil, false), ("dynamic", false): type = .dynamic
        case ("fixed", false): type = .fixed
        case ("fixed", true):
            throw DiskError(.invalidArgument, "a fixed VHD cannot have a parent", image: request.path)
        case (let other?, _):
            throw DiskError(
                .invalidArgument, "VHD has no variant '\(other)'; there are dynamic, fixed", image: request.path)
        }
        guard request.comment == nil else {
            throw DiskError(.unsupported, "a VHD stores no comment", image: request.path)
        }
        preallocates = try Self.preallocation(request, type)
        let size = request.virtualSize
        guard size > 0, size % 512 == 0, size <= Self.sizeLimit else {
            throw DiskError(
                .invalidArgument,
                "a disk of \(size) bytes cannot be: it must be a multiple of 512, from 512 bytes to 2040 GiB",
                image: request.path)
        }
        blockSize = request.blockSize ?? Self.usualBlockSize
        guard type != .fixed || request.blockSize == nil else {
            throw DiskError(.invalidArgument, "a fixed VHD has no blocks", image: request.path)
        }
        guard blockSize.isPowerOfTwo, Self.blockSizes.contains(blockSize) else {
            throw DiskError(
                .invalidArgument, "a VHD's blocks have 4K to 256M, a power of two, not \(blockSize) bytes",
                image: request.path)
        }
        guard size.dividedRoundingUp(by: blockSize) <= Self.entryLimit else {
            throw DiskError(
                .invalidArgument,
                "a disk of \(size) bytes has more than \(Self.entryLimit) blocks of \(blockSize) bytes: "
                    + "take larger blocks", image: request.path)
        }
    }

    private static func preallocation(
        _ request: CreateRequest, _ type: VHDFooter.DiskType
    ) throws(DiskError) -> Bool {
        for name in request.options.keys.sorted() where name != "preallocation" || type != .fixed {
            throw DiskError(
                .invalidArgument,
                "VHD has no option '\(name)' here; there is preallocation=full|off, for fixed images",
                image: request.path)
        }
        switch request.options["preallocation"] {
        case nil, "full": return true
        case "off": return false
        case let other?:
            throw DiskError(
                .invalidArgument, "the option preallocation=\(other) cannot be: it is full or off",
                image: request.path)
        }
    }

    func create(_ companions: any CompanionOpener) throws(DiskError) {
        let size = request.virtualSize
        let footer = VHDFooter(
            type: type, size: size, geometry: .newVHD(size: size), uuid: request.uuid ?? .random(),
            timestamp: .now
        ).encode()
        let storage = try companions.createCompanion(fileName, of: request.path).storage
        if type == .fixed {
            if preallocates { try storage.allocate(size) } else { try storage.setLength(size) }
            try storage.write(footer, at: size, for: .footer)
        } else {
            try writeTables(footer, to: storage)
        }
        try storage.flush()
    }

    /// Footer's copy, dynamic header, table, the parent's paths, and the footer.
    private func writeTables(_ footer: [UInt8], to storage: any Storage) throws(DiskError) {
        let entries = request.virtualSize.dividedRoundingUp(by: blockSize)
        var header = VHDDynamicHeader(
            tableOffset: Self.tableOffset, maxTableEntries: UInt32(entries), blockSize: blockSize)
        let tableSize = (entries * 4).dividedRoundingUp(by: 512) * 512
        var end = Self.tableOffset + tableSize
        var paths: [(offset: UInt64, bytes: [UInt8])] = []
        if let parent = request.parent {
            paths = try header.setParent(parent, pathsAt: end)
            if let last = header.locators.last { end = last.dataOffset + UInt64(last.dataSpace) }
        }
        try storage.write(header.encode(), at: UInt64(VHDFooter.byteCount), for: .header)
        let ones = [UInt8](repeating: 0xff, count: Int(min(tableSize, 1 << 20)))
        for start in stride(from: 0, to: tableSize, by: ones.count) {
            let count = Int(min(UInt64(ones.count), tableSize - start))
            try storage.write(Array(ones.prefix(count)), at: Self.tableOffset + start, for: .table)
        }
        for path in paths { try storage.write(path.bytes, at: path.offset, for: .header) }
        try storage.write(footer, at: 0, for: .header)
        try storage.write(footer, at: end, for: .footer)
    }
}

extension VHDDynamicHeader {
    /// Code units of a path that a locator keeps.
    private static let pathLimit = 4096

    /// Names another parent; answers the paths to which the locators lead, in whole sectors from `start` on.
    mutating func setParent(
        _ parent: CreateRequest.ParentDescription, pathsAt start: UInt64
    ) throws(DiskError) -> [(offset: UInt64, bytes: [UInt8])] {
        parentUUID = parent.identity.uuid ?? .null
        parentTimestamp = parent.modified.map { VHDTimestamp(nanosecondsSince1970: $0) } ?? VHDTimestamp(seconds: 0)
        parentName = String(parent.path.split(separator: "/").last ?? "")
        locators = []
        var end = start
        var paths: [(offset: UInt64, bytes: [UInt8])] = []
        for (platform, path, isRelative) in [
            (VHDParentLocator.Platform.windowsRelative, parent.relativePath, true),
            (.windowsAbsolute, parent.absolutePath, false),
        ] where isRelative != path.hasPrefix("/") {
            let bytes = VHDParentLocator.windowsPath(path, isRelative: isRelative)
            guard bytes.count / 2 <= Self.pathLimit else {
                throw DiskError(.invalidArgument, "the parent's path is too long for a VHD")
            }
            let locator = VHDParentLocator(platform, path: bytes, at: end)
            locators.append(locator)
            paths.append((end, bytes + [UInt8](repeating: 0, count: (512 - bytes.count % 512) % 512)))
            end += UInt64(locator.dataSpace)
        }
        return paths
    }

    /// Names no parent.
    mutating func removeParent() {
        (parentUUID, parentTimestamp, parentName, locators) = (.null, VHDTimestamp(seconds: 0), "", [])
    }
}

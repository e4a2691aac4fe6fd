internal import DiskImage
internal import DiskStorage

/// Opens an image: finds the descriptor, then every extent that it lists.
struct VMDKOpener {
    private let request: OpenRequest
    private var parts: VMDKOpenedParts
    private var position: UInt64 = 0
    /// The header of the file that was named, if it is a sparse extent itself.
    private let ownHeader: VMDKSparseHeader?
    private let ownCOWDHeader: COWDHeader?
    /// Files that hold extents as they are, by the names that the descriptor has for them: a device may hold many.
    private var flatFiles: [String: FlatFile] = [:]

    /// A file with flat extents, opened once, since it is locked.
    private struct FlatFile {
        let storage: any Storage
        let path: String
        /// Its numbers among the image's storages: as it is, and for extents that are only read.
        var number: UInt16?
        var readOnlyNumber: UInt16?
    }

    private init(
        _ request: OpenRequest, _ descriptor: VMDKDescriptorFile, _ header: VMDKSparseHeader?, _ cowd: COWDHeader?
    ) {
        self.request = request
        ownHeader = header
        ownCOWDHeader = cowd
        parts = VMDKOpenedParts(
            descriptor: descriptor, files: [request.path], tables: TableSet(cache: request.cache))
    }

    /// Opens the image that a request names.
    static func open(_ request: OpenRequest) throws(DiskError) -> VMDKImage {
        var opener = try begin(request)
        try opener.openExtents()
        let image = try VMDKImage(opener.parts, request)
        guard image.virtualSize > 0 || opener.parts.extents.isEmpty == false else {
            throw DiskError(.invalidImage, "the descriptor lists no extents", image: request.path)
        }
        if !request.skipsConsistencyChecks, request.mode != .information { try opener.checkUnclean() }
        return image
    }

    /// Reads the descriptor from wherever it is.
    private static func begin(_ request: OpenRequest) throws(DiskError) -> VMDKOpener {
        let storage = request.storage
        let head = try storage.availableBytes(at: 0, count: 4096, for: .header)
        if VMDKSparseHeader.hasMagic(head) {
            let header = try readHeader(of: storage)
            guard header.descriptorSector > 0, header.descriptorSectorCount > 0 else {
                throw DiskError(
                    .unsupported,
                    "is one extent of a disk, not the whole disk: open the descriptor file that lists it",
                    image: request.path)
            }
            let offset = try header.descriptorSector.multiplied(by: 512, "the descriptor's offset")
            let room = try header.descriptorSectorCount.multiplied(by: 512, "the descriptor's size")
            let count = Int(min(room, UInt64(VMDKDescriptorFile.limit)))
            let bytes = try storage.availableBytes(at: offset, count: count, for: .descriptor)
            let text = try VMDKDescriptor(parsing: bytes)
            return VMDKOpener(
                request, VMDKDescriptorFile(text: text, storage: storage, offset: offset, room: count),
                header.capacitySectors > 0 ? header : nil, nil)
        }
        if COWDHeader.hasMagic(head) {
            let header = try COWDHeader(parsing: try storage.bytes(at: 0, count: 2048, for: .header, "the COWD header"))
            let text = VMDKDescriptor(describing: header)
            return VMDKOpener(
                request,
                VMDKDescriptorFile(text: text, storage: MemoryStorage(), offset: 0, room: nil, isMissing: true), nil,
                header)
        }
        let length = try storage.length()
        guard length <= UInt64(VMDKDescriptorFile.limit) else {
            throw DiskError(.invalidImage, "is neither a sparse extent nor a descriptor", image: request.path)
        }
        let bytes = try storage.bytes(at: 0, count: Int(length), for: .descriptor, "the descriptor")
        let text = try VMDKDescriptor(parsing: bytes)
        return VMDKOpener(
            request, VMDKDescriptorFile(text: text, storage: storage, offset: 0, room: nil), nil, nil)
    }

    /// The header of a hosted sparse extent: of two, the footer where the header says so.
    static func readHeader(of storage: any Storage) throws(DiskError) -> VMDKSparseHeader {
        let bytes = try storage.bytes(at: 0, count: 512, for: .header, "the sparse extent header")
        return try VMDKSparseHeader(parsing: bytes)
    }

    // MARK: - Extents

    /// Whether a damaged extent is described, and not a reason to refuse the image: who asks for information or for a
    /// check wants to hear of the damage.
    private var describesDamage: Bool { request.mode == .information || request.skipsConsistencyChecks }

    private mutating func openExtents() throws(DiskError) {
        var ownIsOpen = false
        for line in parts.descriptor.text.extents {
            let length = try line.sectorCount.multiplied(by: 512, "an extent's size")
            if length == 0 { continue }
            let end = try position.adding(length, "the disk's size")
            guard end <= UInt64(Int64.max) else { throw DiskError(.invalidImage, "the disk's size is out of range") }
            let isOwn =
                !ownIsOpen && (ownHeader != nil || ownCOWDHeader != nil) && !line.type.isFlat && line.type != .zero
            if isOwn {
                ownIsOpen = true
                try openSparse(request.storage, request.path, line, length)
            } else {
                try openExtent(line, length)
            }
            position = end
        }
        guard ownHeader == nil || ownIsOpen else {
            throw DiskError(.invalidImage, "the descriptor inside a sparse extent lists no sparse extent")
        }
    }

    private mutating func openExtent(_ line: VMDKExtentDescription, _ length: UInt64) throws(DiskError) {
        if line.access == .noAccess {
            append(VMDKOpenExtent(map: VMDKExtentMap(kind: .inaccessible, start: position, length: length, storage: 0)))
            return
        }
        if line.type == .zero {
            append(VMDKOpenExtent(map: VMDKExtentMap(kind: .zero, start: position, length: length, storage: 0)))
            return
        }
        guard let name = line.fileName else {
            throw DiskError(.invalidImage, "extent \(parts.extents.count + 1) names no file")
        }
        if line.type.isFlat, flatFiles[name] != nil { return try openFlat(name, line, length) }
        let file: (storage: any Storage, path: String)
        do throws(DiskError) {
            // Of the extents that lie in a device, some may be writable.
            let isWritable =
                line.access == .readWrite
                || line.type.isFlat
                    && parts.descriptor.text.extents.contains { $0.fileName == name && $0.access == .readWrite }
            file = try request.companions.openCompanion(
                name, of: request.path, isWritable: request.isWritable && isWritable,
                what: "extent \(parts.extents.count + 1)")
        } catch {
            guard request.mode == .information, [.notFound, .refused, .system].contains(error.kind) else { throw error }
            append(VMDKOpenExtent(map: VMDKExtentMap(kind: .inaccessible, start: position, length: length, storage: 0)))
            return
        }
        if !line.type.isFlat {
            try openSparse(file.storage, file.path, line, length)
        } else {
            flatFiles[name] = FlatFile(storage: file.storage, path: file.path)
            try openFlat(name, line, length)
        }
    }

    private mutating func openFlat(
        _ name: String, _ line: VMDKExtentDescription, _ length: UInt64
    ) throws(DiskError) {
        guard let file = flatFiles[name] else { preconditionFailure("a flat extent whose file is not open") }
        let (storage, path) = (file.storage, file.path)
        let offset = try line.fileOffsetSector.multiplied(by: 512, "an extent's offset")
        let needed = try offset.adding(length, "an extent's end")
        let found = try storage.length()
        let damage = "the file is cut short: the extent needs \(needed) bytes, \(found) are there"
        guard found >= needed || describesDamage else { throw DiskError(.invalidImage, damage, image: path) }
        var map = VMDKExtentMap(
            kind: .flat, start: position, length: length, storage: try addFlatFile(name, file, line))
        map.fileOffset = offset
        var extent = VMDKOpenExtent(map: map)
        if found < needed { extent.damage = damage }
        append(extent)
    }

    /// The number of a flat extent's file among the image's storages.
    private mutating func addFlatFile(
        _ name: String, _ file: FlatFile, _ line: VMDKExtentDescription
    ) throws(DiskError) -> UInt16 {
        if line.access == .readOnly, file.storage.traits.isWritable {
            if let number = file.readOnlyNumber { return number }
            let number = try addStorage(ReadOnlyStorage(file.storage), file.path)
            flatFiles[name]?.readOnlyNumber = number
            return number
        }
        if let number = file.number { return number }
        let number = try addStorage(file.storage, file.path)
        flatFiles[name]?.number = number
        return number
    }

    private mutating func openSparse(
        _ storage: any Storage, _ path: String, _ line: VMDKExtentDescription, _ length: UInt64
    ) throws(DiskError) {
        let head = try storage.availableBytes(at: 0, count: 8, for: .header)
        do throws(DiskError) {
            if VMDKSparseHeader.hasMagic(head) {
                try openHosted(storage, path, line, length)
            } else if COWDHeader.hasMagic(head) {
                try openCOWD(storage, path, line, length)
            } else if SESparseHeader.hasMagic(head) {
                try openSESparse(storage, path, length)
            } else {
                throw DiskError(.invalidImage, "is listed as a sparse extent, but has none of their magic numbers")
            }
        } catch {
            guard describesDamage, error.kind == .invalidImage else { throw error.about(path) }
            let number: UInt16
            if let known = parts.storages.firstIndex(where: { $0.storage === storage }) {
                number = UInt16(known)
            } else {
                number = try addStorage(storage, path)
            }
            var extent = VMDKOpenExtent(
                map: VMDKExtentMap(kind: .inaccessible, start: position, length: length, storage: number))
            extent.damage = error.message
            append(extent)
        }
    }

    private mutating func openHosted(
        _ storage: any Storage, _ path: String, _ line: VMDKExtentDescription, _ length: UInt64
    ) throws(DiskError) {
        let fileLength = try storage.length()
        let (header, tableStorage) = try findTables(storage, length: fileLength)
        try checkCapacity(header.capacitySectors, length)
        let isCompressed = header.isCompressed
        let end = FileEndCell(fileLength)
        let number = try addStorage(storage, path)
        let isRebuilt = tableStorage !== storage
        var tables = VMDKGrainTables(
            table: parts.tables.table(in: tableStorage),
            directoryOffset: try header.directorySector.multiplied(by: 512, "the grain directory's offset"),
            grainShift: UInt64((header.grainSectors * 512).trailingZeroBitCount),
            tableShift: UInt64(header.entriesPerTable.trailingZeroBitCount),
            end: end.reader)
        tables.hasZeroGrains = header.hasZeroGrains
        // Grains come after all metadata; what a stream's header says of that is not kept to by its writers.
        let overhead = try header.overheadSectors.multiplied(by: 512, "the overhead")
        var damage: String?
        if !isCompressed {
            if overhead > fileLength {
                damage = "the file is cut short: its tables end at byte \(overhead), the file at \(fileLength)"
            }
            if let damage, !describesDamage { throw DiskError(.invalidImage, damage) }
            tables.firstDataOffset = max(512, overhead)
        }
        if !isRebuilt { try checkDirectory(tables, length, fileLength, entrySize: 4) }
        if header.usesRedundantDirectory, !isRebuilt {
            tables.redundantDirectoryOffset = try header.redundantDirectorySector
                .multiplied(by: 512, "the redundant grain directory's offset")
            do throws(DiskError) {
                try checkDirectory(tables, isCopy: true, length, fileLength, entrySize: 4)
            } catch {
                // Who only reads does without the copy.
                guard !request.isWritable, !request.skipsConsistencyChecks else { throw error }
                tables.redundantDirectoryOffset = 0
            }
        }
        var map = VMDKExtentMap(
            kind: isCompressed ? .compressed : .sparse, start: position, length: length, storage: number)
        map.grains = tables
        var extent = VMDKOpenExtent(map: map)
        extent.end = end
        extent.wasUnclean = header.isUnclean
        extent.damage = damage
        if isCompressed {
            extent.compressedGrains = VMDKCompressedGrains(
                handle: parts.storages[Int(number)], grainSize: tables.grainSize, hasMarkers: header.hasMarkers)
        } else if storage.traits.isWritable, line.access == .readWrite {
            extent.writer = VMDKSparseFile(
                .hosted, handle: parts.storages[Int(number)], end: end, length: fileLength, grainSize: tables.grainSize)
        }
        append(extent)
    }

    /// The header that counts, header or footer, and where the tables lie that it speaks of: in the file, or, of a
    /// stream that was cut off before them, in memory.
    private func findTables(
        _ storage: any Storage, length: UInt64
    ) throws(DiskError) -> (header: VMDKSparseHeader, storage: any Storage) {
        var header = try Self.readHeader(of: storage)
        guard header.directoryIsAtEnd else { return (header, storage) }
        if let footer = try VMDKStreamFooter.find(in: storage, length: length, like: header) {
            return (footer, storage)
        }
        // Only the grains of a stream say themselves where they belong.
        guard header.isCompressed, header.hasMarkers else {
            throw DiskError(
                .invalidImage, "the header says that a footer tells where the grain directory is, and there is none",
                offset: 56)
        }
        let rebuilt = try VMDKStreamFooter.rebuildTables(storage, header, length: length)
        header.directorySector = rebuilt.directorySector
        return (header, rebuilt.tables)
    }

    private mutating func openCOWD(
        _ storage: any Storage, _ path: String, _ line: VMDKExtentDescription, _ length: UInt64
    ) throws(DiskError) {
        let header = try COWDHeader(parsing: try storage.bytes(at: 0, count: 2048, for: .header, "the COWD header"))
        try checkCapacity(UInt64(header.capacitySectors), length)
        let fileLength = try storage.length()
        // The allocation pointer may be ahead of the file's end, never behind what is in use.
        let end = FileEndCell(max(fileLength, UInt64(header.freeSector) * 512))
        let number = try addStorage(storage, path)
        let tables = VMDKGrainTables(
            table: parts.tables.table(in: storage), directoryOffset: UInt64(header.directorySector) * 512,
            grainShift: UInt64((UInt64(header.grainSectors) * 512).trailingZeroBitCount), tableShift: 12,
            end: end.reader)
        try checkDirectory(tables, length, fileLength, entrySize: 4)
        var map = VMDKExtentMap(kind: .sparse, start: position, length: length, storage: number)
        map.grains = tables
        var extent = VMDKOpenExtent(map: map)
        extent.end = end
        extent.wasUnclean = header.isUnclean
        if storage.traits.isWritable, line.access == .readWrite {
            extent.writer = VMDKSparseFile(
                .cowd, handle: parts.storages[Int(number)], end: end, length: fileLength, grainSize: tables.grainSize)
        }
        append(extent)
    }

    private mutating func openSESparse(_ storage: any Storage, _ path: String, _ length: UInt64) throws(DiskError) {
        let header = try SESparseHeader(reading: storage)
        try checkCapacity(header.capacitySectors, length)
        let fileLength = try storage.length()
        let end = FileEndCell(fileLength)
        let number = try addStorage(storage, path)
        var tables = VMDKGrainTables(
            table: parts.tables.table(in: storage), directoryOffset: header.directorySector * 512,
            grainShift: UInt64((header.grainSectors * 512).trailingZeroBitCount),
            tableShift: UInt64((header.tableSectors * 64).trailingZeroBitCount), end: end.reader)
        tables.seTablesOffset = header.tablesSector * 512
        tables.seGrainsOffset = header.grainsSector * 512
        try checkDirectory(tables, length, fileLength, entrySize: 8)
        var map = VMDKExtentMap(kind: .seSparse, start: position, length: length, storage: number)
        map.grains = tables
        var extent = VMDKOpenExtent(map: map)
        extent.end = end
        append(extent)
    }

    // MARK: - Checks

    private func checkCapacity(_ capacitySectors: UInt64, _ length: UInt64) throws(DiskError) {
        guard capacitySectors >= length / 512 else {
            throw DiskError(
                .invalidImage,
                "the descriptor gives the extent \(length / 512) sectors, its header \(capacitySectors)")
        }
    }

    /// The whole grain directory (or its copy) must lie inside the file, and inside what the table cache reaches.
    private func checkDirectory(
        _ tables: VMDKGrainTables, isCopy: Bool = false, _ length: UInt64, _ fileLength: UInt64, entrySize: UInt64
    ) throws(DiskError) {
        let start = isCopy ? tables.redundantDirectoryOffset : tables.directoryOffset
        let count = length.dividedRoundingUp(by: tables.tableCoverage)
        let size = try count.multiplied(by: entrySize, "the grain directory's size")
        let end = try start.adding(size, "the grain directory's end")
        guard start >= 512, end <= min(fileLength, TableSet.offsetLimit) else {
            throw DiskError(
                .invalidImage,
                "the file is cut short: the \(isCopy ? "redundant " : "")grain directory ends at byte \(end), "
                    + "the file at \(fileLength)", offset: start)
        }
    }

    /// What was not closed is looked through before it is used.
    private func checkUnclean() throws(DiskError) {
        for (index, extent) in parts.extents.enumerated() where extent.wasUnclean && extent.map.kind == .sparse {
            let checker = try VMDKExtentChecker(extent, parts.storages[Int(extent.map.storage)].storage)
            let report = try checker.check(repair: request.isWritable ? .copiesOnly : .nothing)
            guard report.remaining(.loss) == 0, report.remaining(.repairable) == 0 || !request.isWritable else {
                let first = report.findings.first { $0.severity == .loss || $0.severity == .repairable }
                throw DiskError(
                    .needsRepair,
                    "extent \(index + 1) was not closed by its last writer and is damaged (\(first?.message ?? "")): "
                        + "run 'vdimg check --repair \(request.path)' first",
                    image: parts.storages[Int(extent.map.storage)].storage.name)
            }
        }
    }

    // MARK: - Collecting

    private mutating func addStorage(_ storage: any Storage, _ path: String) throws(DiskError) -> UInt16 {
        guard let number = UInt16(exactly: parts.storages.count) else {
            throw DiskError(.unsupported, "the descriptor lists more than 65,535 files")
        }
        parts.storages.append(StorageHandle(storage))
        if !parts.files.contains(path) { parts.files.append(path) }
        return number
    }

    private mutating func append(_ extent: VMDKOpenExtent) { parts.extents.append(extent) }
}

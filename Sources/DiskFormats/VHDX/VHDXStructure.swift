internal import DiskImage
internal import DiskStorage

/// What the headers, the region table and the metadata of a file say, checked: nothing in here leads outside the file
/// or the table cache.
struct VHDXStructure: Sendable {
    static let signature: StaticString = "vhdxfile"
    /// UTF-16 units of the creator's name, which come after the signature. [MS-VHDX] 2.2.1.
    private static let creatorLength = 256

    /// The program that made it.
    let creator: String
    let headers: VHDXHeaders
    /// What the log still has to change; nil: nothing.
    let replay: VHDXLogReplay?
    /// What is wrong with the log, where that is no error.
    let logDamage: String?
    /// The file as it is after that.
    let storage: any Storage
    let fileLength: UInt64
    let regionTable: VHDXRegionTable
    let metadataRange: Range<UInt64>
    let metadata: VHDXMetadata
    let table: VHDXBlockAllocationTable

    var header: VHDXHeader { headers.current }
    var logRange: Range<UInt64> { header.logRange }
    var isDifferencing: Bool { metadata.hasParent }
    var tableRange: Range<UInt64> { table.offset..<table.offset + table.byteCount }
    /// The parts of the file in which no block can lie.
    var reservedRanges: [Range<UInt64>] {
        [0..<UInt64(VHDXRegion.alignment), logRange] + regionTable.regions.map(\.range)
    }

    /// Reads it all. `forgivesLog`: a log that cannot be replayed is described, and left alone.
    init(_ file: any Storage, forgivesLog: Bool) throws(DiskError) {
        let identifier = FieldReader(
            try file.bytes(
                at: 0, count: Self.signature.utf8CodeUnitCount + Self.creatorLength * 2, for: .header,
                "the file identifier"))
        guard identifier.matches(Self.signature, at: 0) else {
            throw DiskError(.invalidImage, "the file does not begin with '\(Self.signature)'")
        }
        creator = try Self.creator(identifier)
        headers = try VHDXHeaders(file)
        var damage: String?
        do throws(DiskError) {
            replay = try VHDXLogReplay(headers.current, file)
        } catch {
            guard forgivesLog, error.kind == .needsRepair else { throw error }
            replay = nil
            damage = "it holds nothing that could be replayed"
        }
        logDamage = damage
        storage = replay.map { VHDXReplayedFile(file, $0) } ?? file
        fileLength = try storage.length()
        regionTable = try VHDXRegionTable(storage)
        try regionTable.checkPlaces(log: headers.current.logRange, fileLength: fileLength)
        metadataRange = try regionTable.region(VHDXRegionTable.metadata, "the metadata")
        metadata = try VHDXMetadata(storage, metadataRange)
        let range = try regionTable.region(VHDXRegionTable.blockAllocationTable, "the block allocation table")
        table = VHDXBlockAllocationTable(metadata, offset: range.lowerBound)
        guard table.byteCount <= range.upperBound - range.lowerBound, range.upperBound <= TableSet.offsetLimit else {
            throw DiskError(
                .invalidImage,
                "the block allocation table has room for \((range.upperBound - range.lowerBound) / 8) entries; "
                    + "the disk needs \(table.entryCount)", offset: range.lowerBound)
        }
    }

    private static func creator(_ identifier: FieldReader) throws(DiskError) -> String {
        var units: [UInt16] = []
        for index in 0..<creatorLength {
            let unit: UInt16 = try identifier.littleEndian(at: signature.utf8CodeUnitCount + index * 2)
            if unit == 0 { break }
            units.append(unit)
        }
        return String(decoding: units, as: UTF16.self)
    }
}

extension VHDXStructure {
    /// A child has the ID of its parent's disk; what was changed is told by the DataWriteGuid.
    var identity: ImageIdentity {
        ImageIdentity(
            uuid: metadata.virtualDiskID.isNull ? nil : metadata.virtualDiskID,
            modificationUUID: header.dataWriteGUID.isNull ? nil : header.dataWriteGUID)
    }

    var parentLink: ParentLink? {
        guard let locator = metadata.parentLocator else { return nil }
        return ParentLink(
            paths: locator.paths, modificationUUID: locator.linkages.first, mustBeRecognized: locator.linkages.isEmpty)
    }

    /// The parent must have the DataWriteGuid that the child records (of a parent in another format: what changes there
    /// when it is written to, or else its UUID).
    func checkLink(to parent: any ImageBackend) throws(DiskError) {
        let name = parent.files.first ?? ""
        let expected = metadata.parentLocator?.linkages ?? []
        guard let found = Self.linkage(of: parent.identity) else {
            if expected.isEmpty { return }
            throw DiskError(
                .brokenLink, "was made over an image with the data-write GUID \(expected[0]), but \(name) has none")
        }
        guard !expected.isEmpty else {
            throw DiskError(.brokenLink, "records nothing by which \(name) could be recognised as its parent")
        }
        guard expected.contains(found) else {
            throw DiskError(
                .brokenLink,
                "was made over an image with the data-write GUID \(expected[0]), but \(name) has \(found): "
                    + "it was changed since, or it is another image")
        }
    }

    /// What a child records of its parent.
    static func linkage(of parent: ImageIdentity) -> DiskUUID? { parent.modificationUUID ?? parent.uuid }

    /// What a person asks about the image.
    var properties: [ImageProperty] {
        let type = isDifferencing ? "differencing" : metadata.leavesBlocksAllocated ? "fixed" : "dynamic"
        var list = [
            ImageProperty("type", "type", type),
            ImageProperty("creator", "creator", creator),
            ImageProperty("uuid", "virtual disk ID", metadata.virtualDiskID.description),
            ImageProperty("data-write-guid", "data-write GUID", header.dataWriteGUID.description),
            ImageProperty("file-write-guid", "file-write GUID", header.fileWriteGUID.description),
            ImageProperty("logical-sector-size", "logical sector", "\(metadata.logicalSectorSize) bytes"),
            ImageProperty("physical-sector-size", "physical sector", "\(metadata.physicalSectorSize) bytes"),
            ImageProperty("log-size", "log", "\(header.logLength) bytes"),
        ]
        if let replay {
            list.append(
                ImageProperty(
                    "log", "state of the log",
                    "\(replay.entryCount) entries are to be replayed: not closed by its last writer"))
        }
        if let locator = metadata.parentLocator {
            let titles = [
                (VHDXParentLocator.Key.linkage, "parent-linkage", "parent's data-write GUID"),
                (VHDXParentLocator.Key.linkage2, "parent-linkage2", "parent's other GUID"),
                (VHDXParentLocator.Key.relativePath, "parent-relative-path", "parent, relative path"),
                (VHDXParentLocator.Key.volumePath, "parent-volume-path", "parent, path on its volume"),
                (VHDXParentLocator.Key.absolutePath, "parent-absolute-path", "parent, absolute path"),
            ]
            for (key, name, title) in titles {
                if let value = locator[key] { list.append(ImageProperty(name, title, value)) }
            }
        }
        var damage: [String] = []
        if let text = headers.damage { damage.append(text) }
        if let text = regionTable.damage?.message { damage.append(text) }
        if let text = logDamage { damage.append("not closed by its last writer, and of its log: \(text)") }
        if !damage.isEmpty { list.append(ImageProperty("damage", "damage", damage.joined(separator: "; "))) }
        return list
    }
}

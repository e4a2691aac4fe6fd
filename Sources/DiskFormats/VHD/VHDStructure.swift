internal import DiskImage
internal import DiskStorage

/// What an image's headers say, checked: nothing in here leads outside the file or the table cache.
struct VHDStructure: Sendable {
    let footer: VHDFooter
    /// The footer's bytes, as they belong into the file.
    let footerBytes: [UInt8]
    /// Where the footer at the end lies; nil if there is none that is whole.
    let endFooterOffset: UInt64?
    /// Where one lies that is damaged.
    let damagedFooterOffset: UInt64?
    /// Whether that footer has 511 bytes.
    let hasShortFooter: Bool
    let fileLength: UInt64
    /// The size of the disk in bytes, and why it is that.
    let virtualSize: UInt64
    let sizeRule: VHDSizeRule
    /// The header of a dynamic or differencing image.
    let header: VHDDynamicHeader?
    /// The paths by which it names its parent, in the order in which to try them.
    let parentPaths: [String]
    /// What is wrong and can be put right.
    let damages: [VHDDamage]
    /// What is wrong with a fixed image's length; it is described, not opened.
    let cutShort: String?

    var isDifferencing: Bool { footer.type == .differencing }
    var blockSize: UInt64 { header?.blockSize ?? 0 }
    var blockCount: UInt64 { blockSize == 0 ? 0 : virtualSize.dividedRoundingUp(by: blockSize) }
    /// The bytes of a block's sector bitmap: a bit for each sector, whole sectors.
    var bitmapSize: UInt64 { (blockSize / 512).dividedRoundingUp(by: 8 * 512) * 512 }

    /// What only blocks may not reach into: the copy of the footer, the dynamic header, the table.
    var headerRange: Range<UInt64> {
        header == nil ? 0..<0 : footer.dataOffset..<footer.dataOffset + UInt64(VHDDynamicHeader.byteCount)
    }
    var tableRange: Range<UInt64> {
        guard let header else { return 0..<0 }
        return header.tableOffset..<header.tableOffset + blockCount * 4
    }
    /// Where the whole table ends, with the entries that the disk does not need; at most the file's end.
    var tableEnd: UInt64 {
        guard let header else { return 0 }
        return max(tableRange.upperBound, min(fileLength, header.tableOffset + UInt64(header.maxTableEntries) * 4))
    }

    /// Reads the headers. `describesDamage`: a fixed image that is cut short is no error.
    init(_ storage: any Storage, rule: VHDSizeRule?, describesDamage: Bool) throws(DiskError) {
        fileLength = try storage.length()
        let found = try VHDFooterSearch(storage, length: fileLength)
        footer = found.footer
        footerBytes = found.bytes
        endFooterOffset = found.endOffset
        damagedFooterOffset = found.damagedEndOffset
        hasShortFooter = found.isShort && found.endOffset != nil
        if footer.type == .fixed {
            (header, parentPaths, damages) = (nil, [], found.damages)
            let room = found.endOffset ?? fileLength
            (sizeRule, virtualSize) = try Self.size(footer, rule, room: room)
            let isWhole = virtualSize <= room
            cutShort = isWhole ? nil : "the file is cut short: the disk has \(virtualSize) bytes, \(room) are there"
            if let cutShort, !describesDamage { throw DiskError(.invalidImage, cutShort) }
            return
        }
        cutShort = nil
        let start = footer.dataOffset
        guard start >= UInt64(VHDFooter.byteCount), start <= fileLength,
            fileLength - start >= UInt64(VHDDynamicHeader.byteCount)
        else {
            throw DiskError(.invalidImage, "the footer puts the dynamic header at byte \(start), outside the file")
        }
        let bytes = try storage.bytes(
            at: start, count: VHDDynamicHeader.byteCount, for: .header, "the dynamic header")
        let header = try VHDDynamicHeader(parsing: bytes)
        var damages = found.damages
        if !VHDDynamicHeader.hasRightChecksum(bytes) {
            damages.append(VHDDamage(.dynamicHeader, "the checksum of the dynamic header at byte \(start) is wrong"))
        }
        self.damages = damages
        self.header = header
        let room = UInt64(header.maxTableEntries) * header.blockSize
        (sizeRule, virtualSize) = try Self.size(footer, rule, room: room)
        parentPaths = footer.type == .differencing ? try Self.parentPaths(header, storage) : []
        try checkTable(header, room)
    }

    /// The size of the disk. Where nobody asked for one of the two, one for which there is no room is not meant.
    private static func size(
        _ footer: VHDFooter, _ asked: VHDSizeRule?, room: UInt64
    ) throws(DiskError) -> (VHDSizeRule, UInt64) {
        var rule = asked ?? VHDSizeRule(footer)
        if asked == nil, rule == .chs, rule.size(footer) > room { rule = .current }
        if asked == .chs, rule.size(footer) == 0 || rule.size(footer) > room {
            throw DiskError(
                .invalidArgument,
                "the geometry makes \(rule.size(footer)) bytes, which this image cannot have: "
                    + "\(VHDSizeRule.option)=current takes the size that the footer says")
        }
        return (rule, rule.size(footer))
    }

    private func checkTable(_ header: VHDDynamicHeader, _ room: UInt64) throws(DiskError) {
        guard virtualSize <= room else {
            throw DiskError(
                .invalidImage,
                "the disk has \(virtualSize) bytes, the table's \(header.maxTableEntries) blocks hold \(room)")
        }
        guard blockCount <= VHDDynamicHeader.entryLimit else {
            throw DiskError(
                .unsupported, "the disk has \(blockCount) blocks; \(VHDDynamicHeader.entryLimit) can be")
        }
        guard header.tableOffset % 4 == 0, header.tableOffset >= UInt64(VHDFooter.byteCount),
            header.tableOffset <= min(fileLength, TableSet.offsetLimit),
            tableRange.upperBound <= min(fileLength, TableSet.offsetLimit)
        else {
            throw DiskError(
                .invalidImage,
                "the file is cut short: the block allocation table has \(blockCount * 4) bytes from byte "
                    + "\(header.tableOffset) on, the file \(fileLength)")
        }
        guard !tableRange.overlaps(headerRange) else {
            throw DiskError(.invalidImage, "the block allocation table lies over the dynamic header")
        }
    }

    /// Reads the parent's paths, as far as they lie in the file.
    private static func parentPaths(
        _ header: VHDDynamicHeader, _ storage: any Storage
    ) throws(DiskError) -> [String] {
        var paths: [String] = []
        for platform in VHDParentLocator.Platform.order {
            for locator in header.locators where locator.platform == platform {
                guard (1...VHDParentLocator.lengthLimit).contains(locator.dataLength) else { continue }
                let data = try storage.availableBytes(
                    at: locator.dataOffset, count: Int(locator.dataLength), for: .header)
                if let path = locator.path(in: data), !paths.contains(path) { paths.append(path) }
            }
        }
        if !header.parentName.isEmpty, !paths.contains(header.parentName) { paths.append(header.parentName) }
        return paths
    }
}

extension VHDStructure {
    var identity: ImageIdentity { ImageIdentity(uuid: footer.uuid.isNull ? nil : footer.uuid) }

    /// The UUID of the parent, if it is recorded.
    var parentUUID: DiskUUID? {
        guard isDifferencing, let uuid = header?.parentUUID, !uuid.isNull else { return nil }
        return uuid
    }

    var parentLink: ParentLink? {
        isDifferencing
            ? ParentLink(paths: parentPaths, uuid: parentUUID, mustBeRecognized: parentUUID == nil) : nil
    }

    /// The parent must have the UUID that the child records. Its time stamp is not compared: programs disagree on what
    /// it is the time of, and copying a file changes it.
    func checkLink(to parent: any ImageBackend) throws(DiskError) {
        let name = parent.files.first ?? ""
        let found = parent.identity.uuid
        if let uuid = parentUUID, let found, uuid != found {
            throw DiskError(
                .brokenLink, "was made over the image with UUID \(uuid), but \(name) has UUID \(found)")
        }
        // A child of an image without an identity records none; then its name is all there is.
        guard (parentUUID == nil) == (found == nil) else {
            throw DiskError(.brokenLink, "records nothing by which \(name) could be recognised as its parent")
        }
    }

    /// What a person asks about the image.
    var properties: [ImageProperty] {
        let geometry = footer.geometry
        var list = [
            ImageProperty("type", "type", footer.type.name),
            ImageProperty("uuid", "UUID", footer.uuid.description),
            ImageProperty("creator", "creator", Self.printable(footer.creatorApplication)),
            ImageProperty(
                "creator-version", "creator version",
                "\(footer.creatorVersion >> 16).\(footer.creatorVersion & 0xffff)"),
            ImageProperty("creator-os", "creator's system", Self.printable(footer.creatorHostOS)),
            ImageProperty("created", "created", footer.timestamp.description),
            ImageProperty(
                "geometry", "geometry (CHS)", "\(geometry.cylinders)/\(geometry.heads)/\(geometry.sectors)"),
            ImageProperty("geometry-size", "size by geometry", String(geometry.byteCount)),
            ImageProperty("current-size", "current size", String(footer.currentSize)),
            ImageProperty("size-rule", "size taken from", sizeRule == .chs ? "geometry" : "current size"),
        ]
        if isDifferencing, let header {
            list.append(ImageProperty("parent-uuid", "parent UUID", header.parentUUID.description))
            list.append(ImageProperty("parent-created", "parent's time stamp", header.parentTimestamp.description))
            if !header.parentName.isEmpty {
                list.append(ImageProperty("parent-name", "parent file name", header.parentName))
            }
            if let path = parentPaths.first { list.append(ImageProperty("parent-path", "parent path", path)) }
        }
        if footer.savedState != 0 { list.append(ImageProperty("saved-state", "saved state", "yes")) }
        if hasShortFooter { list.append(ImageProperty("footer", "footer", "511 bytes")) }
        let damage = damages.map(\.message) + (cutShort.map { [$0] } ?? [])
        if !damage.isEmpty { list.append(ImageProperty("damage", "damage", damage.joined(separator: "; "))) }
        return list
    }

    private static func printable(_ bytes: [UInt8]) -> String {
        var text = ""
        for byte in bytes where byte != 0 {
            text.unicodeScalars.append((32..<127).contains(byte) ? Unicode.Scalar(byte) : "?")
        }
        while text.last == " " { text.removeLast() }
        return text
    }
}

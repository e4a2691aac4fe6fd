internal import DiskImage
internal import DiskStorage

extension VDIImage {
    var identity: ImageIdentity {
        let metadata = metadata
        return ImageIdentity(uuid: metadata.uuid, modificationUUID: metadata.modificationUUID)
    }

    /// A child stores no path: its parent is known by its UUID.
    var parentLink: ParentLink? {
        let header = stored.withLock { $0 }
        return header.isChild ? ParentLink(paths: [], uuid: header.parentUUID) : nil
    }

    /// The parent must have the UUID that is recorded, and the modification UUID, if one is (in version 0.x there is
    /// none).
    func checkLink(to parent: any ImageBackend) throws(DiskError) {
        let header = stored.withLock { $0 }
        let found = parent.identity
        let name = parent.files.first ?? ""
        guard let uuid = found.uuid, uuid == header.parentUUID else {
            throw DiskError(
                .brokenLink,
                "was made over the image with UUID \(header.parentUUID), but \(name) has "
                    + (found.uuid.map { "UUID \($0)" } ?? "none"))
        }
        guard !header.parentModificationUUID.isNull, let modification = found.modificationUUID,
            modification != header.parentModificationUUID
        else { return }
        throw DiskError(
            .brokenLink,
            "was made over modification \(header.parentModificationUUID) of its parent, but \(name) now has "
                + "modification \(modification): the parent was changed after this snapshot was taken")
    }

    // MARK: - Properties

    var properties: [ImageProperty] {
        let header = stored.withLock { $0 }
        var list = [
            ImageProperty("version", "version", header.versionName),
            ImageProperty("type", "type", header.type.name),
        ]
        func add(_ key: String, _ title: String, _ value: String?) {
            if let value, !value.isEmpty { list.append(ImageProperty(key, title, value)) }
        }
        func add(_ key: String, _ title: String, _ uuid: DiskUUID) {
            if !uuid.isNull { add(key, title, uuid.description) }
        }
        if header.headerSize > 0 { add("header-size", "header size", "\(header.headerSize) bytes") }
        if header.flags != 0 {
            let isZeroExpanding = header.flags & VDIHeader.zeroExpand != 0
            add("flags", "flags", "0x" + String(header.flags, radix: 16) + (isZeroExpanding ? " (zero-expand)" : ""))
        }
        add("uuid", "UUID", header.uuid)
        add("modification-uuid", "modification UUID", header.modificationUUID)
        add("parent-uuid", "parent UUID", header.parentUUID)
        add("parent-modification-uuid", "parent modification UUID", header.parentModificationUUID)
        add("comment", "comment", header.comment)
        add("geometry", "geometry (CHS)", header.geometry.description)
        add("geometry-bios", "BIOS geometry (CHS)", header.biosGeometry?.description)
        add("blocks", "blocks", String(header.blockCount))
        add("allocated-blocks", "allocated blocks", String(header.allocatedBlocks))
        add("map-offset", "block map at byte", String(header.mapOffset))
        add("data-offset", "blocks from byte", String(header.blocksOffset))
        if header.blockExtra > 0 { add("block-extra", "extra bytes of a block", String(header.blockExtra)) }
        if header.diskSize != header.virtualSize {
            add(
                "odd-size", "warning",
                "the size in the header, \(header.diskSize) bytes, is no multiple of 512: "
                    + "the last \(header.diskSize - header.virtualSize) bytes are not shown")
        }
        add("damage", "damage", damage)
        return list
    }
}

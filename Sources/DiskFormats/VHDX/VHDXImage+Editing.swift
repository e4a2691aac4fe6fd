internal import DiskImage
internal import DiskStorage

/// Changes of what a VHDX says of itself: each is one entry of its log, and therefore made as a whole or not at all.
extension VHDXImage: EditableBackend {
    var settableFields: ImageMetadata.Fields {
        isDifferencing ? [.uuid, .modificationUUID, .parentModificationUUID] : [.uuid, .modificationUUID]
    }

    var metadata: ImageMetadata {
        var metadata = ImageMetadata()
        metadata.uuid = identity.uuid
        metadata.modificationUUID = identity.modificationUUID
        metadata.parentModificationUUID = structure.metadata.parentLocator?.linkages.first
        return metadata
    }

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) {
        var changes = ImageChanges()
        changes.parent = .image(parent)
        _ = try newLocator(changes)
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        var settable = settableFields
        if case .image = changes.parent { settable.insert(.parentModificationUUID) }
        try changes.check(settable: settable, of: "VHDX")
        let storage = storages[0].storage
        var region = try VHDXMetadataRegion(storage, structure.metadataRange)
        // [MS-VHDX] 2.6.2.3: a child shows the ID of its parent's disk.
        if let uuid = changes.metadata.uuid ?? parentDiskID(changes) { try region.setVirtualDiskID(uuid) }
        let locator = try newLocator(changes)
        switch changes.parent {
        case .image: try region.setParent(locator)
        case nil where changes.metadata.parentModificationUUID != nil: try region.setParent(locator)
        case .some(.none) where isDifferencing: try region.setParent(nil)
        default: break
        }
        try flush()
        try writer.begin()
        if case .image = changes.parent, !isDifferencing { try makeRoomForBitmaps() }
        var pages = region.changedPages
        let losesParent = if case .some(.none) = changes.parent { isDifferencing } else { false }
        if losesParent { pages += try pagesOfWholeBlocks() }
        try commit(pages)
        if losesParent { try removeBitmaps() }
        if let guid = changes.metadata.modificationUUID { try writer.setDataWriteGUID(guid) }
    }

    /// The ID of a new parent's disk.
    private func parentDiskID(_ changes: ImageChanges) -> DiskUUID? {
        guard case .image(let parent) = changes.parent, parent.format == format else { return nil }
        return parent.identity.uuid
    }

    /// The parent locator as it shall be; nil: none.
    private func newLocator(_ changes: ImageChanges) throws(DiskError) -> VHDXParentLocator? {
        var locator = structure.metadata.parentLocator
        switch changes.parent {
        case .some(.none): return nil
        case .image(let parent):
            guard !structure.metadata.leavesBlocksAllocated else {
                throw DiskError(.unsupported, "a fixed VHDX cannot have a parent")
            }
            if parent.sectorSize != sectorSize, parent.sectorSize != 512 || parent.format == "vhdx" {
                throw DiskError(
                    .unsupported,
                    "the parent's disk has sectors of \(parent.sectorSize) bytes, this one's have \(sectorSize)")
            }
            locator = try VHDXCreator.locator(parent, files[0])
        case nil: break
        }
        if let uuid = changes.metadata.parentModificationUUID {
            locator = locator?.setting(VHDXParentLocator.Key.linkage, "{\(uuid)}")
        }
        return locator
    }

    /// Writes pages through the log, all or none of them, and takes over what the file says then. Everything else is
    /// in its place.
    func commit(_ pages: [TablePage]) throws(DiskError) {
        guard let file else { return }
        guard !pages.isEmpty else { return }
        guard pages.count <= file.log.pageLimit else {
            throw DiskError(
                .unsupported,
                "this changes \(pages.count) pages of its tables at once; its log has room for \(file.log.pageLimit)")
        }
        let storage = storages[0].storage
        try file.flushData()
        try storage.flush()
        try file.log.write(pages.sorted { $0.offset < $1.offset })
        try storage.flush()
        try adoptFile()
    }

    // MARK: - From a differencing image to a base

    /// Blocks that are here in parts become whole ones, with zeros in the other parts; answers the pages of the table
    /// that say so. (What is zeroed here is the parent's until then.)
    private func pagesOfWholeBlocks() throws(DiskError) -> [TablePage] {
        let storage = storages[0].storage
        var pages: [UInt64: FieldWriter] = [:]
        let pageSize = UInt64(VHDXLogEntryHeader.sectorSize)
        let limit = writer.log.pageLimit
        try VHDXTableScan.forEachEntry(structure, storage) { (entry, item) throws(DiskError) in
            guard item.isPayload, entry.state == VHDXEntry.PayloadState.partiallyPresent else { return }
            let place = entries.place(ofBlock: item.number)
            let page = place & ~(pageSize - 1)
            if pages[page] == nil {
                guard pages.count < limit else {
                    throw DiskError(
                        .unsupported, "it has more blocks of which the parent has parts than its log has room for")
                }
                pages[page] = FieldWriter(
                    try storage.bytes(at: page, count: Int(pageSize), for: .table, "the block allocation table"))
            }
            try clearAbsentSectors(of: item.number, at: entry.offset)
            pages[page]?.littleEndian(
                VHDXEntry(VHDXEntry.PayloadState.fullyPresent, at: entry.offset).rawValue, at: Int(place - page))
        }
        try storage.flush()
        return pages.map { TablePage(offset: $0.key, bytes: $0.value.bytes) }
    }

    private func clearAbsentSectors(of block: UInt64, at start: UInt64) throws(DiskError) {
        let bits = try bitmapStart(block)
        var done: UInt64 = 0
        var batch = ExtentBatch()
        while done < blockSize {
            batch.removeAll()
            _ = try bitmap.map(bits, done, blockSize - done, at: start + done, into: &batch)
            for number in 0..<batch.count {
                let length = batch[number].length
                if batch[number].kind == .absent {
                    try storages[0].discard(start + done..<start + done + length, for: .guestData)
                }
                done += length
            }
        }
    }

    /// Sector bitmaps mean nothing in a base.
    private func removeBitmaps() throws(DiskError) {
        var found: [(place: UInt64, offset: UInt64)] = []
        try VHDXTableScan.forEachEntry(structure, storages[0].storage) { (entry, item) in
            guard !item.isPayload else { return }
            found.append((entries.place(ofBitmapFor: item.number << entries.chunkShift), entry.offset))
        }
        for bitmap in found { try store(VHDXEntry(VHDXEntry.BitmapState.notPresent), at: bitmap.place) }
        try flush()
        if !found.isEmpty { writer.noteGivenUp() }
    }

    // MARK: - From a base to a differencing image

    /// A differencing image's table has an entry for the bitmap of the last chunk too.
    private func makeRoomForBitmaps() throws(DiskError) {
        var metadata = structure.metadata
        metadata.hasParent = true
        let table = VHDXBlockAllocationTable(metadata, offset: entries.offset)
        if table.byteCount > tableRoom {
            try moveTable(to: table.byteCount)
        } else {
            try clearEntries(from: entries.entryCount, to: table.entryCount)
        }
        // A base's bitmaps mean nothing, a child's do.
        try removeBitmaps()
    }
}

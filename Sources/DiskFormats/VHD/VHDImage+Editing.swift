internal import DiskImage
internal import DiskStorage

/// Changes of what a dynamic or differencing VHD says of itself and its parent.
///
/// The footer at the file's end is a sector, which is written as a whole: by it a change happens. It says where the
/// dynamic header lies. So another header is written where nothing is, with what it leads to; then the footers name it;
/// then it is written where it belongs, and the footers name that place again.
extension VHDImage: EditableBackend {
    var settableFields: ImageMetadata.Fields {
        isDifferencing ? [.uuid, .parentUUID, .physicalGeometry] : [.uuid, .physicalGeometry]
    }

    var metadata: ImageMetadata {
        var metadata = ImageMetadata()
        metadata.uuid = structure.identity.uuid
        metadata.parentUUID = structure.parentUUID
        metadata.physicalGeometry = structure.footer.geometry
        return metadata
    }

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) {
        var header = structure.header
        _ = try header?.setParent(parent, pathsAt: 0)
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        var settable = settableFields
        if case .image = changes.parent { settable.insert(.parentUUID) }
        try changes.check(settable: settable, of: "VHD")
        guard !changes.isEmpty, var header = structure.header else { return }
        var footer = structure.footer
        if let uuid = changes.metadata.uuid { footer.uuid = uuid }
        if let geometry = changes.metadata.physicalGeometry {
            try footer.setGeometry(geometry, keeping: virtualSize, askedRule)
        }
        switch changes.parent {
        case .image: footer.type = .differencing
        case .some(.none):
            footer.type = .dynamic
            header.removeParent()
        case nil: break
        }
        let place = try settle()
        try settlingAfterFailure { () throws(DiskError) in try change(header, footer, changes, footerAt: place) }
        try adoptFile()
    }

    private func change(
        _ header: VHDDynamicHeader, _ footer: VHDFooter, _ changes: ImageChanges, footerAt place: UInt64
    ) throws(DiskError) {
        var header = header
        var paths: [(offset: UInt64, bytes: [UInt8])] = []
        if case .image(let parent) = changes.parent {
            paths = try header.setParent(parent, pathsAt: place + UInt64(VHDFooter.byteCount))
        }
        if let uuid = changes.metadata.parentUUID { header.parentUUID = uuid }
        try prepareBitmaps(for: footer.type)
        if header == structure.header {
            try writer.write(footer.encode(over: structure.footerBytes), at: place)
        } else {
            for path in paths { try storages[0].storage.write(path.bytes, at: path.offset, for: .header) }
            let end = paths.last.map { $0.offset + UInt64($0.bytes.count) } ?? place + UInt64(VHDFooter.byteCount)
            try replace(header, footer, footerAt: place, newEnd: end)
        }
    }

    /// Runs a change of the headers; where it fails, the file ends again with the footer that counts.
    func settlingAfterFailure(_ body: () throws(DiskError) -> Void) throws(DiskError) {
        do throws(DiskError) {
            try body()
        } catch {
            _ = try? writer.settle(usedEnd: end.value)  // if not, the footer's copy is used
            throw error
        }
    }

    /// Makes everything durable that was written, and the file end with its footer behind what is in use; answers where
    /// that lies.
    func settle() throws(DiskError) -> UInt64 {
        try flush()
        try writer.begin(restoring: structure.damages)
        let storage = storages[0].storage
        let usedEnd = writer.hasGivenUp ? try VHDTableScan(structure, storage, limit: end.value).end : end.value
        return try writer.settle(usedEnd: usedEnd)
    }

    /// Writes another dynamic header and another footer. The present footer lies at `place`; from behind it to `end`
    /// lies what the new header leads to.
    func replace(
        _ header: VHDDynamicHeader, _ footer: VHDFooter, footerAt place: UInt64, newEnd end: UInt64
    ) throws(DiskError) {
        let storage = storages[0].storage
        let usual = structure.headerRange
        let bytes = header.encode(
            over: try storage.bytes(
                at: usual.lowerBound, count: VHDDynamicHeader.byteCount, for: .header, "the dynamic header"))
        let footerSize = UInt64(VHDFooter.byteCount)
        guard let start = end.alignedUp(to: footerSize) else { return }
        let newPlace = start + UInt64(VHDDynamicHeader.byteCount)
        try storage.write(bytes, at: start, for: .header)
        try storage.flush()
        var footer = footer
        footer.dataOffset = start
        // (Before the footer says so: what it leads to must not be cut off, whatever fails.)
        writer.setEnd(newPlace)
        try writer.write(footer.encode(over: structure.footerBytes), at: newPlace)
        // Where the present footer was, nothing looks any more.
        try storage.writeZeros(place..<place + footerSize, for: .footer)
        // What shares a sector with the table may be written again as it was.
        let sectors = usual.lowerBound & ~511..<(usual.upperBound + 511) & ~511
        guard sectors == usual, usual.upperBound <= place,
            !sectors.overlaps(header.tableOffset & ~511..<header.tableOffset + UInt64(header.maxTableEntries) * 4)
        else { return }
        try storage.write(bytes, at: usual.lowerBound, for: .header)
        try storage.flush()
        footer.dataOffset = usual.lowerBound
        let final = footer.encode(over: structure.footerBytes)
        try writer.write(final, at: newPlace)
        try writer.write(final, at: start)
        try storage.setLength(start + footerSize)
        try storage.flush()
        writer.setEnd(start)
    }

    // MARK: - Sector bitmaps

    /// In a dynamic image a block is here as a whole, whatever its bitmap says; in a differencing one the bitmap
    /// counts. (What is zeroed here is the parent's until then.)
    private func prepareBitmaps(for type: VHDFooter.DiskType) throws(DiskError) {
        guard type != structure.footer.type else { return }
        let storage = storages[0].storage
        try VHDTableScan.forEachEntry(structure, storage) { (entry, block) throws(DiskError) in
            let start = UInt64(entry) * 512
            if type == .differencing {
                if tables.needsFlush { try flush() }
                try setBits(0..<sectorsPerBlock, block, start)
            } else {
                try clearAbsentSectors(start)
            }
        }
        try flush()
        try storage.flush()
    }

    private func clearAbsentSectors(_ start: UInt64) throws(DiskError) {
        let data = start + bitmapSize
        var done: UInt64 = 0
        var batch = ExtentBatch()
        while done < blockSize {
            batch.removeAll()
            _ = try bitmap.map(start, done, blockSize - done, at: data + done, into: &batch)
            for number in 0..<batch.count {
                let length = batch[number].length
                let stop = min(data + done + length, end.value)
                if batch[number].kind == .absent, data + done < stop {
                    try storages[0].discard(data + done..<stop, for: .guestData)
                }
                done += length
            }
        }
    }
}

extension VHDFooter {
    /// Notes another geometry, as long as the disk has the same size by it.
    mutating func setGeometry(
        _ geometry: DiskGeometry, keeping size: UInt64, _ asked: VHDSizeRule?
    ) throws(DiskError) {
        guard geometry.cylinders <= 0xffff, geometry.heads <= 0xff, geometry.sectors <= 0xff else {
            throw DiskError(
                .unsupported, "a VHD stores up to 65535 cylinders, 255 heads and 255 sectors of a geometry")
        }
        self.geometry = geometry
        guard (asked ?? VHDSizeRule(self)).size(self) == size else {
            throw DiskError(
                .unsupported,
                "its disk's size is that of its geometry: with \(geometry.cylinders)/\(geometry.heads)/"
                    + "\(geometry.sectors) it would have \(geometry.byteCount) bytes instead of \(size)")
        }
    }

    /// Notes another size, and a geometry by which the disk has it. The original size, which is that of the image when
    /// it was made and means nothing, becomes the same: libvhdi takes it for the disk's.
    mutating func setSize(_ size: UInt64, _ asked: VHDSizeRule?) throws(DiskError) {
        guard size > 0, size % 512 == 0, size <= VHDCreator.sizeLimit else {
            throw DiskError(
                .unsupported, "a disk of \(size) bytes cannot be: a VHD's has a multiple of 512, up to 2040 GiB")
        }
        (originalSize, currentSize) = (size, size)
        geometry = asked == .chs ? DiskGeometry(vhdSectorCount: size / 512) : .newVHD(size: size)
        guard (asked ?? VHDSizeRule(self)).size(self) == size else {
            let below = geometry.byteCount
            throw DiskError(
                .unsupported,
                "by its geometry, as \(VHDSizeRule.option)=chs asks for, the disk cannot have \(size) bytes; "
                    + "\(below) it can")
        }
    }
}

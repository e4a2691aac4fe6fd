internal import DiskImage
internal import DiskStorage

/// Changes of what a QED image says of itself, which is the name of its backing file alone.
extension QEDImage: EditableBackend {
    var settableFields: ImageMetadata.Fields { [] }
    var metadata: ImageMetadata { ImageMetadata() }

    /// Bytes of a backing file's name at most: QEMU reads no longer ones.
    private static let nameLimit = 1023

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) { _ = try storedName(of: parent) }

    /// How the image names that backing file.
    private func storedName(of parent: CreateRequest.ParentDescription) throws(DiskError) -> [UInt8] {
        let name = Array(QEMUFileName.stored(parent.path).utf8)
        guard 1...Self.nameLimit ~= name.count else {
            throw DiskError(
                .unsupported, "the backing file's path has \(name.count) bytes; \(Self.nameLimit) can be")
        }
        return name
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        try changes.check(settable: settableFields, of: "QED")
        guard let change = changes.parent else { return }
        var new = header
        new.features.subtract([.backingFile, .backingFormatNoProbe])
        new.autoclearFeatures = 0
        (new.backingFilenameOffset, new.backingFilenameSize) = (0, 0)
        var name: [UInt8] = []
        if case .image(let parent) = change {
            name = try storedName(of: parent)
            new.features.insert(.backingFile)
            if parent.format == "raw" { new.features.insert(.backingFormatNoProbe) }
            new.backingFilenameSize = UInt64(name.count)
            new.backingFilenameOffset = try place(forNameOf: UInt64(name.count))
        }
        try flush()
        let isInSector = new.backingFilenameOffset + new.backingFilenameSize <= UInt64(QEDFile.sectorSize)
        if !isInSector {
            try storages[0].storage.write(name, at: new.backingFilenameOffset, for: .header)
            try storages[0].storage.flush()
        }
        try writableFile.writeHeader(new, name: isInSector ? name : [])
        header = new
        backingFilename = name.isEmpty ? nil : String(decoding: name, as: UTF8.self)
    }

    /// Where a name goes: behind the header in its sector if it fits; else elsewhere in the header's clusters, not over
    /// the present one.
    private func place(forNameOf count: UInt64) throws(DiskError) -> UInt64 {
        let first = UInt64(QEDHeader.byteCount)
        if first + count <= UInt64(QEDFile.sectorSize) { return first }
        let present =
            header.features.contains(.backingFile)
            ? header.backingFilenameOffset..<header.backingFilenameOffset + header.backingFilenameSize : 0..<0
        // The smallest cluster has 4096 bytes.
        for place in [UInt64(QEDFile.sectorSize), 2048, present.upperBound]
        where place + count <= header.firstClusterOffset && !present.overlaps(place..<place + count) {
            return place
        }
        throw DiskError(
            .unsupported, "the backing file's path has \(count) bytes, for which the header has no room beside the old")
    }
}

/// Another size of the disk: a field of the header. The L1 table reaches as far as it was made for.
extension QEDImage {
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        try checkResizable(storages[0].storage)
        let limit = QEDHeader.imageSizeLimit(clusterSize: header.clusterSize, tableSize: header.tableSize)
        guard size > 0, size % 512 == 0, size <= limit else {
            throw DiskError(
                .unsupported,
                "a disk of \(size) bytes cannot be: with its tables this image's has a multiple of 512 up to \(limit)")
        }
        let old = header.imageSize
        guard size != old else { return }
        var new = header
        new.imageSize = size
        new.autoclearFeatures = 0
        try flush()
        if size > old {
            // What lies behind the end is seen now. Nothing should be there.
            _ = try removeClusters(from: header.clusterCount)
            try clearLastCluster(old)
            let end = min(size, parentEnd)
            if end > old {
                try writableFile.markNeedCheck()
                for cluster in header.clusterCount..<max(header.clusterCount, end.dividedRoundingUp(by: blockSize)) {
                    if tableSet.needsFlush { try flush() }
                    try setEntry(QEDTables.zeroCluster, at: cluster * blockSize)
                }
            }
            try flush()
            try writableFile.writeHeader(new)
        } else {
            try writableFile.writeHeader(new)
            var free = try removeClusters(from: new.clusterCount)
            try flush()
            try giveBack(&free)
        }
        header = new
        isResized = true
    }

    /// Makes what the last cluster holds behind the disk's end zeros.
    private func clearLastCluster(_ size: UInt64) throws(DiskError) {
        guard size % blockSize != 0 else { return }
        var batch = ExtentBatch()
        try tables.map(offset: size - 1, length: 1, into: &batch)
        guard batch[0].kind == .data else { return }
        let start = batch[0].fileOffset + 1
        try storages[0].storage.writeZeros(start..<start + (blockSize - size % blockSize), for: .guestData)
        storages[0].noteWrite()
    }

    /// Clears all entries from a cluster of the disk on; answers the file's clusters that they led to.
    private func removeClusters(from first: UInt64) throws(DiskError) -> FreeBlocks {
        var free = FreeBlocks(blockSize: blockSize)
        let scanner = QEDTableScanner(storage: storages[0].storage, tableBytes: header.tableBytes)
        let header = header
        try scanner.forEachEntry(of: header.l1TableOffset) { (l1Place, table) throws(DiskError) in
            let index = (l1Place - header.l1TableOffset) / 8
            guard (index + 1) << header.tableShift > first else { return }
            guard tables.isTable(table) else { throw damaged("L2 table", table, at: l1Place) }
            let isWhole = index << header.tableShift >= first
            try scanner.forEachEntry(of: table) { (place, entry) throws(DiskError) in
                let cluster = index << header.tableShift + (place - table) / 8
                guard cluster >= first else { return }
                if entry != QEDTables.zeroCluster {
                    guard tables.isCluster(entry) else { throw damaged("cluster", entry, at: place) }
                    free.add(entry, isZero: false)
                }
                if !isWhole { try store(0, at: place, .entry) }
            }
            guard isWhole else { return }
            try store(0, at: l1Place, .directory)
            free.add(FreeBlocks.Run(offset: table, count: header.tableSize, isZero: false))
        }
        return free
    }

    private func damaged(_ what: StaticString, _ offset: UInt64, at place: UInt64) -> DiskError {
        DiskError(
            .needsRepair,
            "an entry puts its \(what) at byte \(offset), where none can be: run 'vdimg check --repair' first",
            image: files[0], offset: place)
    }

    /// Gives the space of clusters to which nothing leads any more back to the file system, and what is behind the last
    /// one in use.
    private func giveBack(_ free: inout FreeBlocks) throws(DiskError) {
        let storage = storages[0].storage
        var usedEnd = max(header.firstClusterOffset, header.l1TableOffset + header.tableBytes)
        let scanner = QEDTableScanner(storage: storage, tableBytes: header.tableBytes)
        try scanner.forEachEntry(of: header.l1TableOffset) { (_, table) throws(DiskError) in
            usedEnd = max(usedEnd, table + header.tableBytes)
            try scanner.forEachEntry(of: table, skipping: QEDTables.zeroCluster) { (_, entry) in
                usedEnd = max(usedEnd, entry + blockSize)
            }
        }
        let length = try storage.length()
        while let run = free.take(.max) {
            let range = run.offset..<min(length, run.offset + run.count * blockSize)
            if range.lowerBound < min(usedEnd, length) { try storage.discard(range, mustZero: false, for: .guestData) }
        }
        if usedEnd < length { try storage.setLength(usedEnd) }
        try storage.flush()
    }
}

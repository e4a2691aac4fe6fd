internal import DiskImage
internal import DiskStorage

extension QCOW2TableWalk {
    /// Looks at an L2 entry; answers what counts of it: as it is, as it was repaired, or nothing.
    mutating func checkL2Entry(
        _ entry: UInt64, _ bitmap: QCOW2SubclusterBitmap, at place: UInt64, _ cluster: UInt64, _ owner: String?
    ) throws(DiskError) -> (UInt64, QCOW2SubclusterBitmap) {
        var fixed = entry
        var fixedBitmap = bitmap
        let problem =
            entry & QCOW2Entry.compressed != 0
            ? checkCompressed(&fixed, &fixedBitmap) : checkStandard(&fixed, &fixedBitmap, cluster)
        guard let problem else { return (entry, bitmap) }
        let whose = owner.map { " of snapshot '\($0)'" } ?? ""
        note(problem.severity, "cluster \(cluster)\(whose) \(problem.message)", isRepaired: isRepairing)
        if isRepairing {
            try store(fixed, at: place)
            if map.hasSubclusters { try store(fixedBitmap.rawValue, at: place + 8) }
        }
        return (fixed, fixedBitmap)
    }

    private typealias Problem = (severity: CheckReport.Severity, message: String)

    private func checkCompressed(_ entry: inout UInt64, _ bitmap: inout QCOW2SubclusterBitmap) -> Problem? {
        let stored = QCOW2CompressedCluster(entry, clusterBits: map.clusterBits)
        if header.hasDataFile {
            (entry, bitmap) = (0, .none)
            return (.loss, "is compressed, which cannot be with an external data file")
        }
        // The last sector may end with the file.
        guard stored.offset < image.end.value, stored.offset + stored.count <= image.end.value + header.clusterSize
        else {
            let message = "is compressed at byte \(stored.offset), outside the file"
            (entry, bitmap) = (0, .none)
            return (.loss, message)
        }
        if entry & QCOW2Entry.copied != 0 {
            entry &= ~QCOW2Entry.copied
            return (.repairable, "is compressed and is marked as one that may be written where it is")
        }
        if bitmap != .none, map.hasSubclusters {
            bitmap = .none
            return (.repairable, "is compressed and has subclusters")
        }
        return nil
    }

    private func checkStandard(
        _ entry: inout UInt64, _ bitmap: inout QCOW2SubclusterBitmap, _ cluster: UInt64
    ) -> Problem? {
        let host = entry & QCOW2Entry.offsetMask
        let isPlaced =
            header.hasDataFile
            ? host == 0 && entry & QCOW2Entry.copied == 0 || host == cluster << map.clusterBits
            : host & (header.clusterSize - 1) == 0 && host + header.clusterSize <= image.end.value
        guard isPlaced else {
            let isZero = map.hasSubclusters ? bitmap.allocated == 0 : entry & QCOW2Entry.zero != 0
            // What reads as zeros does so without a place too.
            entry = isZero && !map.hasSubclusters ? QCOW2Entry.zero : 0
            bitmap = QCOW2SubclusterBitmap(allocated: 0, zero: bitmap.zero)
            return (isZero ? .repairable : .loss, "is said to be at byte \(host), where none can be")
        }
        let reserved = QCOW2Entry.l2Reserved | (map.hasSubclusters ? QCOW2Entry.zero : 0)
        if entry & reserved != 0 {
            entry &= ~reserved
            return (.repairable, "has reserved bits set in its L2 entry")
        }
        if entry & QCOW2Entry.zero != 0, !map.knowsZeroClusters {
            entry &= ~QCOW2Entry.zero
            return (.loss, "is marked as one of zeros, which version 2 does not have")
        }
        if host == 0, entry & QCOW2Entry.copied != 0, !header.hasDataFile {
            entry &= ~QCOW2Entry.copied
            return (.repairable, "has no place and is marked as one that may be written where it is")
        }
        guard map.hasSubclusters else { return nil }
        let hasPlace = host != 0 || header.hasDataFile && entry & QCOW2Entry.copied != 0
        if !hasPlace, bitmap.allocated != 0 {
            bitmap = QCOW2SubclusterBitmap(allocated: 0, zero: bitmap.zero)
            return (.loss, "has no place, and subclusters that are said to be stored there")
        }
        if bitmap.isInvalid {
            bitmap = QCOW2SubclusterBitmap(allocated: bitmap.allocated, zero: bitmap.zero & ~bitmap.allocated)
            return (.repairable, "has subclusters that are said to be stored and to be zeros; they count as stored")
        }
        return nil
    }

    // MARK: - Refcount blocks

    mutating func walkRefcountTable() throws(DiskError) {
        let (offset, entries) = allocator.state.withLock { ($0.refcountTableOffset, $0.refcountTableEntries) }
        count(offset, entries * 8)
        var place = offset
        let end = offset + entries * 8
        var blocks: UInt64 = 0
        while place < end {
            let entry = try image.table.bigEndian64(at: place)
            if entry == 0 {
                place = max(place + 8, try image.table.endOfRun(of: 0, in: place..<end) & ~7)
                continue
            }
            let block = entry & QCOW2Entry.refcountBlockMask
            blocks += 1
            guard blocks <= tableLimit else {
                isIncomplete = true
                return note(.loss, "the refcount table names more blocks than the file can have")
            }
            if isPossibleBlock(block) {
                counts.add(block >> map.clusterBits)
            } else {
                let index = (place - offset) / 8
                note(.repairable, "refcount block \(index) cannot be at byte \(block)", isRepaired: isRepairing)
                addBadBlock(index)
            }
            place += 8
        }
    }

    func isPossibleBlock(_ block: UInt64) -> Bool {
        block != 0 && block & (header.clusterSize - 1) == 0 && block < image.end.value
    }

    mutating func addBadBlock(_ index: UInt64) {
        if badBlocks.count < Self.badBlockLimit { badBlocks.append(index) }
    }

    // MARK: - Bitmaps

    /// What bitmaps use, where they are valid: those that are not are used by nothing any more.
    mutating func walkBitmaps() throws(DiskError) {
        guard header.autoclear.contains(.bitmaps), let directory = image.extensions.bitmapDirectory else { return }
        guard directory.size <= QCOW2BitmapDirectory.byteLimit, count(directory.offset, directory.size) else {
            return note(.loss, "the bitmap directory lies outside the file")
        }
        let storage = image.storages[0].storage
        var budget = try storage.allocatedBytes() / 4 + 1 << 20
        var offset = directory.offset
        for number in 0..<directory.count {
            let left = directory.offset + directory.size - offset
            guard left >= UInt64(QCOW2BitmapEntry.fixedByteCount) else {
                return note(.loss, "the bitmap directory ends before bitmap \(number)")
            }
            let bitmap = try QCOW2BitmapEntry(
                parsing: storage.bytes(
                    at: offset, count: QCOW2BitmapEntry.fixedByteCount, for: .table, "the bitmap directory"))
            guard bitmap.byteCount <= left, bitmap.tableSize <= QCOW2BitmapEntry.tableLimit,
                bitmap.tableOffset & 7 == 0, count(bitmap.tableOffset, UInt64(bitmap.tableSize) * 8)
            else { return note(.loss, "bitmap \(number) is damaged") }
            var place = bitmap.tableOffset
            let end = place + UInt64(bitmap.tableSize) * 8
            while place < end {
                guard budget > 0 else { return note(.note, "there are too many bitmaps: not all are looked at") }
                budget -= 1
                let entry = try image.table.bigEndian64(at: place)
                if entry == 0 {
                    place = max(place + 8, try image.table.endOfRun(of: 0, in: place..<end) & ~7)
                    continue
                }
                let data = entry & QCOW2Entry.offsetMask
                if data != 0, data & (header.clusterSize - 1) != 0 || !count(data, header.clusterSize) {
                    note(.loss, "bitmap \(number) has a cluster at byte \(data), where none can be")
                }
                place += 8
            }
            offset += bitmap.byteCount
        }
    }
}

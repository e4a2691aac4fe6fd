internal import DiskImage
internal import DiskStorage

/// Another size of the disk (QEMU, docs/interop/qcow2, "Header": size, l1_size, l1_table_offset, which lie in the first
/// sector).
///
/// A larger disk first gets a longer L1 table, then entries for what must hide the parent's bytes, then its size. A
/// smaller one first gets its size, and then what lies behind its end is given up.
extension QCOW2Image {
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        try checkResizable(storages[0].storage)
        let needed = try checkSize(size)
        let old = header.size
        guard size != old else { return }
        try openAllocator.flushAll()
        try beginWriting()
        if size > old {
            try growDataFile(to: size)
            // What lies behind the end is seen now. Nothing should be there.
            try removeClusters(from: old.dividedRoundingUp(by: header.clusterSize))
            try clearLastCluster(old)
            try openAllocator.flushAll()
            try growL1Table(to: needed)
            try hideParent(from: old, to: min(size, parentEnd))
            try openAllocator.flushAll()
            try writeSize(size)
        } else {
            try writeSize(size)
            try removeClusters(from: size.dividedRoundingUp(by: header.clusterSize))
            try openAllocator.flushAll()
            try openAllocator.cutOff()
            if header.hasDataFile {
                try storages[1].storage.setLength(size)
                try storages[1].storage.flush()
            }
        }
        isResized = true
    }

    /// Whether the disk can have a size; answers how many entries its L1 table needs.
    private func checkSize(_ size: UInt64) throws(DiskError) -> UInt64 {
        guard size > 0, size % 512 == 0, size <= UInt64(Int64.max) & ~511 else {
            throw DiskError(.unsupported, "a disk of \(size) bytes cannot be: it must be a multiple of 512, below 2^63")
        }
        let needed = header.l1EntryCount(for: size)
        guard needed * 8 <= QCOW2Header.l1ByteLimit else {
            throw DiskError(
                .unsupported,
                "with clusters of \(header.clusterSize) bytes the disk has "
                    + "\(QCOW2Header.l1ByteLimit / 8 * header.l2Coverage) bytes at most")
        }
        guard header.snapshotCount > 0 else { return needed }
        var unsized: String?
        try QCOW2SnapshotTable(header, storages[0].storage).visit { snapshot in
            if snapshot.diskSize == nil { unsized = snapshot.name }
            return unsized == nil
        }
        if header.version < 3 || unsized != nil {
            throw DiskError(
                .unsupported, "it has internal snapshots that do not record their disk's size: delete them first")
        }
        return needed
    }

    // MARK: - Header

    private func writeSize(_ size: UInt64) throws(DiskError) {
        var field = FieldWriter(count: 8)
        field.bigEndian(size, at: 0)
        try storages[0].storage.write(field.bytes, at: 24, for: .header)
        try storages[0].storage.flush()
        header.size = size
    }

    /// Gives the L1 table room for `count` entries: where it is, as far as its last cluster goes, or at the file's end.
    private func growL1Table(to count: UInt64) throws(DiskError) {
        let oldCount = UInt64(header.l1Size)
        guard count > oldCount else { return }
        let oldClusters = (oldCount * 8).dividedRoundingUp(by: header.clusterSize)
        let storage = storages[0].storage
        let oldEnd = header.l1TableOffset + oldCount * 8
        guard (count * 8).dividedRoundingUp(by: header.clusterSize) > oldClusters else {
            try storage.writeZeros(oldEnd..<header.l1TableOffset + count * 8, for: .table)
            try storage.flush()
            try writeL1(header.l1TableOffset, count)
            // (The cache may hold the table's last page as it was.)
            return try reloadTables()
        }
        let clusters = (count * 8).dividedRoundingUp(by: header.clusterSize)
        let start = try openAllocator.takeTogether(clusters)
        try openAllocator.flushAll()
        let step: UInt64 = 64 << 10
        var position: UInt64 = 0
        while position < oldCount * 8 {
            let part = min(step, oldCount * 8 - position)
            try storage.write(
                storage.bytes(at: header.l1TableOffset + position, count: Int(part), for: .table, "the L1 table"),
                at: start + position, for: .table)
            position += part
        }
        try storage.flush()
        let old = header.l1TableOffset
        try writeL1(start, count)
        try reloadTables()
        if oldClusters > 0 { openAllocator.giveUp(old, count: oldClusters) }
    }

    private func writeL1(_ offset: UInt64, _ count: UInt64) throws(DiskError) {
        var fields = FieldWriter(count: 12)
        fields.bigEndian(UInt32(count), at: 0)
        fields.bigEndian(offset, at: 4)
        try storages[0].storage.write(fields.bytes, at: 36, for: .header)
        try storages[0].storage.flush()
        (header.l1Size, header.l1TableOffset) = (UInt32(count), offset)
        (map.l1Offset, map.l1Size) = (offset, count)
    }

    /// Brings the cached pages of the L1 table up to what is in the file.
    private func reloadTables() throws(DiskError) {
        let storage = storages[0].storage
        let step: UInt64 = 64 << 10
        var position: UInt64 = 0
        let size = map.l1Size * 8
        while position < size {
            let part = min(step, size - position)
            let fields = FieldReader(
                try storage.bytes(at: map.l1Offset + position, count: Int(part), for: .table, "the L1 table"))
            for inPart in stride(from: 0, to: part, by: 8) {
                let word: UInt64 = try fields.littleEndian(at: Int(inPart))
                if try table.entry64(at: map.l1Offset + position + inPart) != word {
                    try openAllocator.store(word, at: map.l1Offset + position + inPart, .directory)
                }
            }
            position += part
        }
    }

    private func growDataFile(to size: UInt64) throws(DiskError) {
        guard header.hasDataFile else { return }
        let storage = storages[1].storage
        try checkResizable(storage)
        let length = try storage.length()
        // What it holds behind the disk's end would be seen.
        if length > header.size { try storage.setLength(header.size) }
        try storage.setLength(size)
        try storage.flush()
    }

    // MARK: - Clusters

    /// Makes entries of zeros for what the parent holds in a range behind the disk's end, from its first whole cluster.
    private func hideParent(from old: UInt64, to end: UInt64) throws(DiskError) {
        guard end > old else { return }
        let first = old.dividedRoundingUp(by: header.clusterSize)
        for cluster in first..<max(first, end.dividedRoundingUp(by: header.clusterSize)) {
            if openAllocator.needsFlush { try openAllocator.flush() }
            let place = try writablePlace(of: cluster)
            if map.hasSubclusters {
                try store(QCOW2ExtendedEntry(entry: 0, bitmap: .allZero), at: place)
            } else if map.knowsZeroClusters {
                try store(QCOW2ExtendedEntry(entry: QCOW2Entry.zero, bitmap: .none), at: place)
            } else {
                // Version 2 has no mark for zeros.
                let run = try openAllocator.take(1)
                if !run.isZero {
                    try storages[0].storage.writeZeros(
                        run.offset..<run.offset + header.clusterSize, for: .guestData)
                }
                storages[0].noteWrite()
                try store(QCOW2ExtendedEntry(entry: run.offset | QCOW2Entry.copied, bitmap: .none), at: place)
            }
        }
    }

    /// Makes what the cluster in which the disk ends holds behind its end zeros. One that others use too, or that is
    /// compressed, moves.
    private func clearLastCluster(_ size: UInt64) throws(DiskError) {
        let inCluster = size & (header.clusterSize - 1)
        guard inCluster != 0, !header.hasDataFile else { return }
        let cluster = size >> map.clusterBits
        let start = size - inCluster
        let (pair, isExclusive) = try entry(of: cluster)
        if pair.entry & QCOW2Entry.compressed == 0 {
            let host = pair.entry & QCOW2Entry.offsetMask
            guard host != 0 else { return }
            try map.checkCluster(host, start, 0)
            if isExclusive, pair.entry & QCOW2Entry.copied != 0 {
                try clear(host + inCluster..<host + header.clusterSize)
                guard map.hasSubclusters else { return }
                // What lies behind the end's subcluster is not there, or is zeros.
                let behind = inCluster.dividedRoundingUp(by: 1 << map.subclusterBits)
                let mask = QCOW2SubclusterBitmap.mask(behind..<QCOW2SubclusterBitmap.count)
                let bitmap = QCOW2SubclusterBitmap(
                    allocated: pair.bitmap.allocated & ~mask, zero: pair.bitmap.zero | mask)
                return try store(QCOW2ExtendedEntry(entry: pair.entry, bitmap: bitmap), at: writablePlace(of: cluster))
            }
            // A cluster of zeros needs no other place.
            if !map.hasSubclusters, pair.entry & QCOW2Entry.zero != 0 { return }
        }
        try moveLastCluster(cluster, start, inCluster, pair)
    }

    private func clear(_ range: Range<UInt64>) throws(DiskError) {
        try storages[0].storage.writeZeros(range, for: .guestData)
        storages[0].noteWrite()
    }

    /// Copies the cluster in which the disk ends to a place of its own, with zeros behind the disk's end.
    private func moveLastCluster(
        _ cluster: UInt64, _ start: UInt64, _ count: UInt64, _ old: QCOW2ExtendedEntry
    ) throws(DiskError) {
        let storage = storages[0].storage
        var bytes = [UInt8](repeating: 0, count: Int(header.clusterSize))
        let isCompressed = old.entry & QCOW2Entry.compressed != 0
        try bytes.withIOBuffer { (buffer) throws(DiskError) in
            let part = buffer.slice(0, Int(count))
            if isCompressed {
                try readEncoded(
                    Extent(.encoded, length: count, fileOffset: old.entry & (QCOW2Entry.compressed - 1)), into: part)
            } else {
                try storage.readPadded(into: part, at: old.entry & QCOW2Entry.offsetMask, for: .copyUp)
            }
        }
        let run = try openAllocator.take(1)
        try storage.write(bytes, at: run.offset, for: .copyUp)
        storages[0].noteWrite()
        let bitmap: QCOW2SubclusterBitmap
        if !map.hasSubclusters {
            bitmap = .none
        } else if isCompressed {
            bitmap = .allAllocated
        } else {
            let behind = count.dividedRoundingUp(by: 1 << map.subclusterBits)
            let mask = QCOW2SubclusterBitmap.mask(behind..<QCOW2SubclusterBitmap.count)
            bitmap = QCOW2SubclusterBitmap(allocated: old.bitmap.allocated & ~mask, zero: old.bitmap.zero | mask)
        }
        try store(
            QCOW2ExtendedEntry(entry: run.offset | QCOW2Entry.copied, bitmap: bitmap), at: writablePlace(of: cluster))
        giveUp(old.entry, except: run.offset)
    }

    /// Removes all entries from a cluster of the disk on, and gives up what they led to.
    private func removeClusters(from first: UInt64) throws(DiskError) {
        let bits = map.clusterBits - map.entryShift
        var index = first >> bits
        while index < map.l1Size {
            let l1Place = map.l1Offset + index * 8
            let l1Entry = try table.bigEndian64(at: l1Place)
            guard l1Entry != 0 else {
                let stop = try table.endOfRun(of: 0, in: l1Place..<map.l1Offset + map.l1Size * 8)
                index = max(index + 1, (stop - map.l1Offset) / 8)
                continue
            }
            let l2Offset = l1Entry & QCOW2Entry.offsetMask
            if openAllocator.needsFlush { try openAllocator.flush() }
            if l2Offset != 0 { try removeEntries(of: l2Offset, from: max(first, index << bits), index) }
            if index << bits >= first {
                try openAllocator.store(0, at: l1Place, .directory)
                if l2Offset != 0 { openAllocator.giveUp(l2Offset) }
            }
            index += 1
        }
    }

    /// Gives up what the entries of an L2 table lead to. They are cleared where the table stays; one that goes is left
    /// as it is, since others may use it too.
    private func removeEntries(of l2Offset: UInt64, from first: UInt64, _ index: UInt64) throws(DiskError) {
        let bits = map.clusterBits - map.entryShift
        try map.checkTable(l2Offset, index << map.coverageShift)
        let stays = first > index << bits
        var cluster = first
        let end = (index + 1) << bits
        while cluster < end {
            let inTable = (cluster & (map.l2EntryCount - 1)) << map.entryShift
            let old = try pair(at: l2Offset + inTable)
            guard old.entry != 0 || old.bitmap != .none else {
                let stop = try table.endOfRun(of: 0, in: l2Offset + inTable..<l2Offset + header.clusterSize)
                cluster = max(cluster + 1, index << bits + (stop - l2Offset) >> map.entryShift)
                continue
            }
            if stays {
                try store(QCOW2ExtendedEntry(entry: 0, bitmap: .none), at: writablePlace(of: cluster))
            }
            giveUp(old.entry, except: 0)
            cluster += 1
        }
    }
}

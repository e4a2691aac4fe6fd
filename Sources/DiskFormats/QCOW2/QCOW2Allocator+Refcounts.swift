internal import DiskImage
internal import DiskStorage

/// Refcounts, their blocks, and the table of those (QEMU, docs/interop/qcow2, "Host cluster management").
extension QCOW2Allocator {
    // MARK: - Refcounts

    /// Where the refcount block of that index lies; nil: there is none, and all that it would count is free.
    func refcountBlock(_ index: UInt64, _ state: State) throws(DiskError) -> UInt64? {
        guard index < state.refcountTableEntries else { return nil }
        let place = state.refcountTableOffset + index * 8
        let offset = try table.bigEndian64(at: place) & QCOW2Entry.refcountBlockMask
        if offset == 0 { return nil }
        guard offset & (clusterSize - 1) == 0, offset < end.value else {
            throw DiskError(
                .needsRepair,
                "an entry of the refcount table puts a refcount block at byte \(offset), where none can be: "
                    + "run 'vdimg check --repair' first", image: handle.storage.name, offset: place)
        }
        return offset
    }

    /// The refcount of a cluster that a block counts.
    func refcount(of cluster: UInt64, in block: UInt64) throws(DiskError) -> UInt64 {
        let inBlock = cluster & (1 << perBlockBits - 1)
        let word = try table.entry64(at: block + inBlock >> layout.perWordBits * 8)
        return layout.get(word, inBlock & (1 << layout.perWordBits - 1))
    }

    /// The refcount of a cluster.
    func refcount(of cluster: UInt64, _ state: State) throws(DiskError) -> UInt64 {
        guard let block = try refcountBlock(cluster >> perBlockBits, state) else { return 0 }
        return try refcount(of: cluster, in: block)
    }

    /// Changes the refcount of a cluster; a block for it is made if there is none.
    func setRefcount(_ count: UInt64, of cluster: UInt64, _ state: inout State) throws(DiskError) {
        let index = cluster >> perBlockBits
        while true {
            if let block = try refcountBlock(index, state) {
                return try setRefcount(count, of: cluster, in: block)
            }
            if count == 0 { return }
            try addRefcountBlock(index, &state)
        }
    }

    func setRefcount(_ count: UInt64, of cluster: UInt64, in block: UInt64) throws(DiskError) {
        let inBlock = cluster & (1 << perBlockBits - 1)
        let place = block + inBlock >> layout.perWordBits * 8
        let word = try table.entry64(at: place)
        let changed = layout.set(word, inBlock & (1 << layout.perWordBits - 1), count)
        if changed != word { try store(changed, at: place, .allocation) }
    }

    /// Stores a word; if no page is free for it, after a flush.
    func store(_ word: UInt64, at place: UInt64, _ order: WriteOrder) throws(DiskError) {
        while try !table.store64(word, at: place, order) { try writeOut() }
    }

    // MARK: - Refcount blocks

    /// Makes the refcount block of that index, at the file's end, or makes the table longer that it needs; after that
    /// it may still be missing.
    func addRefcountBlock(_ index: UInt64, _ state: inout State) throws(DiskError) {
        guard index < state.refcountTableEntries else { return try growRefcountTable(for: index, &state) }
        let first = end.value >> clusterBits
        let block: UInt64
        if first >> perBlockBits == index {
            // It counts itself.
            try checkRoom(first, 1)
            moveEnd(to: (first + 1) << clusterBits)
            block = first << clusterBits
            try clear(FreeBlocks.Run(offset: block, count: 1, isZero: !hasFixedLength))
            try setRefcount(1, of: first, in: block)
        } else {
            let run = try takeAtEnd(1, &state)
            // Meanwhile it may have been made for that very cluster.
            if try refcountBlock(index, state) != nil {
                return try setRefcount(0, of: run.offset >> clusterBits, &state)
            }
            try clear(run)
            block = run.offset
        }
        try store(block.byteSwapped, at: state.refcountTableOffset + index * 8, .allocationDirectory)
    }

    // MARK: - The refcount table

    /// Where a longer refcount table goes, and the blocks that count it.
    private struct Growth {
        let start: UInt64
        let tableClusters: UInt64
        /// The indexes of the blocks that are made with it; they lie behind it.
        let blocks: [UInt64]
        let clusterCount: UInt64
    }

    /// Makes the refcount table longer: at a new place, that the header then names. All is durable before the next
    /// step, since nothing may be counted by a table to which the header does not lead.
    private func growRefcountTable(for index: UInt64, _ state: inout State) throws(DiskError) {
        try writeOut()
        let growth = try planGrowth(for: index, state)
        let firstCluster = growth.start >> clusterBits
        // Whole pages of the table cache, which has seen nothing of them.
        let regionEnd = growth.start + growth.clusterCount << clusterBits
        moveEnd(to: (regionEnd + 4095) & ~4095)
        let region = firstCluster..<firstCluster + growth.clusterCount
        for cluster in region where !growth.blocks.contains(cluster >> perBlockBits) {
            try setRefcount(1, of: cluster, &state)
        }
        try writeBlocks(growth, region)
        try writeTable(growth, state)
        handle.noteWrite()
        try writeOut()
        var fields = FieldWriter(count: 12)
        fields.bigEndian(growth.start, at: 0)
        fields.bigEndian(UInt32(growth.tableClusters), at: 8)
        try handle.storage.write(fields.bytes, at: QCOW2Header.refcountTableOffset, for: .header)
        try handle.storage.flush()
        let old = state.refcountTableOffset..<state.refcountTableOffset + state.refcountTableEntries * 8
        state.refcountTableOffset = growth.start
        state.refcountTableEntries = growth.tableClusters << (clusterBits - 3)
        // Not to be used again in this session: the cache knows its entries.
        for cluster in old.lowerBound >> clusterBits..<old.upperBound >> clusterBits {
            let count = try refcount(of: cluster, state)
            if count > 0 { try setRefcount(count - 1, of: cluster, &state) }
        }
    }

    private func planGrowth(for index: UInt64, _ state: State) throws(DiskError) -> Growth {
        let alignment = max(clusterSize, 4096)
        let start = (end.value + alignment - 1) & ~(alignment - 1)
        let first = start >> clusterBits
        let entriesPerCluster = clusterSize / 8
        var entries = max(index + 1, state.refcountTableEntries + state.refcountTableEntries / 2)
        var blocks: [UInt64] = []
        while true {
            let tableClusters = entries.dividedRoundingUp(by: entriesPerCluster)
            guard tableClusters << clusterBits <= QCOW2Header.refcountTableByteLimit else {
                throw DiskError(
                    .system, "the image is full: its refcount table cannot grow further", image: handle.storage.name,
                    errno: 28)  // ENOSPC
            }
            let count = tableClusters + UInt64(blocks.count)
            try checkRoom(first, count + 8)
            let last = (first + count - 1) >> perBlockBits
            var needed: [UInt64] = []
            for candidate in first >> perBlockBits...last where try refcountBlock(candidate, state) == nil {
                needed.append(candidate)
            }
            if needed.count <= blocks.count, last < tableClusters * entriesPerCluster {
                return Growth(start: start, tableClusters: tableClusters, blocks: blocks, clusterCount: count)
            }
            if needed.count > blocks.count { blocks = needed }
            entries = max(entries, last + 1)
        }
    }

    /// Writes the new blocks: what they count of the region is in use, all else is free.
    private func writeBlocks(_ growth: Growth, _ region: Range<UInt64>) throws(DiskError) {
        for (number, index) in growth.blocks.enumerated() {
            let place = growth.start + (growth.tableClusters + UInt64(number)) << clusterBits
            try handle.storage.writeZeros(place..<place + clusterSize, for: .allocation)
            let counted =
                max(region.lowerBound, index << perBlockBits)..<min(region.upperBound, (index + 1) << perBlockBits)
            guard !counted.isEmpty else { continue }
            let inBlock = counted.lowerBound - index << perBlockBits..<counted.upperBound - index << perBlockBits
            var words = FieldWriter(count: Int(inBlock.upperBound >> layout.perWordBits + 1) * 8)
            var word: UInt64 = 0
            for entry in inBlock {
                let inWord = entry & (1 << layout.perWordBits - 1)
                if inWord == 0 { word = 0 }
                word = layout.set(word, inWord, 1)
                words.littleEndian(word, at: Int(entry >> layout.perWordBits) * 8)
            }
            try handle.storage.write(words.bytes.prefixed(Int(clusterSize)), at: place, for: .allocation)
        }
    }

    /// Writes the new table: the entries of the old one, which are all in the file, and those of the new blocks.
    private func writeTable(_ growth: Growth, _ state: State) throws(DiskError) {
        let size = growth.tableClusters << clusterBits
        let step: UInt64 = 64 << 10
        for start in stride(from: 0, to: size, by: Int(step)) {
            let count = Int(min(step, size - start))
            var piece = FieldWriter(count: count)
            let oldSize = state.refcountTableEntries * 8
            if start < oldSize {
                let part = Int(min(UInt64(count), oldSize - start))
                piece.bytes(
                    try handle.storage.bytes(
                        at: state.refcountTableOffset + start, count: part, for: .allocation, "the refcount table"),
                    at: 0)
            }
            for (number, index) in growth.blocks.enumerated()
            where index * 8 >= start && index * 8 < start + UInt64(count) {
                piece.bigEndian(
                    growth.start + (growth.tableClusters + UInt64(number)) << clusterBits, at: Int(index * 8 - start))
            }
            try handle.storage.write(piece.bytes, at: growth.start + start, for: .allocation)
        }
    }
}

extension [UInt8] {
    /// The first `count` bytes, if there are more.
    fileprivate func prefixed(_ count: Int) -> [UInt8] { count < self.count ? Array(self[..<count]) : self }
}

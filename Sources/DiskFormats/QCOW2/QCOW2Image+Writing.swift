internal import DiskImage
internal import DiskStorage

extension QCOW2Image {
    /// What this session does not keep up is marked so, durably, before the first change: bitmaps, and what features
    /// that are not known here may tell.
    func beginWriting() throws(DiskError) {
        let kept = header.autoclear.intersection(.maintained)
        guard header.version >= 3, kept != header.autoclear else { return }
        var field = FieldWriter(count: 8)
        field.bigEndian(kept.rawValue, at: 0)
        try storages[0].storage.write(field.bytes, at: QCOW2Header.autoclearOffset, for: .header)
        try storages[0].storage.flush()
        header.autoclear = kept
    }

    var openAllocator: QCOW2Allocator {
        guard let allocator else { preconditionFailure("an image that was opened to be read is written") }
        return allocator
    }

    // MARK: - Entries

    /// The L2 entry of a guest cluster as it is now, and whether its table is used by nothing else.
    func entry(of cluster: UInt64) throws(DiskError) -> (pair: QCOW2ExtendedEntry, isExclusive: Bool) {
        let index = cluster >> (map.clusterBits - map.entryShift)
        let l1Entry = try table.bigEndian64(at: map.l1Offset + index * 8)
        let l2Offset = l1Entry & QCOW2Entry.offsetMask
        guard l2Offset != 0 else { return (QCOW2ExtendedEntry(entry: 0, bitmap: .none), false) }
        try map.checkTable(l2Offset, cluster << map.clusterBits)
        return (try pair(at: place(of: cluster, in: l2Offset)), l1Entry & QCOW2Entry.copied != 0)
    }

    private func place(of cluster: UInt64, in l2Offset: UInt64) -> UInt64 {
        l2Offset + (cluster & (map.l2EntryCount - 1)) << map.entryShift
    }

    func pair(at place: UInt64) throws(DiskError) -> QCOW2ExtendedEntry {
        if map.hasSubclusters { return try map.extendedEntry(at: place) }
        return QCOW2ExtendedEntry(entry: try table.bigEndian64(at: place), bitmap: .none)
    }

    /// Stores an entry; if no page is free for it, after a flush.
    func store(_ pair: QCOW2ExtendedEntry, at place: UInt64) throws(DiskError) {
        guard map.hasSubclusters else {
            return try openAllocator.store(pair.entry.byteSwapped, at: place, .entry)
        }
        while try !table.storePair(pair.entry.byteSwapped, pair.bitmap.rawValue.byteSwapped, at: place, .entry) {
            try openAllocator.writeOut()
        }
    }

    /// Where the entry of a guest cluster lies, in a table that may be written.
    func writablePlace(of cluster: UInt64) throws(DiskError) -> UInt64 {
        let index = cluster >> (map.clusterBits - map.entryShift)
        let l1Entry = try table.bigEndian64(at: map.l1Offset + index * 8)
        var l2Offset = l1Entry & QCOW2Entry.offsetMask
        if l2Offset == 0 || l1Entry & QCOW2Entry.copied == 0 { l2Offset = try addTable(index) }
        try map.checkTable(l2Offset, cluster << map.clusterBits)
        return place(of: cluster, in: l2Offset)
    }

    /// Makes an L2 table, as a copy of the one that others use too if there is one, unless another thread has just done
    /// so.
    private func addTable(_ index: UInt64) throws(DiskError) -> UInt64 {
        try addingTable.withLock { (_) throws(DiskError) in
            let l1Place = map.l1Offset + index * 8
            let l1Entry = try table.bigEndian64(at: l1Place)
            let old = l1Entry & QCOW2Entry.offsetMask
            if old != 0, l1Entry & QCOW2Entry.copied != 0 { return old }
            let new = try openAllocator.takeTable()
            if old != 0 {
                try map.checkTable(old, index << map.coverageShift)
                try copyTable(from: old, to: new)
            }
            try openAllocator.store((new | QCOW2Entry.copied).byteSwapped, at: l1Place, .directory)
            if old != 0 { openAllocator.giveUp(old) }
            return new
        }
    }

    /// Copies an L2 table. What is in it is used by both tables then.
    private func copyTable(from old: UInt64, to new: UInt64) throws(DiskError) {
        for offset in stride(from: 0, to: header.clusterSize, by: 8) {
            var word = try table.bigEndian64(at: old + offset)
            let isEntry = !map.hasSubclusters || offset % 16 == 0
            if isEntry, word & QCOW2Entry.compressed == 0 { word &= ~QCOW2Entry.copied }
            if word != 0 { try openAllocator.store(word.byteSwapped, at: new + offset, .entry) }
        }
    }

    // MARK: - Allocation

    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        if openAllocator.needsFlush { try flush() }
        let unitBits = map.hasSubclusters ? map.subclusterBits : map.clusterBits
        let start = offset & ~(1 << unitBits - 1)
        let units = (min(offset + length, virtualSize) - start).dividedRoundingUp(by: 1 << unitBits)
        let stop = min(start + units << unitBits, virtualSize)
        if header.hasDataFile {
            return Reservation(
                offset: start, length: stop - start, storage: 1, fileOffset: start,
                isZero: start >= (try storages[1].storage.length()))
        }
        let first = start >> map.clusterBits
        let end = stop.dividedRoundingUp(by: header.clusterSize)
        let (pair, isExclusive) = try entry(of: first)
        let host = pair.entry & QCOW2Entry.offsetMask
        let isCompressed = pair.entry & QCOW2Entry.compressed != 0
        let isOwn = isExclusive && pair.entry & QCOW2Entry.copied != 0
        if map.hasSubclusters, isCompressed || host != 0 && !isOwn {
            // All of it moves.
            let run = try openAllocator.take(1)
            let whole = first << map.clusterBits
            return Reservation(
                offset: whole, length: min(header.clusterSize, virtualSize - whole), storage: 0,
                fileOffset: run.offset, isZero: false)
        }
        if let own = try ownPlace(first) {
            // What is set aside for it already, as far as that goes in one piece.
            var next = first + 1
            while next < end, try ownPlace(next) == own + (next - first) << map.clusterBits { next += 1 }
            return reservation(start, stop, next, at: own, isZero: false)
        }
        var next = first + 1
        while next < end, try ownPlace(next) == nil, try hasNoPlace(next) { next += 1 }
        let run = try openAllocator.take(next - first)
        return reservation(start, stop, first + run.count, at: run.offset, isZero: run.isZero)
    }

    /// A reservation from `start` to `stop` or to the beginning of cluster `next`, whichever is first; `place` is that
    /// of the first cluster.
    private func reservation(
        _ start: UInt64, _ stop: UInt64, _ next: UInt64, at place: UInt64, isZero: Bool
    ) -> Reservation {
        Reservation(
            offset: start, length: min(stop, next << map.clusterBits) - start, storage: 0,
            fileOffset: place + start & (header.clusterSize - 1), isZero: isZero)
    }

    /// The place of a cluster that reads as zeros, in whole or in part, and nevertheless has one of its own.
    private func ownPlace(_ cluster: UInt64) throws(DiskError) -> UInt64? {
        let (pair, isExclusive) = try entry(of: cluster)
        let host = pair.entry & QCOW2Entry.offsetMask
        guard isExclusive, pair.entry & QCOW2Entry.compressed == 0, pair.entry & QCOW2Entry.copied != 0, host != 0
        else {
            return nil
        }
        try map.checkCluster(host, cluster << map.clusterBits, 0)
        return host
    }

    /// Whether no part of a cluster is stored, if it has parts.
    private func hasNoPlace(_ cluster: UInt64) throws(DiskError) -> Bool {
        guard map.hasSubclusters else { return true }
        let entry = try entry(of: cluster).pair.entry
        return entry & (QCOW2Entry.compressed | QCOW2Entry.offsetMask) == 0
    }

    func commit(_ reservation: consuming Reservation) throws(DiskError) {
        let end = reservation.offset + reservation.length
        let distance = reservation.fileOffset &- reservation.offset
        let storage = reservation.storage
        var position = reservation.offset
        while position < end {
            let cluster = position >> map.clusterBits
            let stop = min(end, (cluster + 1) << map.clusterBits)
            let host = (position &+ distance) & ~(header.clusterSize - 1)
            do throws(DiskError) {
                try enter(host, cluster, position..<stop)
            } catch {
                abandon(
                    Reservation(
                        offset: position, length: end - position, storage: storage, fileOffset: position &+ distance,
                        isZero: false))
                throw error
            }
            position = stop
        }
    }

    /// Enters the place of a guest cluster, of which a range is stored there now.
    func enter(_ host: UInt64, _ cluster: UInt64, _ range: Range<UInt64>) throws(DiskError) {
        let place = try writablePlace(of: cluster)
        let old = try pair(at: place)
        var new = QCOW2ExtendedEntry(entry: host | QCOW2Entry.copied, bitmap: .none)
        if map.hasSubclusters {
            let start = cluster << map.clusterBits
            let first = (range.lowerBound - start) >> map.subclusterBits
            let last = (range.upperBound - start).dividedRoundingUp(by: 1 << map.subclusterBits)
            let before = old.entry & QCOW2Entry.compressed != 0 ? .none : old.bitmap
            new.bitmap = before.allocating(first..<last)
        }
        guard new != old else { return }
        try store(new, at: place)
        giveUp(old.entry, except: host)
    }

    /// Gives up what an entry that was just replaced pointed to.
    func giveUp(_ entry: UInt64, except host: UInt64) {
        guard !header.hasDataFile else { return }
        if entry & QCOW2Entry.compressed != 0 {
            for cluster in QCOW2CompressedCluster(entry, clusterBits: map.clusterBits).hostClusters(map.clusterBits) {
                openAllocator.giveUp(cluster << map.clusterBits)
            }
        } else if entry & QCOW2Entry.offsetMask != 0, entry & QCOW2Entry.offsetMask != host {
            openAllocator.giveUp(entry & QCOW2Entry.offsetMask)
        }
    }

    func abandon(_ reservation: consuming Reservation) {
        guard !header.hasDataFile else { return }
        let end = reservation.offset + reservation.length
        var position = reservation.offset
        while position < end {
            let cluster = position >> map.clusterBits
            let host = (reservation.fileOffset + (position - reservation.offset)) & ~(header.clusterSize - 1)
            let isEntered = (try? entry(of: cluster).pair.entry & QCOW2Entry.offsetMask == host) ?? true
            if !isEntered { openAllocator.putBack(host, 1) }
            position = min(end, (cluster + 1) << map.clusterBits)
        }
    }

    // MARK: - Discarding

    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        // What is read without this image must be zeros there.
        if keepsRawData { return false }
        if kind == .zero, !map.knowsZeroClusters { return false }
        let end = offset + length
        for cluster in offset >> map.clusterBits..<end.dividedRoundingUp(by: header.clusterSize) {
            if openAllocator.needsFlush { try flush() }
            let start = cluster << map.clusterBits
            let range = max(offset, start)..<min(end, start + header.clusterSize)
            let before = try entry(of: cluster).pair
            if dropping(range, of: cluster, from: before, kind) == before { continue }
            let place = try writablePlace(of: cluster)
            let old = try pair(at: place)
            let new = dropping(range, of: cluster, from: old, kind)
            try store(new, at: place)
            try giveBack(old.entry, cluster, range, keepsPlace: new.entry == old.entry)
        }
        return true
    }

    /// An entry without what it says of a range of its cluster. With subclusters that may be a part: the others stay
    /// what they are, and the cluster keeps its place as long as one of them is stored there.
    private func dropping(
        _ range: Range<UInt64>, of cluster: UInt64, from old: QCOW2ExtendedEntry, _ kind: DroppedKind
    ) -> QCOW2ExtendedEntry {
        guard map.hasSubclusters else {
            return QCOW2ExtendedEntry(entry: kind == .zero ? QCOW2Entry.zero : 0, bitmap: .none)
        }
        let start = cluster << map.clusterBits
        let first = (range.lowerBound - start) >> map.subclusterBits
        let last =
            range.upperBound == virtualSize
            ? QCOW2SubclusterBitmap.count : (range.upperBound - start).dividedRoundingUp(by: 1 << map.subclusterBits)
        let mask = QCOW2SubclusterBitmap.mask(first..<last)
        let isCompressed = old.entry & QCOW2Entry.compressed != 0
        let before = isCompressed ? .none : old.bitmap
        let bitmap = QCOW2SubclusterBitmap(
            allocated: before.allocated & ~mask, zero: kind == .zero ? before.zero | mask : before.zero & ~mask)
        return QCOW2ExtendedEntry(entry: bitmap.allocated == 0 ? 0 : old.entry, bitmap: bitmap)
    }

    /// Gives up what an entry that was just changed pointed to, unless it keeps its place, and space at once where
    /// nothing else uses it: whether the entry or its removal is found after a power cut, the range reads as it was or
    /// as zeros.
    private func giveBack(
        _ entry: UInt64, _ cluster: UInt64, _ range: Range<UInt64>, keepsPlace: Bool
    ) throws(DiskError) {
        if header.hasDataFile {
            let end = min(range.upperBound, try storages[1].storage.length())
            let range = range.lowerBound..<max(range.lowerBound, end)
            if releasedPlaces.add(range, in: storages[1]) { return }
            if range.lowerBound < end { try storages[1].discard(range.lowerBound..<end, for: .guestData) }
            return
        }
        let host = entry & QCOW2Entry.offsetMask
        let isOwn =
            entry & QCOW2Entry.compressed == 0 && entry & QCOW2Entry.copied != 0 && host != 0
            && host & (header.clusterSize - 1) == 0 && host < end.value
        // (The allocator gives space back after the entry is gone.)
        guard isOwn, !releasedPlaces.isActive else { return keepsPlace ? () : giveUp(entry, except: 0) }
        if keepsPlace {
            let place = host + (range.lowerBound - cluster << map.clusterBits)
            return try storages[0].discard(
                place..<place + (range.upperBound - range.lowerBound), for: .guestData)
        }
        var isZero = false
        defer { openAllocator.giveUp(host, isZero: isZero) }
        try storages[0].discard(host..<min(host + header.clusterSize, end.value), for: .guestData)
        isZero = true
    }

    // MARK: - Durability

    func flush() throws(DiskError) { try allocator?.flush() }

    func close() throws(DiskError) {
        if !isResized { try allocator?.flushAll() }
    }
}

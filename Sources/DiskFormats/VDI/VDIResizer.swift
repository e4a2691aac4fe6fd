internal import DiskImage
internal import DiskStorage

/// Gives a VDI another size. Works on the file itself; nothing of it waits to be written.
///
/// The header, one sector, says in one write where the block map is, how long it is, where the blocks are and how large
/// the disk is. All that a new header speaks of is durable before it is written, and nothing that the old one speaks of
/// is changed before; so a crash leaves the old disk or the new one, and perhaps blocks that nothing uses.
struct VDIResizer {
    let storage: any Storage
    private(set) var header: VDIHeader

    /// Entries of the map that are in memory at once.
    private static let piece: UInt64 = 64 << 10
    /// Places of which the use is noted, in 32 MiB.
    private static let placeLimit: UInt64 = 1 << 28

    init(_ storage: any Storage) throws(DiskError) {
        self.storage = storage
        header = try VDIHeader(parsing: storage.availableBytes(at: 0, count: VDIHeader.byteCount, for: .header))
    }

    /// What is new hides what a parent has in front of `hidden`.
    mutating func resize(to size: UInt64, hidingUpTo hidden: UInt64) throws(DiskError) {
        guard size > 0, size % 512 == 0 else {
            throw DiskError(.unsupported, "the size must be a multiple of 512 bytes, not \(size)")
        }
        let count = size.dividedRoundingUp(by: header.blockSize)
        guard count <= VDIHeader.blockLimit else {
            throw DiskError(
                .unsupported,
                "a VDI has \(VDIHeader.blockLimit) blocks at most, not \(count): convert it to one with larger blocks")
        }
        guard count == header.blockCount || !header.isVersion0 else {
            throw DiskError(
                .unsupported,
                "a VDI of version \(header.versionName) has its blocks right behind its block map, which can have no "
                    + "other size: convert it first")
        }
        if size > header.virtualSize {
            try grow(to: size, max(count, header.blockCount), hidingUpTo: min(size, hidden))
        }
        if size < header.virtualSize { try shrink(to: size, count) }
    }

    // MARK: - Growing

    private mutating func grow(to size: UInt64, _ count: UInt64, hidingUpTo hidden: UInt64) throws(DiskError) {
        try clearBehindEnd()
        let zeroEnd = hidden.dividedRoundingUp(by: header.blockSize)
        try hideParent(inBlocksUpTo: zeroEnd)
        var new = header
        new.setSize(size, blockCount: count)
        let length = try storage.length()
        var places = VDIMapScan.places(header, length).count
        var shift: UInt64 = 0
        if count > header.blockCount {
            if let place = placeInFront(for: count) {
                new.mapOffset = place
            } else if header.mapOffset + count * 4 > header.blocksOffset {
                shift = try placeAmongBlocks(count, &new)
                let target = max(places, shift)
                places = target + (try moveBlocks(before: shift, to: target))
            }
            let firstNew = places - min(shift, places)
            if header.type == .fixed {
                places += count - header.blockCount
                try makeRoom(places, isAllocated: try storage.allocatedBytes() >= length)
            } else if new.blocksOffset > header.blocksOffset {
                try makeRoom(max(places, shift), isAllocated: false)
            }
            try storage.flush()
            try writeMap(new, shift: shift, firstNew: header.type == .fixed ? firstNew : nil, zeroEnd: zeroEnd)
            if shift > 0 || header.type == .fixed {
                new.allocatedBlocks = UInt32(truncatingIfNeeded: places - min(shift, places))
            }
        }
        try write(new)
    }

    /// Room for the whole map between the header and where it is, if it does not have it where it is.
    private func placeInFront(for count: UInt64) -> UInt64? {
        guard header.mapOffset + count * 4 > header.blocksOffset else { return nil }
        for place in [4096, 512] as [UInt64] where place + count * 4 <= header.mapOffset { return place }
        return nil
    }

    /// Puts the map behind the present one, into what are blocks now; answers how many of them that takes.
    private func placeAmongBlocks(_ count: UInt64, _ new: inout VDIHeader) throws(DiskError) -> UInt64 {
        let place = try header.mapEnd.dividedRoundingUp(by: 512).multiplied(by: 512)
        let shift = (place + count * 4 - header.blocksOffset).dividedRoundingUp(by: header.stride)
        new.mapOffset = place
        new.blocksOffset = try header.blocksOffset.adding(shift.multiplied(by: header.stride))
        guard new.blocksOffset <= UInt64(UInt32.max) else {
            throw DiskError(
                .unsupported,
                "the block map would end at byte \(new.blocksOffset), and a VDI's blocks begin below 4 GiB: convert "
                    + "it to one with larger blocks")
        }
        return shift
    }

    /// Moves the blocks that lie in the first places to others, from `target` on, durably; answers how many there were.
    private mutating func moveBlocks(before limit: UInt64, to target: UInt64) throws(DiskError) -> UInt64 {
        var moved: [(block: UInt64, place: UInt64)] = []
        let (old, storage) = (header, storage)
        try forEachEntry { (block, entry) throws(DiskError) in
            guard UInt64(entry) < limit else { return }
            let place = target + UInt64(moved.count)
            guard place < VDIEntry.limit else { throw DiskError(.unsupported, "the file would have too many blocks") }
            try Self.copy(storage, old, from: UInt64(entry), to: place)
            moved.append((block, place))
        }
        guard let last = moved.last else { return 0 }
        try storage.flush()
        // Other programs take what the count does not cover for free.
        var covering = header
        covering.allocatedBlocks = max(covering.allocatedBlocks, UInt32(truncatingIfNeeded: last.place + 1))
        try write(covering)
        try writeEntries(moved)
        return UInt64(moved.count)
    }

    /// Has blocks lie elsewhere: their bytes are there, durably.
    private func writeEntries(_ entries: [(block: UInt64, place: UInt64)]) throws(DiskError) {
        for (block, place) in entries {
            var fields = FieldWriter(count: 4)
            fields.littleEndian(UInt32(truncatingIfNeeded: place), at: 0)
            try storage.write(fields.bytes, at: header.mapOffset + block * 4, for: .table)
        }
        try storage.flush()
    }

    /// Makes the file end behind that many places, in the numbers of the present header.
    private func makeRoom(_ places: UInt64, isAllocated: Bool) throws(DiskError) {
        let old = try storage.length()
        let whole = header.blocksOffset + VDIMapScan.places(header, old).count * header.stride
        let length = try header.blocksOffset.adding(places.multiplied(by: header.stride), "the file's length")
        // What a file has behind its last block is none of the disk.
        if old > whole { try storage.setLength(whole) }
        do throws(DiskError) {
            if isAllocated { try storage.allocate(length) }
            if try storage.length() < length { try storage.setLength(length) }
        } catch {
            try? storage.setLength(max(old, whole))
            throw error
        }
    }

    /// Writes the entries that the new map has, at its place: those of the old one, and the new blocks', which are
    /// zeros up to the block `zeroEnd`.
    private func writeMap(
        _ new: VDIHeader, shift: UInt64, firstNew: UInt64?, zeroEnd: UInt64
    ) throws(DiskError) {
        var first = new.mapOffset == header.mapOffset ? header.blockCount : 0
        while first < new.blockCount {
            let count = min(Self.piece, new.blockCount - first)
            let old = try entries(first..<max(first, min(first + count, header.blockCount)))
            var fields = FieldWriter(count: Int(count) * 4)
            for index in 0..<Int(count) {
                let block = first + UInt64(index)
                let entry: UInt32
                if index < old.count {
                    let known = old[index]
                    entry = known < VDIEntry.zero ? known - UInt32(truncatingIfNeeded: shift) : known
                } else {
                    entry =
                        firstNew.map { UInt32(truncatingIfNeeded: $0 + block - header.blockCount) }
                        ?? (block < zeroEnd ? VDIEntry.zero : VDIEntry.free)
                }
                fields.littleEndian(entry, at: index * 4)
            }
            try storage.write(fields.bytes, at: new.mapOffset + first * 4, for: .table)
            first += count
        }
        try storage.flush()
    }

    /// What blocks hold behind the disk's end is no part of the disk; so it must be zeros when the disk gets longer.
    private func clearBehindEnd() throws(DiskError) {
        let length = try storage.length()
        let first = header.virtualSize / header.blockSize
        let (header, storage) = (header, storage)
        try forEachEntry(from: first) { (block, entry) throws(DiskError) in
            let start = Self.data(header, UInt64(entry))
            let offset = block == first ? header.virtualSize % header.blockSize : 0
            let range = min(length, start + offset)..<min(length, start + header.blockSize)
            if !range.isEmpty { try storage.writeZeros(range, for: .guestData) }
        }
        try storage.flush()
    }

    /// Has the blocks that the map has behind the disk's end be zeros, where they would be the parent's.
    private func hideParent(inBlocksUpTo end: UInt64) throws(DiskError) {
        let limit = min(end, header.blockCount)
        var first = header.virtualSize.dividedRoundingUp(by: header.blockSize)
        while first < limit {
            let found = try entries(first..<min(first + Self.piece, limit))
            if found.contains(VDIEntry.free) {
                var fields = FieldWriter(count: found.count * 4)
                for (index, entry) in found.enumerated() {
                    fields.littleEndian(entry == VDIEntry.free ? VDIEntry.zero : entry, at: index * 4)
                }
                try storage.write(fields.bytes, at: header.mapOffset + first * 4, for: .table)
            }
            first += UInt64(found.count)
        }
        try storage.flush()
    }

    // MARK: - Shrinking

    private mutating func shrink(to size: UInt64, _ count: UInt64) throws(DiskError) {
        var new = header
        new.setSize(size, blockCount: count)
        try write(new)
        guard !header.isVersion0 || count == header.blockCount else { return }
        try closeHoles()
    }

    /// Moves the last blocks of the file into places that nothing uses, and cuts the file off behind them.
    private mutating func closeHoles() throws(DiskError) {
        let (places, hasPart) = VDIMapScan.places(header, try storage.length())
        // (A check with repair does it for a larger file.)
        guard places <= Self.placeLimit, !hasPart else { return }
        var used = [UInt64](repeating: 0, count: Int(places / 64 + 1))
        var end: UInt64 = 0
        try forEachEntry { (_, entry) throws(DiskError) in
            guard entry < places else { return }
            used[Int(entry / 64)] |= 1 << UInt64(entry % 64)
        }
        for word in used { end += UInt64(word.nonzeroBitCount) }
        var hole: UInt64 = 0
        var waiting: [(block: UInt64, place: UInt64)] = []
        let (header, storage) = (header, storage)
        func commit() throws(DiskError) {
            guard !waiting.isEmpty else { return }
            try storage.flush()
            try writeEntries(waiting)
            waiting = []
        }
        try forEachEntry { (block, entry) throws(DiskError) in
            guard UInt64(entry) >= end, UInt64(entry) < places else { return }
            while hole < end, used[Int(hole / 64)] & 1 << (hole % 64) != 0 { hole += 1 }
            guard hole < end else { return }
            try Self.copy(storage, header, from: UInt64(entry), to: hole)
            waiting.append((block, hole))
            hole += 1
            if waiting.count == 64 { try commit() }
        }
        try commit()
        try storage.setLength(header.blocksOffset + end * header.stride)
        try storage.flush()
        var new = header
        new.allocatedBlocks = UInt32(truncatingIfNeeded: end)
        try write(new)
    }

    // MARK: - The file

    private mutating func write(_ new: VDIHeader) throws(DiskError) {
        let sector = try storage.bytes(at: 0, count: VDIHeader.byteCount, for: .header, "the header")
        let bytes = Array(new.encode(over: sector)[..<min(new.sectorLength, header.sectorLength)])
        try storage.write(bytes, at: 0, for: .header)
        try storage.flush()
        header = new
    }

    private func entries(_ blocks: Range<UInt64>) throws(DiskError) -> [UInt32] {
        let fields = FieldReader(
            try storage.bytes(
                at: header.mapOffset + blocks.lowerBound * 4, count: blocks.count * 4, for: .table, "the block map"))
        var entries: [UInt32] = []
        entries.reserveCapacity(blocks.count)
        for index in 0..<blocks.count { entries.append(try fields.littleEndian(at: index * 4)) }
        return entries
    }

    /// Calls `body` for each block of the disk that has a place.
    private func forEachEntry(
        from start: UInt64 = 0, _ body: (_ block: UInt64, _ entry: UInt32) throws(DiskError) -> Void
    ) throws(DiskError) {
        for first in stride(from: start, to: header.blockCount, by: UInt64.Stride(Self.piece)) {
            let found = try entries(first..<min(first + Self.piece, header.blockCount))
            for (index, entry) in found.enumerated() where entry < VDIEntry.zero {
                try body(first + UInt64(index), entry)
            }
        }
    }

    /// Where a place's data begins.
    private static func data(_ header: VDIHeader, _ place: UInt64) -> UInt64 {
        header.blocksOffset + header.blockExtra + place * header.stride
    }

    /// Copies a block with what lies before its data.
    private static func copy(
        _ storage: any Storage, _ header: VDIHeader, from source: UInt64, to target: UInt64
    ) throws(DiskError) {
        let start = header.blocksOffset + source * header.stride
        let place = header.blocksOffset + target * header.stride
        for offset in stride(from: 0, to: header.stride, by: 1 << 20) {
            let count = Int(min(1 << 20, header.stride - offset))
            let bytes = try storage.bytes(at: start + offset, count: count, for: .guestData, "a block")
            try storage.write(bytes, at: place + offset, for: .guestData)
        }
    }
}

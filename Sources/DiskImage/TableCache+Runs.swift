internal import CLinux
public import DiskStorage

/// Long runs of one entry (in most tables: of none) are passed over without an entry being loaded for each, and
/// without their pages driving everything else out of the cache.
extension TableCache {
    /// Fewer pages than this that are not cached are read in; more are looked at in the file.
    private static let directPages: UInt64 = 4
    /// Bytes looked at in the file by one read.
    private static let chunkSize: UInt64 = 64 << 10
    /// How far ahead is asked at once whether pages are cached.
    private static let lookAhead: UInt64 = 1 << 20

    /// Where a run of the same 32-bit word ends: the first byte of `range` (whole words) at which another one stands,
    /// or the range's end.
    func endOfRun(of word: UInt32, _ fileTag: UInt64, in range: Range<UInt64>) throws(DiskError) -> UInt64 {
        var position = range.lowerBound
        while position < range.upperBound {
            if let length = index.runLength(of: word, fileTag, position, upTo: range.upperBound) {
                position += length
                if length == 0 || position % UInt64(PageIndex.pageSize) != 0 { return position }
                continue
            }
            // A page that is not cached now has no change that waits: the file, asked after this, has what it holds.
            let end = uncachedEnd(fileTag, position..<range.upperBound)
            let isLong = end - position >= Self.directPages * UInt64(PageIndex.pageSize)
            if !isLong, try withPage(fileTag | position >> 12, { _, _ in true }) != nil { continue }
            position = try endOfRun(of: word, inFile: file(of: fileTag).storage, position..<end)
            if position < end { return position }
        }
        return range.upperBound
    }

    /// Where the pages that are not cached end: the one with the range's first byte is none.
    private func uncachedEnd(_ fileTag: UInt64, _ range: Range<UInt64>) -> UInt64 {
        let limit = min(range.upperBound, range.lowerBound + Self.lookAhead)
        var page = range.lowerBound >> 12 + 1
        while page << 12 < limit, index.find(fileTag | page) < 0 { page += 1 }
        return min(page << 12, limit)
    }

    /// The same in a file, whose holes are zeros and need not be read.
    private func endOfRun(
        of word: UInt32, inFile storage: any Storage, _ range: Range<UInt64>
    ) throws(DiskError) -> UInt64 {
        var bytes = [UInt8](repeating: 0, count: Int(min(Self.chunkSize, range.upperBound - range.lowerBound)))
        return try bytes.withIOBuffer { (buffer) throws(DiskError) in
            var position = range.lowerBound
            var dataEnd = position
            while position < range.upperBound {
                if word == 0, position >= dataEnd {
                    let data = try storage.nextData(from: position) ?? .max..<(.max)
                    position = max(position, min(data.lowerBound, range.upperBound) & ~3)
                    dataEnd = max(data.upperBound, position + 1)
                    continue
                }
                let piece = buffer.slice(0, Int(min(UInt64(buffer.count), range.upperBound - position)))
                try storage.readPadded(into: piece, at: position, for: .table)
                let same = piece.readOnly.runLength(of: word)
                position += UInt64(same)
                if same < piece.count { return position }
            }
            return position
        }
    }
}

extension PageIndex {
    /// How many bytes from `offset` on, up to the page's end and to `end`, repeat a word; nil: not here, or moving.
    fileprivate func runLength(
        of word: UInt32, _ fileTag: UInt64, _ offset: UInt64, upTo end: UInt64
    ) -> UInt64? {
        let tag = fileTag | offset >> 12
        let slot = find(tag)
        guard slot >= 0 else { return nil }
        let sequence = unsafe clinux_load32_acquire(sequences + slot)
        guard sequence & 1 == 0, unsafe clinux_load64_relaxed(tags + slot) == tag else { return nil }
        let pageEnd = min(offset | UInt64(Self.pageSize - 1) + 1, end)
        var position = offset
        while position < pageEnd, unsafe clinux_load32_relaxed(place(slot, position)) == word.littleEndian {
            position += 4
            // Two words at a time, once they are aligned.
            guard position & 7 == 0 else { continue }
            let pair = UInt64(word.littleEndian) << 32 | UInt64(word.littleEndian)
            while position + 8 <= pageEnd, unsafe clinux_load64_relaxed(place(slot, position)) == pair { position += 8 }
        }
        unsafe clinux_fence_acquire(sequences + slot)
        guard unsafe clinux_load32_relaxed(sequences + slot) == sequence else { return nil }
        touch(slot)
        return min(position, pageEnd) - offset
    }
}

extension IOBytes {
    /// How many bytes at the front repeat a little-endian 32-bit word; there are whole words.
    fileprivate func runLength(of word: UInt32) -> Int {
        let pair = UInt64(word.littleEndian) << 32 | UInt64(word.littleEndian)
        var offset = 0
        while offset + 32 <= count {
            var difference: UInt64 = 0
            for part in 0..<4 {
                difference |= unsafe pointer.loadUnaligned(fromByteOffset: offset + part * 8, as: UInt64.self) ^ pair
            }
            if difference != 0 { break }
            offset += 32
        }
        while offset + 4 <= count,
            unsafe pointer.loadUnaligned(fromByteOffset: offset, as: UInt32.self) == word.littleEndian
        { offset += 4 }
        return offset
    }
}

extension Table {
    /// Where a run of the same little-endian 32-bit entry ends: the first byte of `range` (multiples of 4) at which
    /// another one stands, or the range's end. For long runs: what is not cached of them is not cached afterwards.
    public func endOfRun(of entry: UInt32, in range: Range<UInt64>) throws(DiskError) -> UInt64 {
        try withCache { (cache, tag) throws(DiskError) in try cache.endOfRun(of: entry, tag, in: range) }
    }
}

internal import DiskStorage

/// A file that may not be written to, as it would be after its log was replayed.
final class VHDXReplayedFile: Storage {
    /// From `start` to the next one's start the bytes are a change's, or the file's own.
    private struct Piece {
        let start: UInt64
        /// Which change; -1: none.
        let change: Int32
    }

    private let inner: any Storage
    private let replay: VHDXLogReplay
    /// Ascending; the first one begins at 0.
    private let pieces: [Piece]
    let traits = StorageTraits()
    var name: String { inner.name }

    init(_ inner: any Storage, _ replay: VHDXLogReplay) {
        self.inner = inner
        self.replay = replay
        pieces = Self.pieces(replay.changes)
    }

    /// Which change is the last one at each byte: they are gone through from the last to the first, and each takes the
    /// pieces that no later one has.
    private static func pieces(_ changes: [VHDXLogReplay.Change]) -> [Piece] {
        var starts = [0 as UInt64]
        for change in changes { starts += [change.range.lowerBound, change.range.upperBound] }
        starts.sort()
        var unique: [UInt64] = []
        for start in starts where start != unique.last { unique.append(start) }
        var owners = [Int32](repeating: -1, count: unique.count)
        // From each piece on, the next one that is not taken.
        var next = Array(0...unique.count)
        func firstFree(_ index: Int) -> Int {
            var index = index
            while next[index] != index {
                next[index] = next[next[index]]
                index = next[index]
            }
            return index
        }
        for (number, change) in changes.enumerated().reversed() {
            var index = firstFree(lastIndex(unique, notAbove: change.range.lowerBound) { $0 })
            while index < unique.count, unique[index] < change.range.upperBound {
                owners[index] = Int32(number)
                next[index] = index + 1
                index = firstFree(index)
            }
        }
        return zip(unique, owners).map { Piece(start: $0, change: $1) }
    }

    /// The last element of an ascending list that is not above `value`; the first one is not.
    private static func lastIndex<T>(_ list: [T], notAbove value: UInt64, _ key: (T) -> UInt64) -> Int {
        var low = 0
        var high = list.count
        while high - low > 1 {
            let middle = (low + high) / 2
            if key(list[middle]) <= value { low = middle } else { high = middle }
        }
        return low
    }

    func length() throws(DiskError) -> UInt64 { replay.fileLength }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        guard offset < replay.fileLength else { return 0 }
        let count = Int(min(UInt64(buffer.count), replay.fileLength - offset))
        var done = 0
        while done < count {
            let position = offset + UInt64(done)
            let index = Self.lastIndex(pieces, notAbove: position) { $0.start }
            let end = index + 1 < pieces.count ? min(pieces[index + 1].start, replay.fileLength) : replay.fileLength
            let part = buffer.slice(done, Int(min(UInt64(count - done), end - position)))
            try read(pieces[index].change, into: part, at: position, for: purpose)
            done += part.count
        }
        return count
    }

    private func read(
        _ number: Int32, into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose
    ) throws(DiskError) {
        guard number >= 0 else { return try inner.readPadded(into: buffer, at: offset, for: purpose) }
        let change = replay.changes[Int(number)]
        guard let source = change.source else { return buffer.zero() }
        let bytes = try replay.content(source, inner)
        try bytes.withIOBytes { (bytes) in
            buffer.copy(from: bytes.slice(Int(offset - change.range.lowerBound), buffer.count))
        }
    }

    func allocatedBytes() throws(DiskError) -> UInt64 { try inner.allocatedBytes() }

    /// What the log changes counts as data.
    func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? {
        let index = Self.lastIndex(pieces, notAbove: offset) { $0.start }
        var start = UInt64.max
        for piece in pieces[index...] where piece.change >= 0 {
            start = max(offset, piece.start)
            break
        }
        guard let data = try inner.nextData(from: offset), data.lowerBound <= start else {
            return start < replay.fileLength ? start..<start + 1 : nil
        }
        return data
    }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        throw readOnly
    }
    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        throw readOnly
    }
    func setLength(_ length: UInt64) throws(DiskError) { throw readOnly }
    func flush() {}

    private var readOnly: DiskError { DiskError(.readOnly, "the image was opened read-only", image: name) }
}

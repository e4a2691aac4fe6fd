internal import DiskStorage

/// Bytes anywhere on a device that takes whole sectors alone: edges go through a buffer, and one that is written is
/// read first, by one thread at a time.
final class SectorAccess: Sendable {
    /// The bytes of a sector: a power of two.
    let sectorSize: UInt64
    /// The most bytes of one request: whole sectors.
    private let longest: Int
    private let edges = Locked(())

    /// - Parameter longest: At least a sector.
    init(sectorSize: UInt64, longest: UInt64) {
        self.sectorSize = sectorSize
        self.longest = Int(max(sectorSize, min(longest, 32 << 20) / sectorSize * sectorSize))
    }

    /// How the bytes of a range lie on sectors: the sector of a part, and the part's place in it; whole sectors with 0
    /// bytes before them.
    private func parts(_ offset: UInt64, _ count: Int) -> [(sector: UInt64, before: Int, count: Int, isWhole: Bool)] {
        var result: [(sector: UInt64, before: Int, count: Int, isWhole: Bool)] = []
        var position = offset
        let end = offset + UInt64(count)
        while position < end {
            let before = position % sectorSize
            let rest = end - position
            if before != 0 || rest < sectorSize {
                let part = min(sectorSize - before, rest)
                result.append((position - before, Int(before), Int(part), false))
                position += part
            } else {
                let part = min(rest / sectorSize * sectorSize, UInt64(longest))
                result.append((position, 0, Int(part), true))
                position += part
            }
        }
        return result
    }

    /// Fills `buffer`; `read` reads whole sectors. The range lies inside the device.
    func read(
        into buffer: IOBuffer, at offset: UInt64, _ read: (IOBuffer, UInt64) throws(DiskError) -> Void
    ) throws(DiskError) {
        var done = 0
        for part in parts(offset, buffer.count) {
            let target = buffer.slice(done, part.count)
            done += part.count
            if part.isWhole {
                try read(target, part.sector)
                continue
            }
            var sector = [UInt8](repeating: 0, count: Int(sectorSize))
            try sector.withIOBuffer { (memory) throws(DiskError) in
                try read(memory, part.sector)
                target.copy(from: memory.slice(part.before, part.count).readOnly)
            }
        }
    }

    /// Writes `bytes`; `read` and `write` take whole sectors. The range lies inside the device.
    func write(
        _ bytes: IOBytes, at offset: UInt64, read: (IOBuffer, UInt64) throws(DiskError) -> Void,
        write: (IOBytes, UInt64) throws(DiskError) -> Void
    ) throws(DiskError) {
        var done = 0
        for part in parts(offset, bytes.count) {
            let source = bytes.slice(done, part.count)
            done += part.count
            if part.isWhole {
                try write(source, part.sector)
                continue
            }
            try edges.withLock { (_) throws(DiskError) in
                var sector = [UInt8](repeating: 0, count: Int(sectorSize))
                try sector.withIOBuffer { (memory) throws(DiskError) in
                    try read(memory, part.sector)
                    memory.slice(part.before, part.count).copy(from: source)
                    try write(memory.readOnly, part.sector)
                }
            }
        }
    }

    /// The whole sectors inside a range, and the bytes before and behind them.
    func whole(_ range: Range<UInt64>) -> (inner: Range<UInt64>, edges: [Range<UInt64>]) {
        let start = (range.lowerBound + sectorSize - 1) / sectorSize * sectorSize
        let end = range.upperBound / sectorSize * sectorSize
        guard start < end else { return (range.lowerBound..<range.lowerBound, [range]) }
        return (start..<end, [range.lowerBound..<start, end..<range.upperBound].filter { !$0.isEmpty })
    }
}

internal import DiskImage
internal import DiskStorage

/// Looks at every entry of a block map: which blocks of the file are used, and by how many.
///
/// A bit a block of the file; of files with more blocks than there are bits for, a part at a time.
struct VDIMapScan {
    /// What is wrong with an entry.
    enum Fault {
        /// It leads to no block of the file.
        case outside
        /// It leads to a block that the file ends inside of.
        case cutShort
        /// It leads to a block that an entry before it leads to.
        case duplicate
    }

    /// Blocks of the file that are looked at together: 32 MiB of bits.
    private static let window: UInt64 = 1 << 28

    private let header: VDIHeader
    private let table: Table
    /// Whole blocks of the file.
    let places: UInt64
    /// Whether there is a part of one more.
    private let hasPartialPlace: Bool
    private var used: [UInt64] = []
    private var largest: UInt64?
    /// Entries that lead to a block.
    private(set) var allocated: UInt64 = 0

    /// Of a file of `length` bytes.
    init(_ header: VDIHeader, table: Table, length: UInt64) {
        self.header = header
        self.table = table
        (places, hasPartialPlace) = Self.places(header, length)
    }

    /// How many blocks a file of that length has room for, and whether there is a part of one more.
    static func places(_ header: VDIHeader, _ length: UInt64) -> (count: UInt64, hasPartialPlace: Bool) {
        let (count, rest) = (length - min(length, header.blocksOffset)).quotientAndRemainder(dividingBy: header.stride)
        guard count < VDIEntry.limit else { return (VDIEntry.limit, false) }
        return (count, rest > header.blockExtra)
    }

    /// Where the used places end.
    var usedEnd: UInt64 { largest.map { $0 + 1 } ?? 0 }

    /// Calls `onFault` for each wrong entry with its blocks (more than one, if it is repeated), and `onHole` for each
    /// run of places that nothing leads to.
    mutating func run(
        onFault: (Fault, _ blocks: Range<UInt64>, _ entry: UInt32) throws(DiskError) -> Void,
        onHole: (FreeBlocks.Run) -> Void = { _ in }
    ) throws(DiskError) {
        let end = places + (hasPartialPlace ? 1 : 0)
        var base: UInt64 = 0
        repeat {
            let count = min(Self.window, end - base)
            used = []
            used = [UInt64](repeating: 0, count: Int(count / 64 + 1))
            try look(at: base..<base + count, isFirst: base == 0, onFault)
            forEachHole(in: base..<min(base + count, places), onHole)
            base += count
            // What comes after the last used place is one hole.
        } while base < min(end, usedEnd)
        if base < places { onHole(.init(offset: base, count: places - base, isZero: false)) }
        used = []
    }

    private mutating func look(
        at range: Range<UInt64>, isFirst: Bool,
        _ onFault: (Fault, _ blocks: Range<UInt64>, _ entry: UInt32) throws(DiskError) -> Void
    ) throws(DiskError) {
        let end = places + (hasPartialPlace ? 1 : 0)
        try Self.forEachEntry(header, table) { (blocks, entry) throws(DiskError) in
            let place = UInt64(entry)
            if isFirst {
                allocated += UInt64(blocks.count)
                if place >= end { return try onFault(.outside, blocks, entry) }
                largest = max(largest ?? 0, place)
                if place == places { try onFault(.cutShort, blocks.lowerBound..<blocks.lowerBound + 1, entry) }
            }
            guard range.contains(place) else { return }
            let word = Int((place - range.lowerBound) / 64)
            let bit = UInt64(1) << (place % 64)
            let isUsed = used[word] & bit != 0
            let wrong = (isUsed ? blocks.lowerBound : blocks.lowerBound + 1)..<blocks.upperBound
            used[word] |= bit
            if !wrong.isEmpty { try onFault(.duplicate, wrong, entry) }
        }
    }

    /// Calls `body` with each entry and its blocks, but for those that lead to no place. An entry is repeated only
    /// where it is wrong, but then perhaps in a gigabyte of nothing.
    static func forEachEntry(
        _ header: VDIHeader, _ table: Table,
        _ body: (_ blocks: Range<UInt64>, _ entry: UInt32) throws(DiskError) -> Void
    ) throws(DiskError) {
        var place = header.mapOffset
        guard place < header.mapEnd else { return }
        var entry = try table.entry32(at: place)
        while true {
            var end = place + 4
            var next = end < header.mapEnd ? try table.entry32(at: end) : 0
            if next == entry, end < header.mapEnd {
                end = try table.endOfRun(of: entry, in: end..<header.mapEnd)
                if end < header.mapEnd { next = try table.entry32(at: end) }
            }
            if entry < VDIEntry.zero {
                try body((place - header.mapOffset) / 4..<(end - header.mapOffset) / 4, entry)
            }
            guard end < header.mapEnd else { return }
            (place, entry) = (end, next)
        }
    }

    private func forEachHole(in range: Range<UInt64>, _ onHole: (FreeBlocks.Run) -> Void) {
        var start: UInt64?
        var place = range.lowerBound
        while place < range.upperBound {
            let offset = place - range.lowerBound
            let word = used[Int(offset / 64)]
            if offset % 64 == 0, word == 0 || word == .max, place + 64 <= range.upperBound {
                if word == 0, start == nil { start = place }
                if word != 0, let first = start {
                    onHole(.init(offset: first, count: place - first, isZero: false))
                    start = nil
                }
                place += 64
                continue
            }
            let isUsed = word & 1 << (offset % 64) != 0
            if !isUsed, start == nil { start = place }
            if isUsed, let first = start {
                onHole(.init(offset: first, count: place - first, isZero: false))
                start = nil
            }
            place += 1
        }
        if let first = start {
            onHole(.init(offset: first, count: range.upperBound - first, isZero: false))
        }
    }
}

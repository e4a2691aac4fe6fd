internal import CLinux
internal import DiskImage
internal import DiskStorage

/// The holes that the last searches went through, so that the next one inside them need not go through them again:
/// who compares or copies a disk asks from each of its buffers on.
///
/// One hole is kept of the whole chain, until something is allocated, and one of the lower layers, which do not change.
/// What is written or allocated while a search is under way makes its hole one that is not kept.
@safe
final class HoleMemory: @unchecked Sendable {  // the count is only accessed atomically
    private struct Hole {
        var range: Range<UInt64> = 0..<0
        /// How many allocations there had been when the search for it began.
        var allocations: UInt32 = 0
        /// Part of it is a hole of a file, which a write in place ends without an allocation.
        var isInFile = false
    }

    private let whole = Locked(Hole())
    private let lower = Locked<Range<UInt64>>(0..<0)
    private let count: UnsafeMutablePointer<UInt32>

    init() {
        unsafe count = .allocate(capacity: 1)
        unsafe count.initialize(to: 0)
    }

    deinit { unsafe count.deallocate() }

    /// How many allocations there have been.
    var allocations: UInt32 { unsafe clinux_load32_acquire(count) }

    /// Something was allocated in the top layer, and will be read there: after it is, before whoever wrote hears so.
    func noteAllocation() { _ = unsafe clinux_fetch_add32(count, 1) }

    /// Where the hole of the whole chain round `offset` ends; nil if none is known.
    func end(round offset: UInt64, isUnwritten: Bool) -> UInt64? {
        let now = allocations
        return whole.withLock { known in
            let isValid = known.allocations == now && (isUnwritten || !known.isInFile)
            return isValid && known.range.contains(offset) ? known.range.upperBound : nil
        }
    }

    /// Keeps a hole that was searched for when there had been that many allocations.
    func note(_ range: Range<UInt64>, allocations: UInt32, isInFile: Bool) {
        guard !range.isEmpty else { return }
        whole.withLock { known in
            var hole = Hole(range: range, allocations: allocations, isInFile: isInFile)
            if known.allocations == allocations, let union = Self.union(known.range, range) {
                hole.range = union
                hole.isInFile = known.isInFile || isInFile
            }
            known = hole
        }
    }

    /// The same for the layers below the top one.
    func endBelow(round offset: UInt64) -> UInt64? {
        lower.withLock { $0.contains(offset) ? $0.upperBound : nil }
    }

    func noteBelow(_ range: Range<UInt64>) {
        guard !range.isEmpty else { return }
        lower.withLock { $0 = Self.union($0, range) ?? range }
    }

    /// Both ranges as one, if they meet.
    private static func union(_ a: Range<UInt64>, _ b: Range<UInt64>) -> Range<UInt64>? {
        guard a.lowerBound <= b.upperBound, b.lowerBound <= a.upperBound else { return nil }
        return min(a.lowerBound, b.lowerBound)..<max(a.upperBound, b.upperBound)
    }
}

/// What a search wants, and what it has learned of the files on its way.
private struct Search {
    /// Extents after which a search ends where it is. Who asked goes on from there: data that reads as zeros and a hole
    /// of no length are answers that nobody minds, and an image that has its blocks in any order, by the million, keeps
    /// nobody waiting.
    static let extentLimit = 1 << 18
    let wantsData: Bool
    /// Extents that were looked at.
    var extents = 0
    /// Whether it passed a hole of a file of the top layer.
    var passedFileHole = false
    /// The last data of a file that its file system told of: neighbouring blocks lie in the same.
    var layer = -1
    var storage: UInt16 = 0
    var data: Range<UInt64> = 0..<0
    /// From where on it told: in front of the data is a hole.
    var known: Range<UInt64> = 0..<0
}

extension Chain {
    /// How much of the disk is looked at first; each time nothing is found, twice as much, so that a search costs as
    /// much as what it finds is away, in whichever layer.
    private static let firstWindow: UInt64 = 4 << 20
    private static let lastWindow: UInt64 = 1 << 44

    /// The first byte at or after `offset` that may hold data (`wantsData`), or that is known to be zero; the disk's
    /// end counts as a hole. Nil: there is no data from there on.
    func seek(from offset: UInt64, wantsData: Bool) throws(DiskError) -> UInt64? {
        guard offset < size else { return nil }
        // Nothing was written since the image was opened: its files are what they were.
        let isUnwritten = !writing.hasBegun
        var search = Search(wantsData: wantsData)
        var position = offset
        let allocations = holes.allocations
        if let end = holes.end(round: offset, isUnwritten: isUnwritten) {
            guard wantsData else { return offset }
            position = end
        }
        var window = Self.firstWindow
        var isFound = false
        while position < size, !isFound {
            let end = min(size, (position / window + 1) * window)
            position = try find(position..<end, from: 0, &search)
            isFound = position < end
            window = min(window * 2, Self.lastWindow)
        }
        if wantsData { holes.note(offset..<position, allocations: allocations, isInFile: search.passedFileHole) }
        return isFound || !wantsData ? position : nil
    }

    /// The first byte of a range that the search wants, or the range's end; layers from `first` down are asked.
    private func find(
        _ range: Range<UInt64>, from first: Int, _ search: inout Search
    ) throws(DiskError) -> UInt64 {
        guard first < depth else { return search.wantsData ? range.upperBound : range.lowerBound }
        let layer = reference(first)
        let end = min(range.upperBound, layer.size)
        var position = range.lowerBound
        if first == 1, let known = holes.endBelow(round: position) {
            guard search.wantsData else { return position }
            position = min(known, range.upperBound)
        }
        defer { if first == 1, search.wantsData { holes.noteBelow(range.lowerBound..<position) } }
        var batch = ExtentBatch()
        while position < end {
            batch.removeAll()
            do throws(DiskError) {
                try layer.map(position, end - position, into: &batch)
            } catch {
                // What comes before a bad entry may be all that is needed.
                if batch.count == 0 { throw error.about(layer.object.path) }
            }
            for number in 0..<batch.count {
                let extent = batch[number]
                search.extents += 1
                if search.extents > Search.extentLimit { return position }
                let next = position + extent.length
                switch extent.kind {
                case .zero: if search.wantsData { position = next }
                case .encoded: if !search.wantsData { position = next }
                case .absent: position = try find(position..<next, from: first + 1, &search)
                case .data, .frozen: position += try find(in: extent, of: layer, first, &search)
                }
                if position < next { return position }
            }
        }
        // Beyond the layer's end there are zeros.
        if search.wantsData { position = range.upperBound }
        return position
    }

    /// What a file stores as it is may have holes of its file system in it: how many bytes of the extent come before
    /// the first that the search wants.
    private func find(
        in extent: Extent, of layer: LayerReference, _ index: Int, _ search: inout Search
    ) throws(DiskError) -> UInt64 {
        let range = extent.fileOffset..<extent.fileOffset + extent.length
        var position = range.lowerBound
        while position < range.upperBound {
            let isKnown = search.layer == index && search.storage == extent.storage && search.known.contains(position)
            if !isKnown {
                let file = layer.storage(extent.storage).storage
                search.data = try file.nextData(from: position) ?? .max..<(.max)
                search.known = position..<search.data.upperBound
                search.layer = index
                search.storage = extent.storage
            }
            let isData = search.data.lowerBound <= position
            if isData == search.wantsData { break }
            if !isData, index == 0 { search.passedFileHole = true }
            position = isData ? search.data.upperBound : search.data.lowerBound
        }
        return min(position, range.upperBound) - range.lowerBound
    }
}

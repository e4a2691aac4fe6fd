internal import DiskImage
internal import DiskStorage

/// Copies what a run of images holds into the image below them or above them, region by region, so that their chain
/// shows the same bytes before, in between and afterwards.
///
/// *Downwards*, the target gets everything that the run holds: what lies in it there does not show anyway. *Upwards*,
/// it gets what it does not hold itself: what it shows there already. So nobody who reads the chain sees a difference,
/// whenever it stops; and done again, it goes on.
struct LayerCopy: Sendable {
    enum Direction: Sendable {
        case downwards
        case upwards
    }

    let direction: Direction
    /// The images whose content is copied.
    let run: LayerRun
    /// The chain on top of which the target lies, as it is now.
    let target: Chain
    /// What will lie below the target: upwards, what the run lies over; nil: nothing.
    let below: Chain?
    /// The locks of the disk that the target belongs to, with regions that are no smaller than the target's blocks.
    let locks: RegionLocks
    private let source: Chain
    private let cloner = RangeCloner()
    private let buffers: ScratchPool
    private let bufferSize: Int

    /// Bytes that are copied at once, unless the target's blocks are larger.
    private static let piece = 1 << 20
    /// The largest such piece.
    private static let largestPiece = 4 << 20

    init(_ direction: Direction, of layers: ArraySlice<Layer>, into target: Chain, below: Chain?, locks: RegionLocks) {
        self.direction = direction
        run = LayerRun(layers)
        self.target = target
        self.below = below
        self.locks = locks
        source = Chain(topFirst: Array(layers))
        bufferSize = min(max(Self.piece, Int(clamping: target.blockSize)), Self.largestPiece)
        buffers = ScratchPool(size: bufferSize)
    }

    /// How much of the disk the run has a say in: upwards all of the target, downwards what the run shows.
    var size: UInt64 { direction == .upwards ? target.size : min(source.size, target.size) }

    /// Copies everything; `control` hears of the bytes of the disk. Durable when it returns.
    ///
    /// On `DiskError.Kind.cancelled` and every other error the chain shows what it did.
    func run(_ control: OperationControl) throws(DiskError) {
        control.begin("merging", total: size)
        var position: UInt64 = 0
        var comparison = Comparison()
        while position < size {
            try control.checkCancelled()
            // Long ranges of which nobody says anything are passed over by their tables alone.
            guard let held = try run.firstHeld(in: position..<size) else { break }
            let start = max(position, held / locks.regionSize * locks.regionSize)
            let end = min(size, start + min(locks.regionSize - start % locks.regionSize, size - start))
            try copyRegion(start..<end, &comparison)
            control.advance(to: end)
            position = end
        }
        try control.checkCancelled()
        try target.flush()
        control.advance(to: size)
    }

    /// Copies a range of any regions, one after the other.
    func copyPart(_ range: Range<UInt64>) throws(DiskError) {
        try forEachRegion(of: range) { (piece, comparison) throws(DiskError) in try copyRegion(piece, &comparison) }
    }

    /// The same, for who has them all alone.
    func copyPartLocked(_ range: Range<UInt64>) throws(DiskError) {
        try forEachRegion(of: range) { (piece, comparison) throws(DiskError) in try copyLocked(piece, &comparison) }
    }

    private func forEachRegion(
        of range: Range<UInt64>, _ body: (Range<UInt64>, inout Comparison) throws(DiskError) -> Void
    ) throws(DiskError) {
        var comparison = Comparison()
        var position = range.lowerBound
        while position < min(range.upperBound, size) {
            let end = min(range.upperBound, size, position + (locks.regionSize - position % locks.regionSize))
            try body(position..<end, &comparison)
            position = end
        }
    }

    /// Copies a range of one region, which it locks.
    func copyRegion(_ range: Range<UInt64>, _ comparison: inout Comparison) throws(DiskError) {
        let length = range.upperBound - range.lowerBound
        locks.lockExclusive(range.lowerBound, length)
        defer { locks.unlockExclusive(range.lowerBound, length) }
        try copyLocked(range, &comparison)
    }

    /// The same, for who has the range's regions alone.
    func copyLocked(_ range: Range<UInt64>, _ comparison: inout Comparison) throws(DiskError) {
        switch direction {
        case .downwards: try copyHeld(range, &comparison)
        case .upwards:
            try LayerRun([target.layers[0]]).forEachPart(of: range) { (part, holding) throws(DiskError) in
                if holding == .nothing { try copyHeld(part, &comparison) }
                return true
            }
        }
    }

    private func copyHeld(_ range: Range<UInt64>, _ comparison: inout Comparison) throws(DiskError) {
        try cloner.share(range, of: run, into: target) { (zeros) throws(DiskError) in
            try target.beginWriting()
            if direction == .upwards {
                try target.maskZeros(zeros, over: below)
            } else {
                try target.discardLocked(zeros.lowerBound, zeros.upperBound - zeros.lowerBound)
            }
        } bytes: { (bytes) throws(DiskError) in
            try copyData(bytes, &comparison)
        }
    }

    private func copyData(_ range: Range<UInt64>, _ comparison: inout Comparison) throws(DiskError) {
        try buffers.withBuffer { (buffer) throws(DiskError) in
            var position = range.lowerBound
            while position < range.upperBound {
                let toEnd = UInt64(bufferSize) - position % UInt64(bufferSize)
                let piece = buffer.slice(0, Int(min(toEnd, range.upperBound - position)))
                try source.read(into: piece, at: position)
                var isThere = false
                if direction == .downwards, comparison.isWanted {
                    isThere = try holds(piece.readOnly, at: position)
                }
                if !isThere {
                    try target.beginWriting()
                    try target.writeLocked(piece.readOnly, at: position)
                    comparison.noteDifference()
                } else {
                    comparison.noteEquality()
                }
                position += UInt64(piece.count)
            }
        }
    }

    /// Whether the target holds just these bytes already.
    private func holds(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) -> Bool {
        var batch = ExtentBatch()
        try target.top.map(offset, UInt64(bytes.count), into: &batch)
        guard batch.count == 1, batch[0].kind == .data, batch[0].length >= UInt64(bytes.count) else { return false }
        return try buffers.withBuffer { (buffer) throws(DiskError) in
            let other = buffer.slice(0, bytes.count)
            try target.top.read(batch[0].storage, into: other, at: batch[0].fileOffset, for: .copyUp)
            return other.readOnly.isEqual(to: bytes)
        }
    }

    /// When it is worth to look whether the target has the bytes already: where an earlier merge was stopped, it has
    /// them for a long way; else hardly ever.
    struct Comparison: Sendable {
        private var skipped = 0
        /// Pieces that are written without a look after one that was different.
        private static let pause = 15

        var isWanted: Bool { skipped == 0 }
        mutating func noteDifference() { skipped = (skipped + 1) % (Self.pause + 1) }
        mutating func noteEquality() { skipped = 0 }
    }
}

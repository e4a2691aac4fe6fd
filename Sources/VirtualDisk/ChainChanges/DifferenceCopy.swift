internal import DiskImage
internal import DiskStorage

/// Copies into an image what its parent shows and another parent would not.
struct DifferenceCopy {
    /// The image, over its old parent.
    let target: Chain
    /// What lies below it now, and what shall; nil: nothing, which reads as zeros.
    let old: Chain?
    let new: Chain?
    /// The images of both that the other has not: elsewhere they cannot differ, but for the ends of the disks.
    let oldRun: LayerRun
    let newRun: LayerRun
    private let cloner = RangeCloner()
    private let buffers = ScratchPool(size: Self.piece)

    private static let piece = 1 << 20

    init(target: Chain, old: Chain?, new: Chain?, oldRun: LayerRun, newRun: LayerRun) {
        self.target = target
        self.old = old
        self.new = new
        self.oldRun = oldRun
        self.newRun = newRun
    }

    /// Copies everything that differs; durable when it returns.
    func run(_ control: OperationControl) throws(DiskError) {
        control.begin("comparing", total: target.size)
        var position: UInt64 = 0
        while position < target.size, let next = try nextDifference(from: position) {
            try control.checkCancelled()
            let start = max(position, next / UInt64(Self.piece) * UInt64(Self.piece))
            let end = min(target.size, start + (UInt64(Self.piece) - start % UInt64(Self.piece)))
            try LayerRun([target.layers[0]]).forEachPart(of: start..<end) { (part, holding) throws(DiskError) in
                if holding == .nothing { try copy(part) }
                return true
            }
            control.advance(to: end)
            position = end
        }
        try control.checkCancelled()
        try target.flush()
        control.advance(to: target.size)
    }

    /// The first byte at or after `position` at which the two parents may show different bytes.
    private func nextDifference(from position: UInt64) throws(DiskError) -> UInt64? {
        let range = position..<target.size
        let first = try oldRun.firstHeld(in: range)
        let second = try newRun.firstHeld(in: range.lowerBound..<(first ?? range.upperBound))
        return second ?? first
    }

    private func copy(_ range: Range<UInt64>) throws(DiskError) {
        guard try Chain.isZero(new, range) else { return try copyWhatDiffers(range) }
        guard let old else { return }
        // All that the old parent shows differs, but for zeros.
        try cloner.share(range, of: old.run, into: target) { (_) throws(DiskError) in
        } bytes: { (bytes) throws(DiskError) in
            try copyWhatDiffers(bytes)
        }
    }

    /// Reads what both parents show, and copies the blocks in which they differ.
    private func copyWhatDiffers(_ range: Range<UInt64>) throws(DiskError) {
        try buffers.withBuffer { (buffer) throws(DiskError) in
            try buffers.withBuffer { (otherBuffer) throws(DiskError) in
                let length = Int(range.upperBound - range.lowerBound)
                let mine = buffer.slice(0, length)
                let other = otherBuffer.slice(0, length)
                try Self.read(old, into: mine, at: range.lowerBound)
                try Self.read(new, into: other, at: range.lowerBound)
                var differing: Range<UInt64>?
                try forEachBlock(of: range) { (block) throws(DiskError) in
                    let part = (Int(block.lowerBound - range.lowerBound), Int(block.upperBound - block.lowerBound))
                    let isSame = mine.slice(part.0, part.1).readOnly.isEqual(to: other.slice(part.0, part.1).readOnly)
                    if !isSame { differing = (differing?.lowerBound ?? block.lowerBound)..<block.upperBound }
                    guard let run = differing, isSame || block.upperBound == range.upperBound else { return }
                    differing = nil
                    try copy(
                        run, mine.slice(Int(run.lowerBound - range.lowerBound), Int(run.upperBound - run.lowerBound)))
                }
            }
        }
    }

    /// Copies a range of which the old parent shows these bytes.
    private func copy(_ range: Range<UInt64>, _ buffer: IOBuffer) throws(DiskError) {
        func write(_ part: Range<UInt64>) throws(DiskError) {
            try forEachBlock(of: part) { (block) throws(DiskError) in
                let bytes = buffer.slice(
                    Int(block.lowerBound - range.lowerBound), Int(block.upperBound - block.lowerBound)
                ).readOnly
                try target.beginWriting()
                if bytes.isZero {
                    try target.maskZeros(block, over: new)
                } else {
                    try target.writeLocked(bytes, at: block.lowerBound)
                }
            }
        }
        guard let old, !buffer.readOnly.isZero else { return try write(range) }
        try cloner.share(range, of: old.run, into: target, absentIsZero: true, zeros: write, bytes: write)
    }

    /// The pieces of a range that lie in one block of the image each.
    private func forEachBlock(
        of range: Range<UInt64>, _ body: (Range<UInt64>) throws(DiskError) -> Void
    ) throws(DiskError) {
        let unit = min(max(target.blockSize, 512), UInt64(Self.piece))
        var position = range.lowerBound
        while position < range.upperBound {
            let end = min(range.upperBound, position + (unit - position % unit))
            try body(position..<end)
            position = end
        }
    }

    /// Reads what a chain shows; behind its end, and of none, zeros.
    private static func read(_ chain: Chain?, into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        let count = min(UInt64(buffer.count), chain.map { $0.size > offset ? $0.size - offset : 0 } ?? 0)
        if count > 0 { try chain?.read(into: buffer.slice(0, Int(count)), at: offset) }
        buffer.slice(Int(count), buffer.count - Int(count)).zero()
    }
}

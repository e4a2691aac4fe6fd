internal import DiskImage
internal import DiskStorage

extension Chain {
    /// Makes the top image say by itself that a range is zeros wherever it says nothing and `below`, which will lie
    /// below it later, may hold something; for who has the range's regions alone.
    ///
    /// What the top image holds itself is left alone. The chain shows zeros there before and afterwards.
    func maskZeros(_ range: Range<UInt64>, over below: Chain?) throws(DiskError) {
        var position = range.lowerBound
        while position < range.upperBound {
            var batch = ExtentBatch()
            try top.map(position, range.upperBound - position, into: &batch)
            let end = position + min(batch[0].length, range.upperBound - position)
            if batch[0].kind == .absent, try !Self.isZero(below, position..<end) {
                try maskAbsent(position..<end)
            }
            position = end
        }
    }

    /// Whether a chain, which may be none, or end before, is known to hold zeros in a range.
    static func isZero(_ chain: Chain?, _ range: Range<UInt64>) throws(DiskError) -> Bool {
        guard let chain, range.lowerBound < chain.size else { return true }
        let end = min(range.upperBound, chain.size)
        return try chain.isKnownZero(range.lowerBound, end - range.lowerBound, from: 0)
    }

    private func maskAbsent(_ range: Range<UInt64>) throws(DiskError) {
        guard blockSize > 0 else {
            throw DiskError(.unsupported, "cannot say that a part of it is zeros", image: layers[0].path)
        }
        // Whole blocks; the disk's end makes its last block whole.
        let first = min(range.lowerBound.alignedUp(to: blockSize) ?? range.upperBound, range.upperBound)
        let last = max(first, range.upperBound == size ? size : range.upperBound & ~(blockSize - 1))
        try writeZeros(range.lowerBound..<first)
        if first < last, try !layers[0].backend.drop(offset: first, length: last - first, leaving: .zero) {
            try writeZeros(first..<last)
        }
        holes.noteAllocation()
        try writeZeros(last..<range.upperBound)
    }

    /// Writes zeros as data to what the top image does not hold.
    private func writeZeros(_ range: Range<UInt64>) throws(DiskError) {
        guard !range.isEmpty else { return }
        try scratch.withBuffer { (buffer) throws(DiskError) in
            buffer.zero()
            var position = range.lowerBound
            while position < range.upperBound {
                let piece = buffer.slice(0, Int(min(UInt64(buffer.count), range.upperBound - position)))
                // A whole block may have been dropped by an image that stores none of zeros; then it says so itself.
                try writeLocked(piece.readOnly, at: position, isZero: true)
                position += UInt64(piece.count)
            }
        }
    }
}

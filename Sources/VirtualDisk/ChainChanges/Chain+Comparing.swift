internal import DiskImage
internal import DiskStorage

extension Chain {
    /// Whether this chain shows what another does: only where `run`, the images that this one has and the other has
    /// not, holds anything they can differ, and beyond the shorter one's end.
    func shows(the other: Chain, where run: LayerRun, _ control: OperationControl) throws(DiskError) -> Bool {
        guard size == other.size else { return false }
        control.begin("comparing", total: size)
        var isSame = true
        try run.forEachPart(of: 0..<size) { (piece, holding) throws(DiskError) in
            control.advance(to: piece.lowerBound)
            if holding != .nothing { isSame = try isEqual(to: other, in: piece, control) }
            return isSame
        }
        return isSame
    }

    private func isEqual(
        to other: Chain, in range: Range<UInt64>, _ control: OperationControl
    ) throws(DiskError) -> Bool {
        try scratch.withBuffer { (buffer) throws(DiskError) in
            try other.scratch.withBuffer { (otherBuffer) throws(DiskError) in
                var position = range.lowerBound
                while position < range.upperBound {
                    try control.checkCancelled()
                    let count = Int(min(UInt64(buffer.count), range.upperBound - position))
                    try read(into: buffer.slice(0, count), at: position)
                    try other.read(into: otherBuffer.slice(0, count), at: position)
                    guard buffer.slice(0, count).readOnly.isEqual(to: otherBuffer.slice(0, count).readOnly) else {
                        return false
                    }
                    position += UInt64(count)
                }
                return true
            }
        }
    }
}

internal import DiskImage
internal import DiskStorage

/// Images of a chain that lie one above the other, and what they hold between them.
struct LayerRun: Sendable {
    /// The images, the top one first; there may be none.
    let layers: ArraySlice<Layer>

    /// What the images say of a range.
    enum Holding: Sendable {
        /// One of them holds its bytes.
        case data
        /// One of them says that it is zeros, or it lies behind the end of one, so that what is below does not show.
        case zero
        /// None says anything: what lies below them shows.
        case nothing
    }

    init(_ layers: ArraySlice<Layer>) { self.layers = layers }

    /// Calls `body` with the pieces of a range, in order, neighbours of one kind joined; `body` answers whether to go
    /// on.
    func forEachPiece(
        of range: Range<UInt64>, _ body: (Range<UInt64>, Holding) throws(DiskError) -> Bool
    ) throws(DiskError) {
        var pending: (range: Range<UInt64>, holding: Holding)?
        let wantsMore = try walk(range, layers.startIndex) { (piece, holding) throws(DiskError) in
            if let current = pending {
                if current.holding == holding {
                    pending?.range = current.range.lowerBound..<piece.upperBound
                    return true
                }
                guard try body(current.range, current.holding) else { return false }
            }
            pending = (piece, holding)
            return true
        }
        if wantsMore, let pending { _ = try body(pending.range, pending.holding) }
    }

    /// The first byte of a range of which one of the images says anything; nil if there is none.
    func firstHeld(in range: Range<UInt64>) throws(DiskError) -> UInt64? {
        var first: UInt64?
        _ = try walk(range, layers.startIndex) { (piece, holding) throws(DiskError) in
            if holding != .nothing { first = piece.lowerBound }
            return first == nil
        }
        return first
    }

    private func walk(
        _ range: Range<UInt64>, _ index: Int, _ body: (Range<UInt64>, Holding) throws(DiskError) -> Bool
    ) throws(DiskError) -> Bool {
        guard !range.isEmpty else { return true }
        guard index < layers.endIndex else { return try body(range, .nothing) }
        let layer = layers[index].reference
        var position = range.lowerBound
        var batch = ExtentBatch()
        while position < range.upperBound {
            guard position < layer.size else { return try body(position..<range.upperBound, .zero) }
            batch.removeAll()
            do throws(DiskError) {
                try layer.map(position, min(range.upperBound, layer.size) - position, into: &batch)
            } catch {
                throw error.about(layers[index].path)
            }
            for number in 0..<batch.count {
                let piece = position..<position + batch[number].length
                let wantsMore =
                    switch batch[number].kind {
                    case .data, .encoded, .frozen: try body(piece, .data)
                    case .zero: try body(piece, .zero)
                    case .absent: try walk(piece, index + 1, body)
                    }
                guard wantsMore else { return false }
                position = piece.upperBound
            }
        }
        return true
    }
}

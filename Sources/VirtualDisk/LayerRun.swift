internal import DiskImage
internal import DiskStorage

/// Images of a chain that lie one above the other, and what they hold between them.
struct LayerRun: Sendable {
    /// The images, the top one first; there may be none.
    let layers: ArraySlice<Layer>

    init(_ layers: ArraySlice<Layer>) { self.layers = layers }

    /// Calls `body` with what the images say of a range, in order and without gaps; `body` answers whether to go on,
    /// and so does this.
    func walk(_ range: Range<UInt64>, _ body: (ChainPiece) throws(DiskError) -> Bool) throws(DiskError) -> Bool {
        try walk(range, layers.startIndex, body)
    }

    private func walk(
        _ range: Range<UInt64>, _ index: Int, _ body: (ChainPiece) throws(DiskError) -> Bool
    ) throws(DiskError) -> Bool {
        guard !range.isEmpty else { return true }
        func piece(_ part: Range<UInt64>, _ content: ChainPiece.Content) -> ChainPiece {
            ChainPiece(
                offset: part.lowerBound, length: part.upperBound - part.lowerBound, layer: index, content: content)
        }
        guard index < layers.endIndex else { return try body(piece(range, .absent)) }
        let layer = layers[index].reference
        var position = range.lowerBound
        var batch = ExtentBatch()
        while position < range.upperBound {
            guard position < layer.size else { return try body(piece(position..<range.upperBound, .ended)) }
            batch.removeAll()
            do throws(DiskError) {
                try layer.map(position, min(range.upperBound, layer.size) - position, into: &batch)
            } catch {
                // What comes before a bad entry may be all that is needed.
                if batch.count == 0 { throw error.about(layers[index].path) }
            }
            for number in 0..<batch.count {
                let extent = batch[number]
                let part = position..<position + extent.length
                let wantsMore =
                    switch extent.kind {
                    case .data, .frozen:
                        try body(piece(part, .stored(storage: extent.storage, fileOffset: extent.fileOffset)))
                    case .encoded:
                        try body(
                            piece(
                                part,
                                .encoded(storage: extent.storage, fileOffset: extent.fileOffset, skip: extent.skip)))
                    case .zero: try body(piece(part, .zero))
                    case .absent: try walk(part, index + 1, body)
                    }
                guard wantsMore else { return false }
                position = part.upperBound
            }
        }
        return true
    }

    // MARK: - Joined

    /// The same, pieces that continue each other joined.
    func forEachPiece(
        of range: Range<UInt64>, _ body: (ChainPiece) throws(DiskError) -> Bool
    ) throws(DiskError) {
        var joiner = RunJoiner<ChainPiece>()
        if try walk(range, { (piece) throws(DiskError) in try joiner.add(piece, body) }) { try joiner.end(body) }
    }

    /// What is told apart where it does not matter where bytes lie.
    private struct HeldRange: JoinableRun {
        let start: UInt64
        var length: UInt64
        let holding: ChainPiece.Holding

        func isContinued(by next: HeldRange) -> Bool { holding == next.holding }
    }

    /// Calls `body` with the parts of a range of which the images hold data, zeros or nothing; `body` answers whether
    /// to go on.
    func forEachPart(
        of range: Range<UInt64>, _ body: (Range<UInt64>, ChainPiece.Holding) throws(DiskError) -> Bool
    ) throws(DiskError) {
        var joiner = RunJoiner<HeldRange>()
        func tell(_ held: HeldRange) throws(DiskError) -> Bool {
            try body(held.start..<held.start + held.length, held.holding)
        }
        let wantsMore = try walk(range) { (piece) throws(DiskError) in
            try joiner.add(HeldRange(start: piece.offset, length: piece.length, holding: piece.holding), tell)
        }
        if wantsMore { try joiner.end(tell) }
    }

    /// The first byte of a range of which one of the images says anything; nil if there is none.
    func firstHeld(in range: Range<UInt64>) throws(DiskError) -> UInt64? {
        var first: UInt64?
        _ = try walk(range) { piece in
            if piece.holding != .nothing { first = piece.offset }
            return first == nil
        }
        return first
    }

    // MARK: - Files

    /// The storage in which a piece lies; nil where it is stored in none.
    func handle(of piece: ChainPiece) -> StorageHandle? {
        switch piece.content {
        case .stored(let storage, _), .encoded(let storage, _, _): layers[piece.layer].backend.storages[Int(storage)]
        case .zero, .ended, .absent: nil
        }
    }

    /// Bytes for which a file system is not asked whether they are a hole.
    private static let leastHole: UInt64 = 64 << 10

    /// ``forEachPiece(of:_:)``, where what a file stores has zeros where its file system has holes.
    func forEachPieceAndHole(
        of range: Range<UInt64>, _ body: (ChainPiece) throws(DiskError) -> Bool
    ) throws(DiskError) {
        try forEachPiece(of: range) { (piece) throws(DiskError) in
            guard case .stored(let storage, let place) = piece.content, piece.length >= Self.leastHole else {
                return try body(piece)
            }
            let file = layers[piece.layer].backend.storages[Int(storage)].storage
            var position = piece.offset
            while position < piece.end {
                var part = piece
                (part.offset, part.length) = (position, piece.end - position)
                let fileOffset = place + (position - piece.offset)
                part.content = .stored(storage: storage, fileOffset: fileOffset)
                if part.length >= Self.leastHole {
                    let data = try file.nextData(from: fileOffset) ?? .max..<(.max)
                    if data.lowerBound > fileOffset {
                        part.length = min(part.length, data.lowerBound - fileOffset)
                        part.content = .zero
                    } else {
                        part.length = min(part.length, max(1, data.upperBound - min(data.upperBound, fileOffset)))
                    }
                }
                guard try body(part) else { return false }
                position = part.end
            }
            return true
        }
    }
}

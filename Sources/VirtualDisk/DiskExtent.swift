internal import DiskStorage

/// A run of bytes of a disk with one origin.
public struct DiskExtent: Sendable, Equatable {
    /// Where its bytes come from.
    public enum Source: Sendable, Equatable {
        /// Image number `layer` (0 is the top one) holds them in `file` at `offset` bytes, as they are.
        case data(layer: Int, file: String, offset: UInt64)
        /// Image number `layer` holds them compressed.
        case encoded(layer: Int, file: String)
        /// Image number `layer` says that they are zeros.
        case zero(layer: Int)
        /// No image holds them; they read as zeros.
        case unallocated
    }

    /// The first byte.
    public var offset: UInt64
    /// How many bytes.
    public var length: UInt64
    public var source: Source

    /// Whether some image holds bytes for it.
    public var isAllocated: Bool {
        switch source {
        case .data, .encoded: true
        case .zero, .unallocated: false
        }
    }

    /// Whether `next` continues this extent: the same origin, and the next bytes there.
    func isContinued(by next: DiskExtent) -> Bool {
        guard offset + length == next.offset else { return false }
        if case .data(let layer, let file, let place) = source,
            case .data(let nextLayer, let nextFile, let nextPlace) = next.source
        {
            return layer == nextLayer && file == nextFile && place + length == nextPlace
        }
        return source == next.source
    }
}

extension DiskExtent: JoinableRun {}

extension Chain {
    /// Calls `body` with the extents of a range in order, neighbours joined; `body` answers whether to go on.
    func forEachExtent(
        offset: UInt64, length: UInt64, _ body: (DiskExtent) throws(DiskError) -> Bool
    ) throws(DiskError) {
        var joiner = RunJoiner<DiskExtent>()
        let wantsMore = try run.walk(offset..<offset + length) { (piece) throws(DiskError) in
            try joiner.add(DiskExtent(offset: piece.offset, length: piece.length, source: source(of: piece)), body)
        }
        if wantsMore { try joiner.end(body) }
    }

    private func source(of piece: ChainPiece) -> DiskExtent.Source {
        let file = run.handle(of: piece)?.storage.name ?? ""
        return switch piece.content {
        case .stored(_, let offset): .data(layer: piece.layer, file: file, offset: offset)
        case .encoded: .encoded(layer: piece.layer, file: file)
        case .zero: .zero(layer: piece.layer)
        case .ended, .absent: .unallocated
        }
    }
}

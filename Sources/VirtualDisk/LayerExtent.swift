public import DiskStorage

/// A run of bytes of one image of a chain with one meaning.
public struct LayerExtent: Sendable, Equatable {
    /// What the image has there.
    public enum Content: Sendable, Equatable {
        /// Bytes that lie in `file` at `offset` bytes, as they are.
        case data(file: String, offset: UInt64)
        /// Bytes that are compressed, in `file`.
        case encoded(file: String)
        /// Zeros, whatever the images below hold.
        case zero
        /// Nothing: the images below are asked.
        case absent
    }

    /// The first byte.
    public var offset: UInt64
    /// How many bytes.
    public var length: UInt64
    public var content: Content

    /// Whether `next` continues this extent.
    func isContinued(by next: LayerExtent) -> Bool {
        if case .data(let file, let place) = content, case .data(let nextFile, let nextPlace) = next.content {
            return file == nextFile && place + length == nextPlace
        }
        return content == next.content
    }
}

extension Disk {
    /// How many images the disk has.
    public var layerCount: Int { current.chain.depth }

    /// The size of the disk that image number `layer` (0 is the top one) has itself, in bytes.
    public func size(ofLayer layer: Int) -> UInt64 { current.chain.reference(layer).size }

    /// Calls `body` with the runs of a range in order, each with what image number `layer` (0 is the top one) alone has
    /// there; `body` answers whether to go on. What lies behind that image's own end is absent.
    public func forEachExtent(
        ofLayer layer: Int, offset: UInt64, length: UInt64, _ body: (LayerExtent) throws(DiskError) -> Bool
    ) throws(DiskError) {
        guard offset <= size, length <= size - offset else {
            throw DiskError(.invalidArgument, "\(length) bytes reach beyond the disk's end at \(size)", offset: offset)
        }
        try current.use { (chain) throws(DiskError) in
            guard layer >= 0, layer < chain.depth else {
                throw DiskError(.invalidArgument, "the disk has \(chain.depth) images, and no number \(layer)")
            }
            try chain.forEachExtent(ofLayer: layer, offset..<offset + length, body)
        }
    }
}

extension LayerExtent: JoinableRun {}

extension Chain {
    fileprivate func forEachExtent(
        ofLayer layer: Int, _ range: Range<UInt64>, _ body: (LayerExtent) throws(DiskError) -> Bool
    ) throws(DiskError) {
        let run = LayerRun(layers[layer...layer])
        var joiner = RunJoiner<LayerExtent>()
        let wantsMore = try run.walk(range) { (piece) throws(DiskError) in
            let file = run.handle(of: piece)?.storage.name ?? ""
            let content: LayerExtent.Content =
                switch piece.content {
                case .stored(_, let offset): .data(file: file, offset: offset)
                case .encoded: .encoded(file: file)
                case .zero: .zero
                case .ended, .absent: .absent
                }
            return try joiner.add(LayerExtent(offset: piece.offset, length: piece.length, content: content), body)
        }
        if wantsMore { try joiner.end(body) }
    }
}

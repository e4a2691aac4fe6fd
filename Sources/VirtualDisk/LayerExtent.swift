internal import DiskImage
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
            try chain.reference(layer).forEachExtent(offset..<offset + length, body)
        }
    }
}

extension LayerReference {
    fileprivate func forEachExtent(
        _ range: Range<UInt64>, _ body: (LayerExtent) throws(DiskError) -> Bool
    ) throws(DiskError) {
        var pending: LayerExtent?
        var wantsMore = true
        func add(_ extent: LayerExtent) throws(DiskError) {
            if let current = pending {
                if current.isContinued(by: extent) {
                    pending?.length += extent.length
                    return
                }
                wantsMore = try body(current)
            }
            pending = extent
        }
        let end = min(range.upperBound, max(range.lowerBound, size))
        var position = range.lowerBound
        var batch = ExtentBatch()
        while position < end, wantsMore {
            batch.removeAll()
            do throws(DiskError) {
                try map(position, end - position, into: &batch)
            } catch {
                throw error.about(object.path)
            }
            for number in 0..<batch.count where wantsMore {
                let extent = batch[number]
                try add(LayerExtent(offset: position, length: extent.length, content: content(of: extent)))
                position += extent.length
            }
        }
        if wantsMore, end < range.upperBound {
            try add(LayerExtent(offset: end, length: range.upperBound - end, content: .absent))
        }
        if wantsMore, let pending { _ = try body(pending) }
    }

    private func content(of extent: Extent) -> LayerExtent.Content {
        switch extent.kind {
        case .absent: .absent
        case .zero: .zero
        case .encoded: .encoded(file: storage(extent.storage).storage.name)
        case .data, .frozen: .data(file: storage(extent.storage).storage.name, offset: extent.fileOffset)
        }
    }
}

internal import DiskImage
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

extension Chain {
    /// Calls `body` with the extents of a range in order, neighbours joined; `body` answers whether to go on.
    func forEachExtent(
        offset: UInt64, length: UInt64, _ body: (DiskExtent) throws(DiskError) -> Bool
    ) throws(DiskError) {
        var pending: DiskExtent?
        var wantsMore = true
        _ = try walk(offset, length, from: 0) { (extent) throws(DiskError) in
            if let current = pending {
                if current.isContinued(by: extent) {
                    pending?.length += extent.length
                    return true
                }
                wantsMore = try body(current)
            }
            pending = extent
            return wantsMore
        }
        if wantsMore, let pending { _ = try body(pending) }
    }

    private func walk(
        _ offset: UInt64, _ length: UInt64, from first: Int, _ body: (DiskExtent) throws(DiskError) -> Bool
    ) throws(DiskError) -> Bool {
        var position = offset
        let end = offset + length
        guard first < depth else {
            return try body(DiskExtent(offset: offset, length: length, source: .unallocated))
        }
        let layer = reference(first)
        var batch = ExtentBatch()
        while position < end {
            guard position < layer.size else {
                return try body(DiskExtent(offset: position, length: end - position, source: .unallocated))
            }
            batch.removeAll()
            try layer.map(position, min(end, layer.size) - position, into: &batch)
            for number in 0..<batch.count {
                let extent = batch[number]
                var wantsMore = true
                switch extent.kind {
                case .absent:
                    wantsMore = try walk(position, extent.length, from: first + 1, body)
                case .zero:
                    wantsMore = try body(
                        DiskExtent(offset: position, length: extent.length, source: .zero(layer: first)))
                case .data, .frozen:
                    let file = layer.storage(extent.storage).storage.name
                    let source = DiskExtent.Source.data(layer: first, file: file, offset: extent.fileOffset)
                    wantsMore = try body(DiskExtent(offset: position, length: extent.length, source: source))
                case .encoded:
                    let file = layer.storage(extent.storage).storage.name
                    wantsMore = try body(
                        DiskExtent(
                            offset: position, length: extent.length, source: .encoded(layer: first, file: file)))
                }
                guard wantsMore else { return false }
                position += extent.length
            }
        }
        return true
    }
}

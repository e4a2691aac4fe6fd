internal import DiskImage
internal import DiskStorage

/// A run of bytes of a disk that is to be copied.
struct CopyPiece {
    /// What the bytes are.
    enum Content {
        /// They lie, as they are, in a file.
        case stored(StorageHandle, fileOffset: UInt64)
        /// They must be read through the disk.
        case encoded
        case zero
        /// None of the layers that were asked says anything of them.
        case absent
    }

    var offset: UInt64
    var length: UInt64
    var content: Content

    var end: UInt64 { offset + length }

    var isData: Bool {
        switch content {
        case .stored, .encoded: true
        case .zero, .absent: false
        }
    }
}

extension Chain {
    /// The pieces of a range, in order and without gaps, as the layers from `first` down to the one before `last` have
    /// it.
    func pieces(_ range: Range<UInt64>, from first: Int = 0, to last: Int) throws(DiskError) -> [CopyPiece] {
        var result: [CopyPiece] = []
        try collect(range, from: first, to: last, into: &result)
        return result
    }

    private func collect(
        _ range: Range<UInt64>, from first: Int, to last: Int, into result: inout [CopyPiece]
    ) throws(DiskError) {
        guard first < min(last, depth) else { return Self.add(range, .absent, to: &result) }
        let layer = reference(first)
        var position = range.lowerBound
        var batch = ExtentBatch()
        while position < range.upperBound {
            guard position < layer.size else {
                // What lies below a layer that has ended is hidden by it.
                return Self.add(position..<range.upperBound, .zero, to: &result)
            }
            batch.removeAll()
            try layer.map(position, min(range.upperBound, layer.size) - position, into: &batch)
            for number in 0..<batch.count {
                let extent = batch[number]
                let part = position..<position + extent.length
                switch extent.kind {
                case .absent: try collect(part, from: first + 1, to: last, into: &result)
                case .zero: Self.add(part, .zero, to: &result)
                case .data, .frozen:
                    try Self.addStored(part, in: layer.storage(extent.storage), at: extent.fileOffset, to: &result)
                case .encoded: Self.add(part, .encoded, to: &result)
                }
                position = part.upperBound
            }
        }
    }

    private static func add(_ range: Range<UInt64>, _ content: CopyPiece.Content, to result: inout [CopyPiece]) {
        guard !range.isEmpty else { return }
        let length = range.upperBound - range.lowerBound
        if let last = result.last {
            switch (last.content, content) {
            case (.zero, .zero), (.absent, .absent), (.encoded, .encoded):
                result[result.count - 1].length += length
                return
            case (.stored(let file, let place), .stored(let next, let nextPlace))
            where file === next && place + last.length == nextPlace:
                result[result.count - 1].length += length
                return
            default: break
            }
        }
        result.append(CopyPiece(offset: range.lowerBound, length: length, content: content))
    }

    /// Bytes for which a file system is not asked whether they are a hole.
    private static let leastHole: UInt64 = 64 << 10

    /// What a file stores has holes where its file system has them: zeros.
    private static func addStored(
        _ range: Range<UInt64>, in handle: StorageHandle, at place: UInt64, to result: inout [CopyPiece]
    ) throws(DiskError) {
        var position = range.lowerBound
        while position < range.upperBound {
            let fileOffset = place + (position - range.lowerBound)
            var data = position..<range.upperBound
            if range.upperBound - position >= leastHole {
                let known = try handle.storage.nextData(from: fileOffset)
                let length = range.upperBound - position
                let start = min(length, known.map { $0.lowerBound - min($0.lowerBound, fileOffset) } ?? length)
                let end = min(length, known.map { $0.upperBound - fileOffset } ?? length)
                add(position..<position + start, .zero, to: &result)
                data = position + start..<position + max(start, end)
                if known == nil { return }
            }
            add(data, .stored(handle, fileOffset: fileOffset + (data.lowerBound - position)), to: &result)
            position = data.upperBound
        }
    }
}

internal import DiskStorage

/// The last few blocks of which a part was wanted: neighbouring small reads want the same block.
final class DecompressedBlocks: Sendable {
    private let recent = Locked<[(key: UInt64, bytes: [UInt8])]>([])
    private let blockSize: Int
    private let limit: Int

    /// Keeps blocks of `blockSize` bytes, about a mebibyte of them.
    init(blockSize: UInt64) {
        self.blockSize = Int(blockSize)
        limit = max(1, min(16, (1 << 20) / Int(blockSize)))
    }

    /// Fills `buffer` with the bytes from `skip` on of the block that `key` stands for; `decompress` fills memory with
    /// all of the block, if it is not known.
    func read(
        _ key: UInt64, skipping skip: Int, into buffer: IOBuffer, _ decompress: (IOBuffer) throws(DiskError) -> Void
    ) throws(DiskError) {
        let known: [UInt8]? = recent.withLock { list in
            guard let index = list.firstIndex(where: { $0.key == key }) else { return nil }
            let entry = list.remove(at: index)
            list.append(entry)
            return entry.bytes
        }
        if let known {
            return try known.withIOBytes { (block) throws(DiskError) in
                buffer.copy(from: block.slice(skip, buffer.count))
            }
        }
        // Who reads all of a block goes on with the next one.
        if skip == 0, buffer.count == blockSize { return try decompress(buffer) }
        var bytes = [UInt8](repeating: 0, count: blockSize)
        try bytes.withIOBuffer { (block) throws(DiskError) in
            try decompress(block)
            buffer.copy(from: block.slice(skip, buffer.count).readOnly)
        }
        recent.withLock { list in
            if list.count >= limit { list.removeFirst() }
            list.append((key, bytes))
        }
    }
}

internal import DiskStorage

/// The last few blocks that were decompressed: neighbouring small reads want the same block.
final class DecompressedBlocks: Sendable {
    private let recent = Locked<[(key: UInt64, bytes: [UInt8])]>([])
    private let limit: Int

    /// Keeps blocks of `blockSize` bytes, about a mebibyte of them.
    init(blockSize: UInt64) { limit = max(1, min(16, (1 << 20) / Int(blockSize))) }

    /// Fills `buffer` with the bytes from `skip` on of the block that `key` stands for; `decompress` makes it, if it is
    /// not known, and all blocks are as long as another.
    func read(
        _ key: UInt64, skipping skip: Int, into buffer: IOBuffer, _ decompress: () throws(DiskError) -> [UInt8]
    ) throws(DiskError) {
        let known: [UInt8]? = recent.withLock { list in
            guard let index = list.firstIndex(where: { $0.key == key }) else { return nil }
            let entry = list.remove(at: index)
            list.append(entry)
            return entry.bytes
        }
        let bytes: [UInt8]
        if let known { bytes = known } else { bytes = try decompress() }
        try bytes.withIOBytes { (block) throws(DiskError) in buffer.copy(from: block.slice(skip, buffer.count)) }
        guard known == nil else { return }
        recent.withLock { list in
            if list.count >= limit { list.removeFirst() }
            list.append((key, bytes))
        }
    }
}

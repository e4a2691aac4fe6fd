internal import DiskStorage

/// What was read last of a file on a server, in bounded memory: blocks of 64 KiB.
///
/// Images are read in pages of 4 KiB where their tables lie; a request for each would take its time. Who reads on
/// behind what was read before gets more at a time, up to 1 MiB.
struct HTTPBlockCache {
    static let blockSize: UInt64 = 64 << 10
    private static let longestRun: UInt64 = 16

    private struct Block {
        var bytes: [UInt8]
        var lastUse: UInt64
        /// How many blocks came by the same request.
        var run: UInt64
    }

    private var blocks: [UInt64: Block] = [:]
    private var fetching: Set<UInt64> = []
    private var time: UInt64 = 0
    private let capacity: Int

    /// - Parameter size: Of the memory in bytes; four blocks there are in any case.
    init(size: Int) { capacity = max(4, size / Int(Self.blockSize)) }

    /// Whether somebody is asking the server for it.
    func isFetching(_ block: UInt64) -> Bool { fetching.contains(block) }

    /// The bytes of a block; nil if it is not here.
    mutating func bytes(of block: UInt64) -> [UInt8]? {
        time += 1
        blocks[block]?.lastUse = time
        return blocks[block]?.bytes
    }

    /// Announces a request for a block that is not here, and for some behind it: how many, at least `wanted` if nothing
    /// is in the way.
    mutating func beginFetch(_ block: UInt64, wanted: UInt64, blockCount: UInt64) -> UInt64 {
        let before = block > 0 ? blocks[block - 1]?.run : nil
        let longest = min(Self.longestRun, max(1, UInt64(capacity) / 4), blockCount - block)
        let goal = min(longest, max(wanted, (before ?? 0) * 2, 1))
        var count: UInt64 = 0
        while count < goal, blocks[block + count] == nil, !fetching.contains(block + count) {
            fetching.insert(block + count)
            count += 1
        }
        return count
    }

    /// The request is done: `bytes` begin with the block; none if it failed.
    mutating func endFetch(_ block: UInt64, count: UInt64, bytes: [UInt8]) {
        for number in block..<block + count { fetching.remove(number) }
        var start = 0
        var number = block
        while start < bytes.count {
            if blocks.count >= capacity, let oldest = blocks.min(by: { $0.value.lastUse < $1.value.lastUse }) {
                blocks[oldest.key] = nil
            }
            time += 1
            let end = min(start + Int(Self.blockSize), bytes.count)
            blocks[number] = Block(bytes: Array(bytes[start..<end]), lastUse: time, run: count)
            start = end
            number += 1
        }
    }
}

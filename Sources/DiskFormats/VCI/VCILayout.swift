public import DiskStorage

/// Where things lie in a cache of ours, which its size alone decides.
///
/// Header, block map, room for the tree with its root in front, and *slots*: pieces of equal size, each with room for
/// one cached extent, an aligned *chunk* of the disk. There is room for the tree of a full cache, so that saving it
/// never lacks any.
public struct VCILayout: Sendable, Equatable {
    /// Bytes of a block.
    public static let blockSize: UInt64 = 512
    /// Blocks that a block of the map has bits for: all sizes are multiples of it.
    public static let granularity: UInt64 = 4096
    /// Blocks of the smallest cache, 2 MiB, and of the largest, 512 GiB.
    public static let sizes: ClosedRange<UInt64> = 4096...1 << 30
    /// Chunks that a cache has at most, since what is known of each is in memory.
    public static let slotLimit: UInt64 = 1 << 18
    /// Blocks of a chunk at least: 64 KiB.
    private static let smallestChunk: UInt64 = 128
    static let mapAddress: UInt64 = VCIHeader.blocks

    /// Blocks of the file.
    public let size: UInt64
    /// Blocks of the map, its header included.
    public let mapBlocks: UInt32
    /// The address of the tree's root, which the other nodes follow.
    public let rootAddress: UInt64
    /// How many nodes there is room for.
    public let nodeCount: UInt64
    /// The address of the first slot.
    public let firstSlot: UInt64
    /// How many slots there are.
    public let slotCount: UInt64
    /// Blocks of a slot, and of an extent that does not lie at the disk's end.
    public let chunkBlocks: UInt64

    /// The layout of a cache of so many blocks; nil if a cache cannot have that size.
    public init?(size: UInt64) {
        guard Self.sizes.contains(size), size % Self.granularity == 0 else { return nil }
        self.size = size
        mapBlocks = UInt32(1 + size / Self.granularity)
        rootAddress = Self.mapAddress + UInt64(mapBlocks)
        var chunk = Self.smallestChunk
        while size / chunk > Self.slotLimit { chunk *= 2 }
        chunkBlocks = chunk
        // At least one slot: the smallest cache has room for 31.
        nodeCount = VCITreeShape.nodeCount(forExtents: (size - rootAddress) / chunk)
        firstSlot = rootAddress + nodeCount * VCINode.blocks
        slotCount = (size - firstSlot) / chunk
    }

    /// The layout of a cache of so many bytes, rounded down to what can be.
    public init(bytes: UInt64) throws(DiskError) {
        guard let layout = VCILayout(size: bytes / Self.blockSize / Self.granularity * Self.granularity) else {
            throw DiskError(.invalidArgument, "a cache can have 2 MiB to 512 GiB, not \(bytes) bytes")
        }
        self = layout
    }

    /// The first block of a slot.
    @inline(__always)
    public func address(ofSlot slot: UInt64) -> UInt64 { firstSlot + slot * chunkBlocks }

    /// The slot that begins at a block, if one does.
    public func slot(at address: UInt64) -> UInt64? {
        guard address >= firstSlot, (address - firstSlot) % chunkBlocks == 0 else { return nil }
        let slot = (address - firstSlot) / chunkBlocks
        return slot < slotCount ? slot : nil
    }
}

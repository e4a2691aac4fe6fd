public import DiskStorage

/// Everything that a cache's metadata says, read and found to be consistent: nothing lies over anything else or outside
/// the file, the tree is in order, and the block map says the same.
public struct VCIContents: Sendable {
    /// All extents in the order of the disk.
    public private(set) var extents: [VCIExtent] = []
    /// Their numbers in the order of use, the one that was used longest ago first.
    public private(set) var order: [UInt32] = []
    public let map: VCIBlockMap
    /// How many nodes the tree has.
    public private(set) var nodeCount = 0
    /// How many levels it has.
    public private(set) var depth = 0

    /// More extents than a cache of ours can have are not looked at.
    private static let extentLimit = 2 * Int(VCILayout.slotLimit)
    private static let nodeLimit = 1 << 16
    private static let depthLimit = 8

    private var leaves: [UInt64: Range<Int>] = [:]
    private var nodes: Set<UInt64> = []

    /// Reads all metadata behind a header; throws ``DiskError/Kind/invalidImage`` for what is wrong first.
    public init(_ storage: any Storage, _ header: VCIHeader) throws(DiskError) {
        guard header.size <= VCILayout.sizes.upperBound else {
            throw DiskError(.unsupported, "the cache is said to have \(header.size) blocks; up to 2^30 are supported")
        }
        let place = try Self.offset(of: header.mapAddress, in: header)
        map = try VCIBlockMap(
            parsing: storage.bytes(at: place, count: VCIBlockMap.byteCount, for: .allocation, "the block map"))
        guard map.managed <= header.size, map.managed % VCILayout.granularity == 0,
            UInt64(header.mapBlocks) == 1 + map.managed / VCILayout.granularity
        else {
            throw DiskError(
                .invalidImage,
                "the block map has \(header.mapBlocks) blocks for \(map.managed) blocks of \(header.size)")
        }
        try readTree(storage, header)
        let used = try usedRanges(header, fileLength: storage.length())
        order = try VCIUseOrder.read(extents, leaves: leaves)
        try compareBits(used, storage, header)
    }

    /// Where a block of the file lies, in bytes.
    private static func offset(of address: UInt64, in header: VCIHeader) throws(DiskError) -> UInt64 {
        guard address < header.size else {
            throw DiskError(.invalidImage, "an address is \(address), the cache has \(header.size) blocks")
        }
        return address * VCILayout.blockSize
    }

    // MARK: - The tree

    /// A node to be read, and which blocks of the disk it may have.
    private struct Step {
        let address: UInt64
        let range: Range<UInt64>
        let depth: Int
    }

    private mutating func readTree(_ storage: any Storage, _ header: VCIHeader) throws(DiskError) {
        var steps = [Step(address: header.rootAddress, range: 0..<UInt64.max, depth: 1)]
        while let step = steps.popLast() {
            depth = max(depth, step.depth)
            guard step.depth <= Self.depthLimit else {
                throw DiskError(.invalidImage, "the tree has more than \(Self.depthLimit) levels")
            }
            guard nodes.insert(step.address).inserted, nodes.count <= Self.nodeLimit else {
                throw DiskError(.invalidImage, "a node of the tree is in it twice, or it has too many")
            }
            let place = try Self.offset(of: step.address, in: header)
            let bytes = try storage.bytes(at: place, count: VCINode.byteCount, for: .table, "a node of the tree")
            switch try VCINode(parsing: bytes) {
            case .extents(let part):
                guard !part.isEmpty || step.depth == 1 else { throw Self.emptyNode }
                try append(part, of: step)
            case .branches(let branches):
                guard !branches.isEmpty else { throw Self.emptyNode }
                // Taken from the end, so that leaves are read in the order of the disk.
                try steps.append(contentsOf: Self.steps(branches, below: step).reversed())
            }
        }
        nodeCount = nodes.count
    }

    private static var emptyNode: DiskError { DiskError(.invalidImage, "a node of the tree is empty") }

    private static var disorder: DiskError {
        DiskError(.invalidImage, "the entries of the tree are not in order, or not where their parents say")
    }

    private mutating func append(_ part: [VCIExtent], of step: Step) throws(DiskError) {
        guard extents.count + part.count <= Self.extentLimit else {
            throw DiskError(.unsupported, "the cache has more than \(Self.extentLimit) extents")
        }
        var position = step.range.lowerBound
        for extent in part {
            let end = try extent.first.adding(UInt64(extent.blocks), "an extent")
            guard extent.first >= position, end <= step.range.upperBound else { throw Self.disorder }
            position = end
        }
        leaves[step.address] = extents.count..<extents.count + part.count
        extents += part
    }

    private static func steps(_ branches: [VCIBranch], below step: Step) throws(DiskError) -> [Step] {
        var steps: [Step] = []
        var position = step.range.lowerBound
        for (index, branch) in branches.enumerated() {
            let end = try branch.first.adding(UInt64(branch.blocks), "an entry of the tree")
            guard branch.first >= position, end <= step.range.upperBound else { throw Self.disorder }
            // A child that covers more than the field can say ends where the next one begins.
            let isClipped = branch.blocks == .max
            let next = index + 1 < branches.count ? branches[index + 1].first : step.range.upperBound
            let limit = isClipped ? max(end, next) : end
            steps.append(Step(address: branch.child, range: branch.first..<limit, depth: step.depth + 1))
            position = limit
        }
        return steps
    }

    // MARK: - Space

    /// What header, map, nodes and data take, in the order of the file.
    private func usedRanges(_ header: VCIHeader, fileLength: UInt64) throws(DiskError) -> [Range<UInt64>] {
        var used = [0..<VCIHeader.blocks, header.mapAddress..<header.mapAddress + UInt64(header.mapBlocks)]
        used.reserveCapacity(2 + nodes.count + extents.count)
        for node in nodes { used.append(node..<node + VCINode.blocks) }
        let metadata = used.reduce(0) { $0 + ($1.upperBound - $1.lowerBound) }
        var data: UInt64 = 0
        for extent in extents {
            used.append(extent.address..<(try extent.address.adding(UInt64(extent.blocks), "an extent's data")))
            data += UInt64(extent.blocks)
        }
        guard metadata == map.metadata, data == map.data else {
            throw DiskError(
                .invalidImage,
                "the block map counts \(map.metadata) blocks of metadata and \(map.data) of data; "
                    + "there are \(metadata) and \(data)")
        }
        used.sort { $0.lowerBound < $1.lowerBound }
        var end: UInt64 = 0
        for range in used {
            guard range.lowerBound >= end else {
                throw DiskError(
                    .invalidImage, "something lies over something else",
                    offset: range.lowerBound.multipliedReportingOverflow(by: VCILayout.blockSize).partialValue)
            }
            end = range.upperBound
        }
        guard end <= map.managed, end <= fileLength / VCILayout.blockSize else {
            throw DiskError(
                .invalidImage, "what is cached ends at block \(end), the file at \(fileLength / VCILayout.blockSize)")
        }
        return used
    }

    private func compareBits(
        _ used: [Range<UInt64>], _ storage: any Storage, _ header: VCIHeader
    ) throws(DiskError) {
        var bits = VCIMapBits(used)
        let total = Int(map.managed / 8)
        let start = (header.mapAddress + 1) * VCILayout.blockSize
        var done = 0
        while done < total {
            let count = min(VCIMapBits.pieceSize, total - done)
            let stored = try storage.bytes(
                at: start + UInt64(done), count: count, for: .allocation, "the block map")
            let expected = bits.next(from: UInt64(done) * 8, count: count)
            guard expected.map({ stored == $0 }) ?? stored.allSatisfy({ $0 == 0 }) else {
                throw DiskError(
                    .invalidImage, "the bits of the block map are not what is in use", offset: start + UInt64(done))
            }
            done += count
        }
    }
}

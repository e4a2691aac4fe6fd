internal import DiskStorage

/// The nodes of a tree that is made at one go: leaves in the order of the disk, then the level above them, and so on.
/// The root lies in front of all others, where the header has it from the beginning.
///
/// Of a small tree the leaves are not filled, but as many as each has extents: the order of use is kept by leaves, and
/// with few of them little would be left of it.
public struct VCITreeShape: Sendable {
    /// How many extents it holds.
    public let extentCount: Int
    /// How many of them a leaf has.
    private let leafSize: Int
    private let rootAddress: UInt64

    /// - Parameter extentCount: No more than the layout has slots.
    public init(extentCount: Int, _ layout: VCILayout) {
        precondition(extentCount <= layout.slotCount)
        self.extentCount = extentCount
        leafSize = Self.leafSize(forExtents: extentCount)
        rootAddress = layout.rootAddress
    }

    /// The square root, rounded up, as far as there is room.
    private static func leafSize(forExtents count: Int) -> Int {
        var size = 1
        while size < VCINode.extentLimit, size * size < count { size += 1 }
        return size
    }

    /// How many nodes a tree has for so many extents. It never has fewer for more.
    static func nodeCount(forExtents count: UInt64) -> UInt64 {
        let leafSize = UInt64(leafSize(forExtents: Int(count)))
        var level = max(1, count.dividedRoundingUp(by: leafSize))
        var nodes = level
        while level > 1 {
            level = level.dividedRoundingUp(by: UInt64(VCINode.branchLimit))
            nodes += level
        }
        return nodes
    }

    /// How many nodes there are.
    var nodeCount: UInt64 { Self.nodeCount(forExtents: UInt64(extentCount)) }

    /// Whether the root is the only leaf.
    private var isOneLeaf: Bool { extentCount <= leafSize }

    /// The address of the leaf that holds an extent, by its number in the order of the disk.
    @inline(__always)
    func leafAddress(of index: Int) -> UInt64 {
        isOneLeaf ? rootAddress : address(ofNode: 1 + index / leafSize)
    }

    /// The numbers of all extents in the same leaf.
    @inline(__always)
    func leafMates(of index: Int) -> Range<Int> {
        let first = index / leafSize * leafSize
        return first..<min(first + leafSize, extentCount)
    }

    @inline(__always)
    private func address(ofNode number: Int) -> UInt64 { rootAddress + UInt64(number) * VCINode.blocks }

    /// Calls `write` with the address and the bytes of each node. `extents` are in the order of the disk, their links
    /// set.
    func forEachNode(
        _ extents: [VCIExtent], _ write: (UInt64, [UInt8]) throws(DiskError) -> Void
    ) throws(DiskError) {
        precondition(extents.count == extentCount)
        if isOneLeaf { return try write(rootAddress, VCINode.extents(extents).encode()) }
        var next = 1
        var level: [VCIBranch] = []
        for start in stride(from: 0, to: extentCount, by: leafSize) {
            let part = extents[leafMates(of: start)]
            guard let first = part.first, let last = part.last else { continue }
            level.append(branch(first.first, to: last.first + UInt64(last.blocks), next))
            try write(address(ofNode: next), VCINode.extents(Array(part)).encode())
            next += 1
        }
        while level.count > VCINode.branchLimit {
            var above: [VCIBranch] = []
            for start in stride(from: 0, to: level.count, by: VCINode.branchLimit) {
                let part = Array(level[start..<min(start + VCINode.branchLimit, level.count)])
                guard let first = part.first, let last = part.last else { continue }
                above.append(branch(first.first, to: last.first + UInt64(last.blocks), next))
                try write(address(ofNode: next), VCINode.branches(part).encode())
                next += 1
            }
            level = above
        }
        try write(rootAddress, VCINode.branches(level).encode())
    }

    private func branch(_ first: UInt64, to end: UInt64, _ node: Int) -> VCIBranch {
        VCIBranch(first: first, blocks: UInt32(clamping: end - first), child: address(ofNode: node))
    }
}

/// The order in which extents were used, as the links of their entries tell it.
///
/// A link names the node of the extent before or after, not the extent. So that the order can be read again, of the
/// extents in one leaf that have the same node before them, the ones that come first in the disk are the ones that were
/// used first. Who writes gives up the order among those, and the order of leaves is exact.
public enum VCIUseOrder {
    /// Sets the links of all extents. `order` has their numbers, the one that was used longest ago first.
    public static func link(_ extents: inout [VCIExtent], _ order: [UInt32], _ shape: VCITreeShape) {
        precondition(order.count == extents.count)
        var node: UInt64 = 0
        for index in order {
            extents[Int(index)].previous = node
            node = shape.leafAddress(of: Int(index))
        }
        var isTaken = [Bool](repeating: false, count: extents.count)
        node = 0
        for position in order.indices {
            let index = Int(order[position])
            let taken = shape.leafMates(of: index).first { !isTaken[$0] && extents[$0].previous == node }
            guard let taken else { preconditionFailure("as many extents as places have that node before them") }
            isTaken[taken] = true
            extents[taken].next = position + 1 < order.count ? shape.leafAddress(of: Int(order[position + 1])) : 0
            node = shape.leafAddress(of: index)
        }
    }

    /// The numbers of extents in their order of use, the one that was used longest ago first. `leaves` tells which of
    /// them are in which leaf.
    static func read(_ extents: [VCIExtent], leaves: [UInt64: Range<Int>]) throws(DiskError) -> [UInt32] {
        var order: [UInt32] = []
        order.reserveCapacity(extents.count)
        var isTaken = [Bool](repeating: false, count: extents.count)
        guard let first = extents.firstIndex(where: { $0.previous == 0 }) else {
            if extents.isEmpty { return [] }
            throw mistake("no extent is the one that was used longest ago")
        }
        guard var node = leaves.first(where: { $0.value.contains(first) })?.key else {
            preconditionFailure("every extent is in a leaf")
        }
        var index = first
        while true {
            isTaken[index] = true
            order.append(UInt32(index))
            let next = extents[index].next
            if next == 0 { break }
            let mates = leaves[next] ?? 0..<0
            guard let found = mates.first(where: { !isTaken[$0] && extents[$0].previous == node }) else {
                throw mistake("after \(order.count) extents the next one is not where it should be")
            }
            index = found
            node = next
        }
        guard order.count == extents.count else {
            throw mistake("it ends after \(order.count) of \(extents.count) extents")
        }
        return order
    }

    private static func mistake(_ what: String) -> DiskError {
        DiskError(.invalidImage, "the order of use is broken: \(what)")
    }
}

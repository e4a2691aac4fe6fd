internal import DiskImage
internal import DiskStorage

extension QCOW2Driver: MeasurableDriver {
    /// L2 tables come with the first cluster that they are for, refcount blocks with the first cluster that they count,
    /// and a longer refcount table when there is no entry left for one: as ``QCOW2Allocator`` does it.
    func growth(of request: CreateRequest, companions: any CompanionOpener) throws(DiskError) -> ImageGrowth {
        let creator = try QCOW2Creator(request, companions)
        let header = creator.growthHeader
        let initial = try creator.initialClusters()
        guard !header.hasDataFile else {
            // The data file has its whole length from the beginning.
            guard request.variant == nil || request.variant == QCOW2Variant.dynamic.rawValue else { return .none }
            return ImageGrowth(blockSize: header.clusterSize, tableCoverage: header.l2Coverage) { empty, _, tables in
                var file = QCOW2FileGrowth(header, initial)
                file.take(tables)
                return empty.growing(by: file.end - initial.all, of: header.clusterSize)
            }
        }
        guard creator.isGrowing else { return .none }
        return ImageGrowth(blockSize: header.clusterSize, tableCoverage: header.l2Coverage) { _, clusters, tables in
            var file = QCOW2FileGrowth(header, initial)
            file.take(clusters + tables)
            return UInt64(0).growing(by: file.end, of: header.clusterSize)
        }
    }
}

/// The clusters of a file to which clusters are added at the end alone.
private struct QCOW2FileGrowth {
    /// How many clusters the file has.
    private(set) var end: UInt64
    private let clusterSize: UInt64
    /// Clusters that a refcount block counts, and refcount blocks that a cluster of the table names.
    private let perBlock: UInt64
    private let perTable: UInt64
    private var tableEntries: UInt64
    private var blocks: UInt64

    init(_ header: QCOW2Header, _ initial: (table: UInt64, blocks: UInt64, all: UInt64)) {
        end = initial.all
        clusterSize = header.clusterSize
        perBlock = 1 << QCOW2RefcountLayout(order: header.refcountOrder).perBlockBits(UInt64(header.clusterBits))
        perTable = header.clusterSize / 8
        tableEntries = initial.table * perTable
        blocks = initial.blocks
    }

    /// Adds clusters, and what counts them.
    mutating func take(_ count: UInt64) {
        var left = count
        while left > 0 {
            let index = end / perBlock
            if index >= blocks {
                if index >= tableEntries { growTable(index) } else { addBlock() }
                continue
            }
            let fitting = min(left, (index + 1) * perBlock - end)
            end += fitting
            left -= fitting
        }
    }

    private mutating func addBlock() {
        end += 1
        blocks += 1
    }

    /// A table half as long again, behind the blocks that count it; pages are filled up.
    private mutating func growTable(_ index: UInt64) {
        let page = max(1, 4096 / clusterSize)
        let start = end.dividedRoundingUp(by: page) * page
        var entries = max(index + 1, tableEntries + tableEntries / 2)
        var newBlocks: UInt64 = 0
        var tableClusters: UInt64 = 0
        while true {
            tableClusters = entries.dividedRoundingUp(by: perTable)
            let last = (start + tableClusters + newBlocks - 1) / perBlock
            let needed = last + 1 - min(last + 1, blocks)
            if needed <= newBlocks, last < tableClusters * perTable { break }
            newBlocks = max(newBlocks, needed)
            entries = max(entries, last + 1)
        }
        end = (start + tableClusters + newBlocks).dividedRoundingUp(by: page) * page
        blocks += newBlocks
        tableEntries = tableClusters * perTable
    }
}

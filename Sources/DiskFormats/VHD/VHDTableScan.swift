internal import DiskImage
internal import DiskStorage

/// One pass over the block allocation table: which part of the file is in use.
struct VHDTableScan {
    /// Where the last thing that is in use ends: a block, the table, the headers, a parent's path.
    private(set) var end: UInt64
    /// How many blocks the image has.
    private(set) var allocatedBlocks: UInt64 = 0

    /// Bytes of the table that are read at once.
    private static let chunkSize: UInt64 = 64 << 10

    /// Goes through the table in the file, whose blocks lie before `limit`. Throws ``DiskError/Kind/needsRepair`` if an
    /// entry leads to where no block can be: when the file grows, a new block would come to lie there too.
    init(_ structure: VHDStructure, _ storage: any Storage, limit: UInt64) throws(DiskError) {
        end = max(structure.headerRange.upperBound, structure.tableEnd)
        if let batmap = try VHDBatmap(structure, storage) { end = max(end, batmap.end) }
        for locator in structure.header?.locators ?? [] where locator.isUsed {
            if locator.spaceEnd <= structure.fileLength { end = max(end, locator.spaceEnd) }
        }
        let places = VHDBlockPlaces(structure)
        try Self.forEachEntry(structure, storage) { (entry, block) throws(DiskError) in
            let start = UInt64(entry) * 512
            guard places.isInside(start, block: block, end: limit) else {
                throw DiskError(
                    .needsRepair,
                    "block \(block) is said to lie at byte \(start), where no block can be: "
                        + "run 'vdimg check --repair' first", offset: structure.tableRange.lowerBound + block * 4)
            }
            allocatedBlocks += 1
            end = max(end, start + places.bitmapSize + places.blockSize)
        }
    }

    /// Calls `body` with the entries that are not absent, and with their blocks.
    static func forEachEntry(
        _ structure: VHDStructure, _ storage: any Storage, _ body: (UInt32, UInt64) throws(DiskError) -> Void
    ) throws(DiskError) {
        let range = structure.tableRange
        for start in stride(from: range.lowerBound, to: range.upperBound, by: Int(chunkSize)) {
            let count = min(chunkSize, range.upperBound - start)
            let bytes = try storage.bytes(at: start, count: Int(count), for: .table, "the block allocation table")
            for place in stride(from: 0, to: bytes.count, by: 4) {
                let entry =
                    UInt32(bytes[place]) << 24 | UInt32(bytes[place + 1]) << 16 | UInt32(bytes[place + 2]) << 8
                    | UInt32(bytes[place + 3])
                if entry != .max { try body(entry, (start - range.lowerBound) / 4 + UInt64(place / 4)) }
            }
        }
    }
}

/// Where blocks can lie. A plain value, for the hot path.
struct VHDBlockPlaces {
    let blockSize: UInt64
    let bitmapSize: UInt64
    private let virtualSize: UInt64
    private let header: Range<UInt64>
    private let table: Range<UInt64>

    init(_ structure: VHDStructure) {
        blockSize = structure.blockSize
        bitmapSize = structure.bitmapSize
        virtualSize = structure.virtualSize
        header = structure.headerRange
        table = structure.tableRange
    }

    /// Whether the block that is said to begin at `start` (with its bitmap) lies between the headers and `end`, as far
    /// as the disk has bytes in it.
    @inline(__always)
    func isInside(_ start: UInt64, block: UInt64, end: UInt64) -> Bool {
        let used = min(blockSize, virtualSize &- block &* blockSize)
        let blockEnd = start &+ bitmapSize &+ used
        return start >= 512 && blockEnd <= end && (start >= header.upperBound || blockEnd <= header.lowerBound)
            && (start >= table.upperBound || blockEnd <= table.lowerBound)
    }
}

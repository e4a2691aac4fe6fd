internal import DiskStorage

/// A group's descriptor (Linux, Documentation/filesystems/ext4/group_descr.rst), least significant byte first; the
/// second half is there with the feature 64bit alone.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0, 32 | 4 | bg_block_bitmap, low and high |
/// | 4, 36 | 4 | bg_inode_bitmap |
/// | 8, 40 | 4 | bg_inode_table |
/// | 12, 44 | 2 | bg_free_blocks_count, in clusters |
/// | 18 | 2 | bg_flags |
/// | 24, 56 | 2 | bg_block_bitmap_csum |
/// | 30 | 2 | bg_checksum |
private struct ExtGroup {
    let blockBitmap: UInt64
    let inodeBitmap: UInt64
    let inodeTable: UInt64
    let freeClusters: UInt64
    /// EXT4_BG_BLOCK_UNINIT: the bitmap was never written; what is not metadata is free.
    let isUninitialized: Bool
    let bitmapChecksum: UInt32
    let checksum: UInt16

    init(_ fields: FieldReader) throws(DiskError) {
        let isLong = fields.count >= 64
        func number(_ low: Int, _ high: Int) throws(DiskError) -> UInt64 {
            let first: UInt32 = try fields.littleEndian(at: low)
            let second: UInt32 = isLong ? try fields.littleEndian(at: high) : 0
            return UInt64(second) << 32 | UInt64(first)
        }
        func half(_ low: Int, _ high: Int) throws(DiskError) -> UInt32 {
            let first: UInt16 = try fields.littleEndian(at: low)
            let second: UInt16 = isLong ? try fields.littleEndian(at: high) : 0
            return UInt32(second) << 16 | UInt32(first)
        }
        blockBitmap = try number(0, 32)
        inodeBitmap = try number(4, 36)
        inodeTable = try number(8, 40)
        freeClusters = UInt64(try half(12, 44))
        isUninitialized = try fields.littleEndian(at: 18, as: UInt16.self) & 2 != 0
        bitmapChecksum = try half(24, 56)
        checksum = try fields.littleEndian(at: 30)
    }
}

/// Goes through the groups of a file system, one at a time.
struct ExtFreeSpaceReader<Source: SectorSource> {
    private let source: Source
    private let geometry: ExtGeometry
    /// Bitmaps and inode tables of all groups: ranges of blocks in order, none of which is free.
    private var metadata: [Range<UInt64>] = []
    /// The block of descriptors that was read last.
    private var table: (block: UInt64, fields: FieldReader)?

    init(_ source: Source, _ geometry: ExtGeometry) {
        self.source = source
        self.geometry = geometry
    }

    mutating func run(_ body: (Range<UInt64>) throws(DiskError) -> Void) throws(DiskError) {
        try findMetadata()
        for number in 0..<geometry.groupCount {
            let group = try group(number)
            let free = try freeClusters(number, group)
            try report(free, number, body)
        }
    }

    // MARK: - Descriptors

    private mutating func group(_ number: UInt64) throws(DiskError) -> ExtGroup {
        let place = geometry.descriptorPlace(number)
        guard place.block < geometry.blockCount else { throw invalid("the descriptor of group \(number) is outside") }
        if table?.block != place.block {
            table = (place.block, try block(place.block))
        }
        guard let table else { preconditionFailure("a block was read") }
        let bytes = try table.fields.bytes(at: Int(place.offset), count: Int(geometry.descriptorSize))
        let group = try ExtGroup(FieldReader(bytes))
        guard checksum(of: bytes, number).map({ $0 == group.checksum }) ?? true else {
            throw invalid("the checksum of group \(number)'s descriptor is wrong")
        }
        return group
    }

    /// What a descriptor's checksum must be; nil: there is none.
    private func checksum(of bytes: [UInt8], _ number: UInt64) -> UInt16? {
        let word = UInt32(truncatingIfNeeded: number)
        let index = (0..<4).map { UInt8(truncatingIfNeeded: word >> UInt32($0 * 8)) }
        switch geometry.checksum {
        case .none: return nil
        case .metadata:
            var sum = CRC32C(register: geometry.seed)
            sum.update(index)
            // The checksum's own place counts as zeros.
            sum.update(Array(bytes[..<30]) + [0, 0] + Array(bytes[32...]))
            return UInt16(truncatingIfNeeded: sum.register)
        case .descriptors:
            var sum = CRC16()
            sum.update(geometry.uuid)
            sum.update(index)
            sum.update(bytes[..<30])
            sum.update(bytes[32...])
            return sum.value
        }
    }

    private func block(_ number: UInt64) throws(DiskError) -> FieldReader {
        guard
            let fields = try source.fields(
                at: geometry.offset + number * geometry.blockSize, count: Int(geometry.blockSize))
        else { throw invalid("block \(number) is outside") }
        return fields
    }

    private func invalid(_ message: String) -> DiskError {
        DiskError(.invalidImage, "its free space stays: \(message)")
    }

    /// Ranges of metadata at most: 16 MiB of them, which is what the largest file systems have whose groups are each
    /// in one piece.
    private static var rangeLimit: Int { 1 << 20 }

    /// Notes where bitmaps and inode tables lie: of a group whose bitmap was never written they may be in it.
    private mutating func findMetadata() throws(DiskError) {
        // One list a kind: with flex_bg those of many groups lie side by side.
        var kinds = [[Range<UInt64>]](repeating: [], count: 3)
        func add(_ start: UInt64, _ count: UInt64, _ kind: Int) throws(DiskError) {
            let (end, overflow) = start.addingReportingOverflow(count)
            guard start >= geometry.firstDataBlock, !overflow, end <= geometry.blockCount else {
                throw invalid("a bitmap or inode table lies outside, at block \(start)")
            }
            if let last = kinds[kind].last, last.upperBound == start {
                kinds[kind][kinds[kind].count - 1] = last.lowerBound..<end
            } else if count > 0 {
                kinds[kind].append(start..<end)
            }
        }
        for number in 0..<geometry.groupCount {
            let group = try group(number)
            try add(group.blockBitmap, 1, 0)
            try add(group.inodeBitmap, 1, 1)
            try add(group.inodeTable, geometry.inodeTableBlocks, 2)
            if kinds[0].count + kinds[1].count + kinds[2].count >= Self.rangeLimit / 4 { try join(&kinds) }
        }
        try join(&kinds)
    }

    /// Adds ranges to those of the metadata, and makes one of those that touch each other.
    private mutating func join(_ kinds: inout [[Range<UInt64>]]) throws(DiskError) {
        for index in kinds.indices {
            metadata += kinds[index]
            kinds[index] = []
        }
        metadata.sort { $0.lowerBound < $1.lowerBound }
        var count = 0
        for range in metadata {
            if count > 0, metadata[count - 1].upperBound >= range.lowerBound {
                let last = metadata[count - 1]
                metadata[count - 1] = last.lowerBound..<max(last.upperBound, range.upperBound)
            } else {
                metadata[count] = range
                count += 1
            }
        }
        metadata.removeLast(metadata.count - count)
        guard count <= Self.rangeLimit else { throw invalid("its bitmaps and inode tables lie in too many places") }
    }

    // MARK: - Bitmaps

    /// Which clusters of a group are free, a bit each.
    private func freeClusters(_ number: UInt64, _ group: ExtGroup) throws(DiskError) -> [Bool] {
        let count = clusterCount(number)
        var free: [Bool]
        if group.isUninitialized, geometry.checksum != .none {
            free = [Bool](repeating: true, count: count)
            clear(&free, number, geometry.start(of: number)..<geometry.start(of: number) + geometry.headBlocks(number))
            for range in metadata(in: number) { clear(&free, number, range) }
        } else {
            let bitmap = try block(group.blockBitmap).bytes
            try checkBitmap(bitmap, number, group)
            free = (0..<count).map { bitmap[$0 / 8] >> UInt8($0 % 8) & 1 == 0 }
            var copy = free
            for range in metadata(in: number) { clear(&copy, number, range) }
            guard copy == free else { throw invalid("the bitmap of group \(number) has metadata as free") }
        }
        let found = free.count { $0 }
        guard UInt64(found) == group.freeClusters else {
            // What follows from the layout alone is not worth a doubt.
            if group.isUninitialized { return [] }
            throw invalid("group \(number) has \(found) free clusters, and its descriptor says \(group.freeClusters)")
        }
        return free
    }

    private func clusterCount(_ number: UInt64) -> Int {
        let blocks = min(geometry.blocksPerGroup, geometry.blockCount - geometry.start(of: number))
        return Int(blocks.dividedRoundingUp(by: geometry.clusterRatio))
    }

    private func checkBitmap(_ bitmap: [UInt8], _ number: UInt64, _ group: ExtGroup) throws(DiskError) {
        guard geometry.checksum == .metadata else { return }
        var sum = CRC32C(register: geometry.seed)
        sum.update(Array(bitmap[..<Int(geometry.clustersPerGroup / 8)]))
        // Of short descriptors, half of it is kept.
        let mask: UInt32 = geometry.descriptorSize >= 64 ? .max : 0xffff
        guard sum.register & mask == group.bitmapChecksum & mask else {
            throw invalid("the checksum of group \(number)'s block bitmap is wrong")
        }
    }

    /// The metadata that lies in a group, wholly or in part.
    private func metadata(in number: UInt64) -> ArraySlice<Range<UInt64>> {
        let start = geometry.start(of: number)
        let end = min(geometry.blockCount, start + geometry.blocksPerGroup)
        var low = 0
        var high = metadata.count
        while low < high {
            let middle = (low + high) / 2
            if metadata[middle].upperBound <= start { low = middle + 1 } else { high = middle }
        }
        var last = low
        while last < metadata.count, metadata[last].lowerBound < end { last += 1 }
        return metadata[low..<last]
    }

    /// Marks the clusters of a range of blocks as used, as far as they are in the group.
    private func clear(_ free: inout [Bool], _ number: UInt64, _ blocks: Range<UInt64>) {
        let start = geometry.start(of: number)
        let first = max(blocks.lowerBound, start) - start
        guard blocks.upperBound > start else { return }
        let last = (blocks.upperBound - start).dividedRoundingUp(by: geometry.clusterRatio)
        var cluster = Int(first / geometry.clusterRatio)
        while cluster < min(free.count, Int(last)) {
            free[cluster] = false
            cluster += 1
        }
    }

    /// Calls `body` with the runs of free clusters of a group, in bytes of the source.
    private func report(
        _ free: [Bool], _ number: UInt64, _ body: (Range<UInt64>) throws(DiskError) -> Void
    ) throws(DiskError) {
        let start = geometry.start(of: number)
        var cluster = 0
        while cluster < free.count {
            guard free[cluster] else {
                cluster += 1
                continue
            }
            let first = cluster
            while cluster < free.count, free[cluster] { cluster += 1 }
            let from = start + UInt64(first) * geometry.clusterRatio
            let to = min(geometry.blockCount, start + UInt64(cluster) * geometry.clusterRatio)
            try body(geometry.offset + from * geometry.blockSize..<geometry.offset + to * geometry.blockSize)
        }
    }
}

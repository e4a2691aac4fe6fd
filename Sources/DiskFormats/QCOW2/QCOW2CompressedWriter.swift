internal import DiskImage
internal import DiskStorage

/// Writes an image of compressed clusters from front to back: clusters as they come, after those of each L2 table the
/// table, refcount blocks as their clusters are full, the L1 table and the refcount table at the end, and the header
/// last of all.
///
/// Compressed clusters follow each other without gaps, as QEMU packs them: a cluster of the file holds parts of
/// several, and its refcount is how many (QEMU, docs/interop/qcow2, "Compressed Clusters Descriptor").
final class QCOW2CompressedWriter: ImageStreamWriter {
    private let file: any Storage
    private var header: QCOW2Header
    /// What follows the header in the first cluster.
    private let rest: [UInt8]
    private let refcounts: QCOW2RefcountLayout
    /// Where the next compressed cluster begins, in bytes of the file.
    private var end: UInt64
    private var l1: [UInt64]
    /// The L2 table under way, and which one it is.
    private var l2: FieldWriter
    private var l2Number: UInt64?
    /// Refcounts of clusters whose block is not written yet, from ``firstOpen`` on.
    private var open: [UInt64] = []
    private var firstOpen: UInt64 = 0
    private var blocks: [UInt64] = []
    /// What waits to be written, and where it begins.
    private var pending: [UInt8] = []
    private var pendingStart: UInt64

    /// Bytes written at once.
    private static let step = 1 << 20

    init(_ file: any Storage, header: QCOW2Header, rest: [UInt8]) throws(DiskError) {
        self.file = file
        self.header = header
        self.rest = rest
        refcounts = QCOW2RefcountLayout(order: header.refcountOrder)
        end = header.clusterSize
        pendingStart = header.clusterSize
        l1 = [UInt64](repeating: 0, count: Int(header.l1EntryCount(for: header.size)))
        l2 = FieldWriter(count: Int(header.clusterSize))
        open = [1]
    }

    var blockSize: UInt64 { header.clusterSize }

    func makeEncoder() throws(DiskError) -> any BlockEncoder {
        switch header.compressionType {
        case .deflate: QCOW2DeflateEncoder(try Deflate.Compressor(), clusterSize: Int(blockSize))
        case .zstd: QCOW2ZstandardEncoder(try Zstandard.Compressor(), clusterSize: Int(blockSize))
        }
    }

    // MARK: - Clusters

    func write(block: UInt64, _ encoded: EncodedBlock) throws(DiskError) {
        precondition(block < header.size.dividedRoundingUp(by: blockSize), "the cluster lies on the disk")
        let entriesPerTable = UInt64(1) << header.l2Bits
        let number = block / entriesPerTable
        if let current = l2Number, current != number { try writeTable(current) }
        l2Number = number
        let entry: UInt64
        switch encoded {
        case .compressed(let bytes): entry = try appendCompressed(bytes)
        case .plain(let bytes):
            try align()
            let place = end
            try append(bytes)
            try align()
            try count(place..<end)
            entry = place | QCOW2Entry.copied
        }
        let slot = Int(block % entriesPerTable) << Int(header.l2EntryShift)
        l2.bigEndian(entry, at: slot)
        if header.hasExtendedL2, case .plain = encoded {
            l2.bigEndian(QCOW2SubclusterBitmap.allAllocated.rawValue, at: slot + 8)
        }
    }

    /// Appends a compressed cluster and answers its entry.
    private func appendCompressed(_ bytes: IOBytes) throws(DiskError) -> UInt64 {
        let countShift = 62 - (UInt64(header.clusterBits) - 8)
        if !hasRoom() { try align() }
        let place = end
        guard place < 1 << countShift else {
            throw DiskError(.unsupported, "compressed clusters cannot lie beyond \(UInt64(1) << countShift) bytes")
        }
        try append(bytes)
        // What belongs to it ends with a sector (of 512 bytes, counted from the file's beginning).
        let sectors = (end - 1) / 512 - place / 512
        try count(place..<(end + 511) & ~511)
        return QCOW2Entry.compressed | sectors << countShift | place
    }

    /// Whether one more cluster may begin in the file's last one, as far as its refcount goes.
    private func hasRoom() -> Bool {
        let number = end / blockSize
        guard number >= firstOpen, number - firstOpen < UInt64(open.count) else { return true }
        return open[Int(number - firstOpen)] < refcounts.maximum
    }

    /// Goes on at the next cluster of the file.
    private func align() throws(DiskError) {
        let rest = end & (blockSize - 1)
        guard rest > 0 else { return }
        let zeros = [UInt8](repeating: 0, count: Int(blockSize - rest))
        try zeros.withIOBytes { (memory) throws(DiskError) in try append(memory) }
    }

    private func append(_ bytes: IOBytes) throws(DiskError) {
        unsafe pending.append(contentsOf: UnsafeRawBufferPointer(start: bytes.pointer, count: bytes.count))
        end += UInt64(bytes.count)
        if pending.count >= Self.step { try writePending() }
    }

    private func writePending() throws(DiskError) {
        try file.write(pending, at: pendingStart, for: .guestData)
        pendingStart += UInt64(pending.count)
        pending.removeAll(keepingCapacity: true)
    }

    // MARK: - Tables

    /// Appends whole clusters of a table, and answers where they begin.
    private func appendTable(_ bytes: [UInt8]) throws(DiskError) -> UInt64 {
        try align()
        let place = end
        try bytes.withIOBytes { (memory) throws(DiskError) in try append(memory) }
        try align()
        try count(place..<end)
        return place
    }

    private func writeTable(_ number: UInt64) throws(DiskError) {
        l1[Int(number)] = try appendTable(l2.bytes) | QCOW2Entry.copied
        l2 = FieldWriter(count: Int(blockSize))
        l2Number = nil
    }

    /// Counts one more use of the clusters of a range of the file. Blocks whose clusters will not be used again are
    /// written.
    private func count(_ range: Range<UInt64>) throws(DiskError) {
        for cluster in range.lowerBound / blockSize...(range.upperBound - 1) / blockSize {
            let index = Int(cluster - firstOpen)
            while open.count <= index { open.append(0) }
            open[index] += 1
        }
        let perBlock = refcountsPerBlock
        while open.count > 2 * perBlock { try writeBlock() }
    }

    private var refcountsPerBlock: Int { 1 << Int(refcounts.perBlockBits(UInt64(header.clusterBits))) }

    /// Writes the first refcount block that is not written yet; it is itself counted in a later one, or in the last.
    private func writeBlock() throws(DiskError) {
        let perBlock = refcountsPerBlock
        let words = encode(Array(open.prefix(perBlock)))
        firstOpen += UInt64(perBlock)
        open.removeFirst(min(perBlock, open.count))
        try align()
        blocks.append(end)
        try words.withIOBytes { (memory) throws(DiskError) in try append(memory) }
        let cluster = Int(blocks[blocks.count - 1] / blockSize - firstOpen)
        while open.count <= cluster { open.append(0) }
        open[cluster] += 1
    }

    /// A refcount block.
    private func encode(_ counts: [UInt64]) -> [UInt8] {
        var writer = FieldWriter(count: Int(blockSize))
        let perWord = 1 << Int(refcounts.perWordBits)
        for start in stride(from: 0, to: counts.count, by: perWord) {
            var word: UInt64 = 0
            for index in start..<min(start + perWord, counts.count) {
                word = refcounts.set(word, UInt64(index - start), counts[index])
            }
            // (Words are made with their first byte lowest.)
            writer.littleEndian(word, at: start / perWord * 8)
        }
        return writer.bytes
    }

    func finish() throws(DiskError) {
        if let current = l2Number { try writeTable(current) }
        var table = FieldWriter(count: max(1, l1.count) * 8)
        for (index, entry) in l1.enumerated() { table.bigEndian(entry, at: index * 8) }
        header.l1TableOffset = try appendTable(table.bytes)
        header.l1Size = UInt32(l1.count)
        try finishRefcounts()
        try writePending()
        try file.flush()
        try file.write(header.encode() + rest, at: 0, for: .header)
        try file.flush()
    }

    /// The refcount table, and the blocks that are left, which count the table and themselves.
    private func finishRefcounts() throws(DiskError) {
        try align()
        let first = end / blockSize
        var blockCount: UInt64 = 0
        var tableCount: UInt64 = 1
        while true {
            let covered = first + tableCount + blockCount - firstOpen
            let needed = covered.dividedRoundingUp(by: UInt64(refcountsPerBlock))
            let tables = ((UInt64(blocks.count) + needed) * 8).dividedRoundingUp(by: blockSize)
            if needed <= blockCount, tables <= tableCount { break }
            blockCount = max(blockCount, needed)
            tableCount = max(tableCount, tables)
        }
        guard tableCount * blockSize <= QCOW2Header.refcountTableByteLimit else {
            throw DiskError(.unsupported, "the image is too large for its refcount table: take larger clusters")
        }
        for cluster in first..<first + tableCount + blockCount {
            let index = Int(cluster - firstOpen)
            while open.count <= index { open.append(0) }
            open[index] += 1
        }
        header.refcountTableOffset = end
        header.refcountTableClusters = UInt32(tableCount)
        var table = FieldWriter(count: Int(tableCount * blockSize))
        for (index, place) in blocks.enumerated() { table.bigEndian(place, at: index * 8) }
        for index in 0..<Int(blockCount) {
            table.bigEndian(end + (tableCount + UInt64(index)) * blockSize, at: (blocks.count + index) * 8)
        }
        try table.bytes.withIOBytes { (memory) throws(DiskError) in try append(memory) }
        for index in 0..<Int(blockCount) {
            let start = min(open.count, index * refcountsPerBlock)
            let counts = Array(open[start..<min(open.count, start + refcountsPerBlock)])
            try encode(counts).withIOBytes { (memory) throws(DiskError) in try append(memory) }
        }
    }
}

/// Raw deflate streams.
private final class QCOW2DeflateEncoder: BlockEncoder {
    private let compressor: Deflate.Compressor
    let bound: Int

    init(_ compressor: Deflate.Compressor, clusterSize: Int) {
        self.compressor = compressor
        // What does not get smaller is stored as it is.
        bound = clusterSize - 1
    }

    func encode(_ bytes: IOBytes, into output: IOBuffer) throws(DiskError) -> Int? {
        compressor.deflate(bytes, into: output)
    }
}

/// Zstandard frames.
private final class QCOW2ZstandardEncoder: BlockEncoder {
    private let compressor: Zstandard.Compressor
    let bound: Int

    init(_ compressor: Zstandard.Compressor, clusterSize: Int) {
        self.compressor = compressor
        bound = clusterSize - 1
    }

    func encode(_ bytes: IOBytes, into output: IOBuffer) throws(DiskError) -> Int? {
        compressor.compress(bytes, into: output)
    }
}

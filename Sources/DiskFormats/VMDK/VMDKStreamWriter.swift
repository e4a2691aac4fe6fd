internal import DiskStorage

/// Writes a streamOptimized image from front to back, so that it can go into a pipe (VMware Virtual Disk Format 5.0,
/// "Stream-Optimized Compressed Sparse Extents"):
///
///     header | descriptor | (to sector 128) | grains, after those of each table the table | directory | footer | end
///
/// The header says that the directory's place is in the footer. Tables without grains, and grains of zeros, are left
/// out. One thread uses it. It holds one grain, one table and the directory in memory.
final class VMDKStreamWriter {
    /// Takes the bytes of the image, in order.
    typealias Sink = (IOBytes) throws(DiskError) -> Void

    private let sink: Sink
    private let header: VMDKSparseHeader
    private let compressor: Deflate.Compressor
    /// A grain's marker, its compressed data and the padding.
    private var output: [UInt8]
    /// A short last grain is compressed as a whole one.
    private var lastGrain: [UInt8] = []
    private var position: UInt64 = 0
    private var directory: FieldWriter
    private var table: FieldWriter
    /// The table that ``table`` is, while it has grains.
    private var tableNumber: UInt64?
    private var nextGrain: UInt64 = 0

    /// Writes the header and `descriptor`, whose first extent says how large the disk is. `level` is zlib's.
    init(
        descriptor: VMDKDescriptor, grainSectors: UInt64 = usualGrainSectors, level: Int32 = 6, sink: @escaping Sink
    ) throws(DiskError) {
        precondition(grainSectors.isPowerOfTwo && grainSectors <= VMDKSparseHeader.compressedGrainLimit)
        let text = try descriptor.encoded()
        var header = VMDKSparseHeader(capacitySectors: descriptor.sectorCount)
        header.version = 3
        header.flags = [.newlineTest, .compressed, .markers]
        header.grainSectors = grainSectors
        header.descriptorSector = 1
        header.descriptorSectorCount = try VMDKCreator.descriptorRoom(text)
        header.directorySector = VMDKSparseHeader.directoryAtEnd
        header.overheadSectors = max(128, (1 + header.descriptorSectorCount).alignedUp(to: 128) ?? 128)
        header.compressAlgorithm = 1
        guard header.directoryEntryCount <= VMDKSparseHeader.directoryLimit else {
            throw DiskError(
                .invalidArgument, "a disk of \(descriptor.sectorCount) sectors is too large for the stream's grain size"
            )
        }
        self.header = header
        self.sink = sink
        compressor = try Deflate.Compressor(level: level)
        output = [UInt8](
            repeating: 0, count: VMDKStreamMarker.grainByteCount + compressor.zlibBound(Int(grainSectors) * 512) + 512)
        directory = FieldWriter(count: Int(header.directorySectorCount) * 512)
        table = FieldWriter(count: Int(header.tableSectorCount) * 512)
        var start = FieldWriter(count: Int(header.overheadSectors) * 512)
        start.bytes(header.encode(), at: 0)
        start.bytes(text, at: 512)
        try put(start.bytes)
    }

    /// Sectors of a grain, where nobody says otherwise.
    static let usualGrainSectors: UInt64 = 128

    /// Bytes of a grain.
    var grainByteCount: Int { Int(header.grainSectors) * 512 }

    /// Writes a grain: all its bytes or, at the end of the disk, those that the disk has. Grains come in ascending
    /// order; one of zeros is left out.
    func writeGrain(_ index: UInt64, _ bytes: IOBytes) throws(DiskError) {
        if bytes.isZero { return }
        var taken = 0
        if bytes.count == grainByteCount {
            taken = try compress(bytes)
        } else {
            precondition(bytes.count < grainByteCount)
            lastGrain = [UInt8](repeating: 0, count: grainByteCount)
            lastGrain.replaceSubrange(0..<bytes.count, with: bytes.array)
            taken = try lastGrain.withIOBytes { (memory) throws(DiskError) in try compress(memory) }
        }
        try append(index, taken)
    }

    /// Writes a grain that has been compressed elsewhere, to a zlib stream of ``grainByteCount`` bytes.
    func writeCompressedGrain(_ index: UInt64, _ stream: IOBytes) throws(DiskError) {
        let start = VMDKStreamMarker.grainByteCount
        precondition(stream.count > 0 && stream.count <= output.count - start - 512)
        try output.withIOBuffer { (memory) throws(DiskError) in
            memory.slice(start, stream.count).copy(from: stream)
        }
        try append(index, stream.count)
    }

    /// Compresses to the place behind the marker, and answers the stream's length.
    private func compress(_ bytes: IOBytes) throws(DiskError) -> Int {
        let start = VMDKStreamMarker.grainByteCount
        let count = try output.withIOBuffer { (memory) throws(DiskError) in
            compressor.deflateZlib(bytes, into: memory.slice(start, memory.count - start - 512))
        }
        guard let count else { preconditionFailure("the compressor's own bound was too small") }
        return count
    }

    /// Writes the grain whose compressed data, `count` bytes, lies in ``output``, and enters it in its table.
    private func append(_ index: UInt64, _ count: Int) throws(DiskError) {
        let (sector, overflow) = index.multipliedReportingOverflow(by: header.grainSectors)
        precondition(index >= nextGrain, "grains are written in ascending order")
        precondition(!overflow && sector < header.capacitySectors, "the grain lies on the disk")
        nextGrain = index + 1
        let number = index / UInt64(header.entriesPerTable)
        if let current = tableNumber, current != number { try writeTable(current) }
        tableNumber = number
        let slot = Int(index % UInt64(header.entriesPerTable))
        table.littleEndian(try currentSector(), at: slot * 4)
        let marker = VMDKStreamMarker.grain(sector: sector, size: UInt32(truncatingIfNeeded: count)).encode()
        output.replaceSubrange(0..<marker.count, with: marker)
        let end = marker.count + count
        let paddedEnd = (end + 511) & ~511
        for place in end..<paddedEnd { output[place] = 0 }
        try output.withIOBytes { (memory) throws(DiskError) in try put(memory.slice(0, paddedEnd)) }
    }

    private func writeTable(_ number: UInt64) throws(DiskError) {
        try put(VMDKStreamMarker.grainTable(sectors: header.tableSectorCount).encode())
        directory.littleEndian(try currentSector(), at: Int(number) * 4)
        try put(table.bytes)
        table = FieldWriter(count: table.bytes.count)
        tableNumber = nil
    }

    /// Writes what is left: the last table, the directory, the footer and the end marker.
    func finish() throws(DiskError) {
        if let current = tableNumber { try writeTable(current) }
        try put(VMDKStreamMarker.grainDirectory(sectors: header.directorySectorCount).encode())
        var footer = header
        footer.directorySector = UInt64(try currentSector())
        try put(directory.bytes)
        try put(VMDKStreamMarker.footer(sectors: 1).encode())
        try put(footer.encode())
        try put(VMDKStreamMarker.endOfStream.encode())
    }

    /// The sector at which the next piece will lie.
    private func currentSector() throws(DiskError) -> UInt32 {
        guard let sector = UInt32(exactly: position / 512) else {
            throw DiskError(.unsupported, "the stream has reached 2 TiB, where its tables cannot point")
        }
        return sector
    }

    private func put(_ bytes: [UInt8]) throws(DiskError) {
        try bytes.withIOBytes { (memory) throws(DiskError) in try put(memory) }
    }

    private func put(_ bytes: IOBytes) throws(DiskError) {
        try sink(bytes)
        position += UInt64(bytes.count)
    }
}

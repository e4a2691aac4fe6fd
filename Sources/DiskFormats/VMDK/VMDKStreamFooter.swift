internal import DiskImage
internal import DiskStorage

/// The footer of a stream whose header could not know yet where the tables would lie, and what to do without one.
///
/// VMware Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents": the file ends with a footer marker,
/// the footer (a copy of the header with the real directory) and an end-of-stream marker, 512 bytes each.
enum VMDKStreamFooter {
    /// How far before the end the footer is looked for: some tools pad the file with zeros.
    private static let searchLength: UInt64 = 1 << 20

    /// The footer, or nil if there is none.
    static func find(
        in storage: any Storage, length: UInt64, like header: VMDKSparseHeader
    ) throws(DiskError) -> VMDKSparseHeader? {
        let start = length - min(length, searchLength)
        // Markers lie at multiples of 512 from the file's beginning.
        let first = start & ~511
        let bytes = try storage.availableBytes(at: first, count: Int(length - first), for: .footer)
        var offset = bytes.count & ~511
        while offset >= 1024 {
            offset -= 512
            let candidate = Array(bytes[offset..<min(offset + 512, bytes.count)])
            guard candidate.count == 512, VMDKSparseHeader.hasMagic(candidate) else { continue }
            let marker = VMDKStreamMarker(parsing: FieldReader(Array(bytes[(offset - 512)..<offset])))
            guard case .footer? = marker else { continue }
            let footer = try VMDKSparseHeader(parsing: candidate)
            guard !footer.directoryIsAtEnd, footer.capacitySectors == header.capacitySectors else { continue }
            return footer
        }
        return nil
    }

    /// Without a footer (the writer did not finish), the grains that are there are found by walking the markers;
    /// answers tables in memory and where their directory lies there.
    static func rebuildTables(
        _ storage: any Storage, _ header: VMDKSparseHeader, length: UInt64
    ) throws(DiskError) -> (tables: any Storage, directorySector: UInt64) {
        let grains = header.capacitySectors.dividedRoundingUp(by: header.grainSectors)
        let entries = UInt64(header.entriesPerTable)
        let tableCount = grains.dividedRoundingUp(by: entries)
        let size = try tableCount.multiplied(by: entries * 4 + 4, "the grain tables' size")
        guard size <= 64 << 20 else {
            throw DiskError(
                .unsupported,
                "the stream was cut off before its tables, and they would take \(size) bytes to rebuild",
                image: storage.name)
        }
        // Sector 1 on: the directory, then the tables, each at a sector's beginning.
        let directorySectors = (tableCount * 4).dividedRoundingUp(by: 512)
        let tableSectors = (entries * 4).dividedRoundingUp(by: 512)
        let firstTable = 1 + directorySectors
        var memory = FieldWriter(count: Int((firstTable + tableCount * tableSectors) * 512))
        for table in 0..<tableCount {
            memory.littleEndian(UInt32(firstTable + table * tableSectors), at: Int(512 + table * 4))
        }
        var offset = max(header.overheadSectors, 1).multipliedReportingOverflow(by: 512).partialValue
        while offset < length {
            let bytes = try storage.availableBytes(at: offset, count: 512, for: .header)
            guard bytes.count >= 16, let marker = VMDKStreamMarker(parsing: FieldReader(bytes)) else { break }
            switch marker {
            case .grain(let sector, let size):
                let grain = sector / header.grainSectors
                let sectorOfMarker = UInt32(truncatingIfNeeded: offset / 512)
                if grain < grains, offset + 12 + UInt64(size) <= length, offset / 512 <= UInt64(UInt32.max) {
                    let place = (firstTable + grain / entries * tableSectors) * 512 + grain % entries * 4
                    memory.littleEndian(sectorOfMarker, at: Int(place))
                }
                offset += (12 + UInt64(size)).dividedRoundingUp(by: 512) * 512
            case .endOfStream: offset = length
            case .grainTable(let sectors), .grainDirectory(let sectors), .footer(let sectors):
                let (skip, overflow) = (sectors &+ 1).multipliedReportingOverflow(by: 512)
                guard !overflow, sectors < length / 512 else { return (MemoryStorage(memory.bytes), 1) }
                offset += skip
            }
        }
        return (MemoryStorage(memory.bytes, name: storage.name), 1)
    }
}

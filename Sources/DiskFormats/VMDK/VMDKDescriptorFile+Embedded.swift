internal import DiskStorage

extension VMDKDescriptorFile {
    /// The first sector behind the header, where every program puts an embedded descriptor, and where QEMU looks for it
    /// whatever the header says.
    private static let home: UInt64 = 1

    /// Writes an embedded text in one step: it is first written elsewhere in the file, the header then says so, then it
    /// is written to its own place, and the header says that. The header is one sector, so that at any moment it leads
    /// to a whole text.
    mutating func replaceEmbedded(_ text: [UInt8]) throws(DiskError) {
        var header = try storage.bytes(at: 0, count: 512, for: .header, "the sparse extent header")
        let parsed = try VMDKSparseHeader(parsing: header)
        // At least a NUL ends the text.
        let needed = UInt64(text.count) / 512 + 1
        let free = try homeRoom(parsed, enough: needed * 3)
        guard needed <= min(free, VMDKSparseHeader.descriptorLimit) else { throw noRoom(text.count, Int(free) * 512) }
        var padded = text
        padded.append(contentsOf: repeatElement(0, count: Int(needed) * 512 - text.count))
        let current = offset / 512
        let used = UInt64(try self.text.encoded().count) / 512 + 1
        var shadow: UInt64?
        if current < Self.home + needed, Self.home < current + used {
            let place = try shadowPlace(after: max(Self.home + needed, current + used), needed, free, parsed)
            try storage.write(padded, at: place * 512, for: .descriptor)
            try storage.flush()
            try writePlace(place, needed, &header)
            shadow = place
        }
        try storage.write(padded, at: Self.home * 512, for: .descriptor)
        try storage.flush()
        let count = current == Self.home ? max(parsed.descriptorSectorCount, needed) : max(min(20, free), needed)
        try writePlace(Self.home, count, &header)
        try clean(from: Self.home + needed, to: Self.home + free, from: shadow ?? current, needed)
        (offset, room) = (Self.home * 512, Int(count) * 512)
    }

    /// Where the text can be kept meanwhile: in what is set aside for it or, where that is short, at the file's end.
    private func shadowPlace(
        after sector: UInt64, _ count: UInt64, _ free: UInt64, _ header: VMDKSparseHeader
    ) throws(DiskError) -> UInt64 {
        if sector + count <= Self.home + free { return sector }
        // A stream ends with its footer.
        guard !header.isCompressed else { throw noRoom(Int(count) * 1024, Int(free) * 512) }
        return try storage.length().dividedRoundingUp(by: 512)
    }

    /// Has the header say where the descriptor is, in one write of its sector.
    private func writePlace(_ sector: UInt64, _ count: UInt64, _ header: inout [UInt8]) throws(DiskError) {
        var fields = FieldWriter(header)
        fields.littleEndian(sector, at: 28)
        fields.littleEndian(count, at: 36)
        header = fields.bytes
        try storage.write(header, at: 0, for: .header)
        try storage.flush()
    }

    /// Removes what was written elsewhere, and what is left of a longer text.
    private func clean(from end: UInt64, to limit: UInt64, from shadow: UInt64, _ count: UInt64) throws(DiskError) {
        for sector in end..<limit {
            let bytes = try storage.bytes(at: sector * 512, count: 512, for: .descriptor, "the descriptor's room")
            if bytes.contains(where: { $0 != 0 }) {
                try storage.write([UInt8](repeating: 0, count: 512), at: sector * 512, for: .descriptor)
            }
        }
        if shadow >= limit, try storage.length() == (shadow + count) * 512 { try storage.setLength(shadow * 512) }
        try storage.flush()
    }

    /// Sectors from the first one on that nothing but the descriptor uses; `enough` are not counted further.
    private func homeRoom(_ header: VMDKSparseHeader, enough: UInt64) throws(DiskError) -> UInt64 {
        if header.descriptorSector == Self.home {
            // What a stream's header says of its tables and grains need not be so.
            if header.isCompressed || header.isDescriptorOnly || header.descriptorSectorCount >= enough {
                return header.descriptorSectorCount
            }
        }
        guard !header.isCompressed, !header.isDescriptorOnly else { return 0 }
        var first = min(max(header.overheadSectors, 1), header.directorySector)
        var directories = [header.directorySector]
        if header.redundantDirectorySector > 0 {
            first = min(first, header.redundantDirectorySector)
            if header.usesRedundantDirectory { directories.append(header.redundantDirectorySector) }
        }
        for directory in directories {
            for index in stride(from: 0, to: header.directoryEntryCount, by: 16_384) {
                let count = Int(min(16_384, header.directoryEntryCount - index))
                let fields = FieldReader(
                    try storage.bytes(
                        at: directory * 512 + index * 4, count: count * 4, for: .table, "the grain directory"))
                for number in 0..<count {
                    let table: UInt32 = try fields.littleEndian(at: number * 4)
                    if table > 0 { first = min(first, UInt64(table)) }
                }
            }
        }
        return min(first - 1, VMDKSparseHeader.descriptorLimit)
    }
}

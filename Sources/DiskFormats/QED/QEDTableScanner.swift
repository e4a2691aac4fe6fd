internal import DiskStorage

/// Goes through the entries of tables, in the file and in order, past its holes; remembers nothing.
struct QEDTableScanner {
    let storage: any Storage
    let tableBytes: UInt64

    /// Bytes read at once.
    private static let chunkSize: UInt64 = 64 << 10

    /// Calls `body` with place in the file and value of every entry that is neither 0 nor `skipped`.
    func forEachEntry(
        of table: UInt64, skipping skipped: UInt64 = 0, _ body: (UInt64, UInt64) throws(DiskError) -> Void
    ) throws(DiskError) {
        var chunk = [UInt8](repeating: 0, count: Int(min(Self.chunkSize, tableBytes)))
        var position = table
        var dataEnd = table
        let end = table + tableBytes
        while position < end {
            if position >= dataEnd {
                let data = try storage.nextData(from: position) ?? .max..<(.max)
                position = max(position, min(data.lowerBound, end) & ~7)
                dataEnd = max(data.upperBound, position + 1)
                continue
            }
            let count = Int(min(UInt64(chunk.count), end - position))
            try chunk.withIOBuffer { (buffer) throws(DiskError) in
                let piece = buffer.slice(0, count)
                try storage.readPadded(into: piece, at: position, for: .table)
                var offset = 0
                while offset < count {
                    let entry = unsafe UInt64(
                        littleEndian: piece.pointer.loadUnaligned(fromByteOffset: offset, as: UInt64.self))
                    if entry != 0, entry != skipped { try body(position + UInt64(offset), entry) }
                    offset += 8
                }
            }
            position += UInt64(count)
        }
    }
}

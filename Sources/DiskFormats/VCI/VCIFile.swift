public import DiskStorage

/// Writes a cache's metadata. What is durable when is the caller's business, but for ``makeEmpty(_:_:type:)``.
public enum VCIFile {
    /// Writes the header.
    public static func write(_ header: VCIHeader, to storage: any Storage) throws(DiskError) {
        try storage.write(header.encode(), at: 0, for: .header)
    }

    /// Makes a storage, whatever it holds, an empty cache that belongs to no image.
    public static func makeEmpty(
        _ storage: any Storage, _ layout: VCILayout, type: VCIHeader.FileType
    ) throws(DiskError) {
        var header = VCIHeader(layout, type: type)
        header.isUnclean = true
        try write(header, to: storage)
        try storage.flush()
        try takeSpace(storage, layout, type)
        try save([], to: storage, layout)
        try storage.flush()
        header.isUnclean = false
        try write(header, to: storage)
        try storage.flush()
    }

    /// Gives back the space of what was cached in a dynamic file, or takes that of a fixed one.
    public static func takeSpace(
        _ storage: any Storage, _ layout: VCILayout, _ type: VCIHeader.FileType
    ) throws(DiskError) {
        switch type {
        case .dynamic: try storage.setLength(layout.firstSlot * VCILayout.blockSize)
        case .fixed: try storage.allocate(layout.size * VCILayout.blockSize)
        }
    }

    /// Writes tree and block map. `extents` are in the order of the disk, their links set, each in a slot of the
    /// layout.
    public static func save(
        _ extents: [VCIExtent], to storage: any Storage, _ layout: VCILayout
    ) throws(DiskError) {
        let shape = VCITreeShape(extentCount: extents.count, layout)
        try shape.forEachNode(extents) { (address, bytes) throws(DiskError) in
            try storage.write(bytes, at: address * VCILayout.blockSize, for: .table)
        }
        let metadata = layout.rootAddress + shape.nodeCount * VCINode.blocks
        let map = VCIBlockMap(
            managed: layout.size, metadata: metadata, data: extents.reduce(0) { $0 + UInt64($1.blocks) })
        let start = VCILayout.mapAddress * VCILayout.blockSize
        try storage.write(map.encode(), at: start, for: .allocation)
        // Header, map and nodes lie side by side.
        var used = [0..<metadata]
        used += extents.map { $0.address..<$0.address + UInt64($0.blocks) }.sorted { $0.lowerBound < $1.lowerBound }
        try write(VCIMapBits(used), to: storage, at: start + VCILayout.blockSize, count: Int(layout.size / 8))
    }

    /// Where all bits are zero, a hole of the file does.
    private static func write(
        _ bits: consuming VCIMapBits, to storage: any Storage, at start: UInt64, count: Int
    ) throws(DiskError) {
        var done = 0
        var zeros: UInt64 = 0
        func giveBack(_ end: UInt64) throws(DiskError) {
            guard zeros > 0 else { return }
            try storage.discard(end - zeros..<end, mustZero: true, for: .allocation)
            zeros = 0
        }
        while done < count {
            let part = min(VCIMapBits.pieceSize, count - done)
            let place = start + UInt64(done)
            if let bytes = bits.next(from: UInt64(done) * 8, count: part) {
                try giveBack(place)
                try storage.write(bytes, at: place, for: .allocation)
            } else {
                zeros += UInt64(part)
            }
            done += part
        }
        try giveBack(start + UInt64(count))
    }
}

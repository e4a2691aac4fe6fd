internal import DiskStorage

/// What lies in an image's first cluster: the header, its extensions and the backing file's name; to be changed so that
/// after a power cut at any moment it is as before or as after.
///
/// A sector is written as a whole. The header and what must be known of the extensions are therefore kept in the first
/// one; the names of features, which nobody needs, may reach into the next ones.
struct QCOW2FirstCluster {
    private static let sectorSize = 512
    /// Bytes of the cluster that are looked at: those in which an opener looks.
    private static let byteLimit: UInt64 = 64 << 10

    private struct RawExtension {
        let type: UInt32
        let data: [UInt8]
    }

    private let storage: any Storage
    private let header: QCOW2Header
    private let headerBytes: [UInt8]
    private var extensions: [RawExtension] = []
    /// Where the extensions end.
    private var extensionsEnd: UInt64
    private let size: UInt64

    /// Reads it.
    init(_ storage: any Storage, _ header: QCOW2Header) throws(DiskError) {
        self.storage = storage
        self.header = header
        size = min(header.clusterSize, Self.byteLimit)
        let fields = FieldReader(try storage.availableBytes(at: 0, count: Int(size), for: .header))
        var offset = (Int(header.headerLength) + 7) & ~7
        headerBytes = try fields.bytes(at: 0, count: offset)
        let end = header.backingFileOffset > 0 ? min(fields.count, Int(header.backingFileOffset)) : fields.count
        while offset + 8 <= end {
            let type: UInt32 = try fields.bigEndian(at: offset)
            let length = Int(try fields.bigEndian(at: offset + 4, as: UInt32.self))
            if type == QCOW2HeaderExtensions.end {
                offset += 8
                break
            }
            extensions.append(RawExtension(type: type, data: try fields.bytes(at: offset + 8, count: length)))
            offset += 8 + (length + 7) & ~7
        }
        extensionsEnd = UInt64(offset)
    }

    /// The header's bytes with another backing file's name at `offset`, and the extensions.
    private func content(
        _ extensions: [RawExtension], nameAt offset: UInt64, _ count: Int
    ) -> [UInt8] {
        var fields = FieldWriter(headerBytes)
        fields.bigEndian(count == 0 ? 0 : offset, at: 8)
        fields.bigEndian(UInt32(count), at: 16)
        return fields.bytes + extensions.flatMap { QCOW2HeaderExtensions.encode($0.type, $0.data) }
            + QCOW2HeaderExtensions.encode(QCOW2HeaderExtensions.end, [])
    }

    /// Writes another backing file's name (empty: none) and the name of its format; answers where the name lies.
    func setBacking(_ name: [UInt8], format: String) throws(DiskError) -> UInt64 {
        var essential = extensions.filter {
            ![QCOW2HeaderExtensions.backingFormat, QCOW2HeaderExtensions.featureNameTable].contains($0.type)
        }
        if !name.isEmpty {
            essential.insert(
                RawExtension(type: QCOW2HeaderExtensions.backingFormat, data: Array(format.utf8)), at: 0)
        }
        let all = essential + extensions.filter { $0.type == QCOW2HeaderExtensions.featureNameTable }
        let least = content(essential, nameAt: 0, 0).count
        guard least <= Self.sectorSize else {
            throw DiskError(.unsupported, "the header's extensions leave no room to change its backing file")
        }
        let whole = UInt64(content(all, nameAt: 0, 0).count)
        if let place = place(forNameOf: UInt64(name.count), behind: whole) {
            if !name.isEmpty {
                try storage.write(name, at: place, for: .header)
                try storage.flush()
            }
            try writeFirstSector(content(essential, nameAt: place, name.count))
            if all.count > essential.count {
                let bytes = content(all, nameAt: place, name.count)
                if bytes.count > Self.sectorSize {
                    try storage.write(Array(bytes[Self.sectorSize...]), at: UInt64(Self.sectorSize), for: .header)
                    try storage.flush()
                }
                try writeFirstSector(bytes)
            }
            return place
        }
        // No room for two names: then all in one sector.
        guard least + name.count <= Self.sectorSize else {
            throw DiskError(
                .unsupported,
                "the backing file's path has \(name.count) bytes, for which the first cluster has no room")
        }
        try writeFirstSector(content(essential, nameAt: UInt64(least), name.count) + name)
        return UInt64(least)
    }

    /// Where a name fits that is neither over the present one nor over extensions, the present ones or the new.
    private func place(forNameOf count: UInt64, behind extensions: UInt64) -> UInt64? {
        guard count > 0 else { return 0 }
        let present = header.backingFileOffset..<header.backingFileOffset + UInt64(header.backingFileSize)
        // (Not in the first sector: that is written later.)
        let first = (max(extensions, extensionsEnd, UInt64(Self.sectorSize)) + 7) & ~7
        for place in [first, (max(first, present.upperBound) + 7) & ~7]
        where place + count <= size && !present.overlaps(place..<place + count) {
            return place
        }
        return nil
    }

    /// Writes the first sector, of which `bytes` are the beginning.
    private func writeFirstSector(_ bytes: [UInt8]) throws(DiskError) {
        let part = bytes.prefix(Self.sectorSize)
        let padding = [UInt8](repeating: 0, count: Self.sectorSize - part.count)
        try storage.write(part + padding, at: 0, for: .header)
        try storage.flush()
    }
}

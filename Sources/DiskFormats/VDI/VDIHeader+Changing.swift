internal import DiskImage
internal import DiskStorage

extension VDIHeader {
    /// The header's sector with this header's fields in it: what is not a field stays as it is in `original`.
    func encode(over original: [UInt8]) -> [UInt8] {
        var fields = FieldWriter(original)
        let base = isVersion0 ? 72 : 76
        fields.littleEndian(type.rawValue, at: base)
        var text = Array(comment.utf8.prefix(Self.commentSize - 1))
        text.append(contentsOf: repeatElement(0, count: Self.commentSize - text.count))
        fields.bytes(text, at: base + 8)
        if !isVersion0 {
            fields.littleEndian(UInt32(truncatingIfNeeded: mapOffset), at: 340)
            fields.littleEndian(UInt32(truncatingIfNeeded: blocksOffset), at: 344)
        }
        Self.encode(geometry, at: isVersion0 ? 336 : 348, into: &fields)
        fields.littleEndian(diskSize, at: Int(diskSizeOffset))
        fields.littleEndian(UInt32(truncatingIfNeeded: blockCount), at: Int(allocatedBlocksOffset) - 4)
        fields.littleEndian(allocatedBlocks, at: Int(allocatedBlocksOffset))
        let uuids = Int(modificationUUIDOffset)
        fields.bytes(uuid.mixedEndian, at: uuids - 16)
        fields.bytes(modificationUUID.mixedEndian, at: uuids)
        fields.bytes(parentUUID.mixedEndian, at: uuids + 16)
        if !isVersion0 { fields.bytes(parentModificationUUID.mixedEndian, at: uuids + 32) }
        if headerSize >= 400, let biosGeometry { Self.encode(biosGeometry, at: 456, into: &fields) }
        return fields.bytes
    }

    /// How many bytes of the first sector are header: in version 0.x the block map begins in it.
    var sectorLength: Int { Int(min(UInt64(Self.byteCount), mapOffset)) }

    /// The fields that this header can store.
    var settableFields: ImageMetadata.Fields {
        var fields: ImageMetadata.Fields = [.comment, .uuid, .modificationUUID, .physicalGeometry]
        if biosGeometry != nil { fields.insert(.logicalGeometry) }
        if isChild { fields.insert(.parentUUID) }
        if isChild, !isVersion0 { fields.insert(.parentModificationUUID) }
        return fields
    }

    var metadata: ImageMetadata {
        var metadata = ImageMetadata()
        metadata.comment = comment.isEmpty ? nil : comment
        metadata.uuid = uuid.isNull ? nil : uuid
        metadata.modificationUUID = modificationUUID.isNull ? nil : modificationUUID
        metadata.parentUUID = parentUUID.isNull ? nil : parentUUID
        metadata.parentModificationUUID = parentModificationUUID.isNull ? nil : parentModificationUUID
        metadata.physicalGeometry = geometry.value
        metadata.logicalGeometry = biosGeometry?.value
        return metadata
    }

    /// The same image over another parent, or over none.
    mutating func setParent(_ parent: ImageChanges.ParentChange) throws(DiskError) {
        switch parent {
        case .none:
            if type != .fixed { type = .dynamic }
            (parentUUID, parentModificationUUID) = (.null, .null)
        case .image(let description):
            guard type != .fixed else {
                throw DiskError(.unsupported, "a fixed VDI holds all its blocks itself, and can have no parent")
            }
            guard let uuid = description.identity.uuid else {
                throw DiskError(
                    .unsupported,
                    "a VDI names its parent by UUID alone, and \(description.path) (\(description.format)) has none")
            }
            type = .differencing
            parentUUID = uuid
            parentModificationUUID = isVersion0 ? .null : description.identity.modificationUUID ?? .null
        }
    }

    /// Takes over the fields that are there.
    mutating func set(_ metadata: ImageMetadata) throws(DiskError) {
        let missing = metadata.fields.subtracting(settableFields)
        guard missing.isEmpty else {
            let child = isChild ? "" : " (it has no parent)"
            throw DiskError(
                .unsupported, "this VDI cannot store: \(missing.names.joined(separator: ", "))\(child)")
        }
        if let text = metadata.comment {
            guard text.utf8.count < Self.commentSize, !text.utf8.contains(0) else {
                throw DiskError(
                    .unsupported,
                    "a VDI's comment has at most \(Self.commentSize - 1) bytes of UTF-8, not \(text.utf8.count), and "
                        + "no NUL")
            }
            comment = text
        }
        if let value = metadata.uuid { uuid = value }
        if let value = metadata.modificationUUID { modificationUUID = value }
        if let value = metadata.parentUUID {
            guard !value.isNull else {
                throw DiskError(.unsupported, "a VDI names its parent by UUID alone, which cannot be removed")
            }
            parentUUID = value
        }
        if let value = metadata.parentModificationUUID { parentModificationUUID = value }
        if let value = metadata.physicalGeometry { geometry = try Geometry(value) }
        if let value = metadata.logicalGeometry { biosGeometry = try Geometry(value) }
    }

    /// The disk's size, and with it the geometry, where one is recorded.
    mutating func setSize(_ size: UInt64, blockCount count: UInt64) {
        diskSize = size
        blockCount = count
        // ATA's limit, and that of the BIOS.
        geometry = geometry.resized(to: size / 512, cylinderLimit: 16_383)
        biosGeometry = biosGeometry?.resized(to: size / 512, cylinderLimit: 1024)
    }
}

extension VDIHeader.Geometry {
    /// A geometry whose numbers have 32 bits.
    init(_ geometry: DiskGeometry) throws(DiskError) {
        guard let cylinders = UInt32(exactly: geometry.cylinders), let heads = UInt32(exactly: geometry.heads),
            let sectors = UInt32(exactly: geometry.sectors)
        else { throw DiskError(.unsupported, "the numbers of a VDI's geometry have 32 bits, not \(geometry)") }
        self.init(cylinders: cylinders, heads: heads, sectors: sectors)
    }

    /// Nil where nothing is recorded.
    var value: DiskGeometry? {
        cylinders == 0 && heads == 0 && sectors == 0
            ? nil : DiskGeometry(cylinders: UInt64(cylinders), heads: UInt64(heads), sectors: UInt64(sectors))
    }

    func resized(to sectorCount: UInt64, cylinderLimit: UInt64) -> Self {
        guard let resized = value?.resized(to: sectorCount, cylinderLimit: cylinderLimit) else { return self }
        var copy = self
        copy.cylinders = UInt32(truncatingIfNeeded: resized.cylinders)
        return copy
    }
}

internal import DiskImage
internal import DiskStorage

/// Changes of what a QED image says of itself, which is the name of its backing file alone.
extension QEDImage: EditableBackend {
    var settableFields: ImageMetadata.Fields { [] }
    var metadata: ImageMetadata { ImageMetadata() }

    /// Bytes of a backing file's name at most: QEMU reads no longer ones.
    private static let nameLimit = 1023

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) { _ = try storedName(of: parent) }

    /// How the image names that backing file.
    private func storedName(of parent: CreateRequest.ParentDescription) throws(DiskError) -> [UInt8] {
        let name = Array(QEMUFileName.stored(parent.path).utf8)
        guard 1...Self.nameLimit ~= name.count else {
            throw DiskError(
                .unsupported, "the backing file's path has \(name.count) bytes; \(Self.nameLimit) can be")
        }
        return name
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        try changes.check(settable: settableFields, of: "QED")
        guard let change = changes.parent else { return }
        var new = header
        new.features.subtract([.backingFile, .backingFormatNoProbe])
        new.autoclearFeatures = 0
        (new.backingFilenameOffset, new.backingFilenameSize) = (0, 0)
        var name: [UInt8] = []
        if case .image(let parent) = change {
            name = try storedName(of: parent)
            new.features.insert(.backingFile)
            if parent.format == "raw" { new.features.insert(.backingFormatNoProbe) }
            new.backingFilenameSize = UInt64(name.count)
            new.backingFilenameOffset = try place(forNameOf: UInt64(name.count))
        }
        try flush()
        let isInSector = new.backingFilenameOffset + new.backingFilenameSize <= UInt64(QEDFile.sectorSize)
        if !isInSector {
            try storages[0].storage.write(name, at: new.backingFilenameOffset, for: .header)
            try storages[0].storage.flush()
        }
        try writableFile.writeHeader(new, name: isInSector ? name : [])
        header = new
        backingFilename = name.isEmpty ? nil : String(decoding: name, as: UTF8.self)
    }

    /// Where a name goes: behind the header in its sector if it fits; else elsewhere in the header's clusters, not over
    /// the present one.
    private func place(forNameOf count: UInt64) throws(DiskError) -> UInt64 {
        let first = UInt64(QEDHeader.byteCount)
        if first + count <= UInt64(QEDFile.sectorSize) { return first }
        let present =
            header.features.contains(.backingFile)
            ? header.backingFilenameOffset..<header.backingFilenameOffset + header.backingFilenameSize : 0..<0
        // The smallest cluster has 4096 bytes.
        for place in [UInt64(QEDFile.sectorSize), 2048, present.upperBound]
        where place + count <= header.firstClusterOffset && !present.overlaps(place..<place + count) {
            return place
        }
        throw DiskError(
            .unsupported, "the backing file's path has \(count) bytes, for which the header has no room beside the old")
    }
}

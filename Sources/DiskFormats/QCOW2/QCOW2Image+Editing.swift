internal import DiskImage
internal import DiskStorage

/// Changes of what a QCOW2 image says of itself, which is the name and the format of its backing file alone.
extension QCOW2Image: EditableBackend {
    var settableFields: ImageMetadata.Fields { [] }
    var metadata: ImageMetadata { ImageMetadata() }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        try changes.check(settable: settableFields, of: "QCOW2")
        guard let change = changes.parent else { return }
        var name = ""
        var format = ""
        if case .image(let parent) = change {
            guard !keepsRawData else {
                throw DiskError(
                    .unsupported, "its external data file is the disk also without this image: it cannot have a parent")
            }
            name = QEMUFileName.stored(parent.path)
            format = QEMUFileName.peerFormat(parent.format)
            guard 1...Int(QCOW2Header.backingNameLimit) ~= name.utf8.count else {
                throw DiskError(
                    .unsupported,
                    "the backing file's path has \(name.utf8.count) bytes; \(QCOW2Header.backingNameLimit) can be")
            }
        }
        try openAllocator.flushAll()
        try beginWriting()
        let place = try QCOW2FirstCluster(storages[0].storage, header).setBacking(Array(name.utf8), format: format)
        header.backingFileOffset = name.isEmpty ? 0 : place
        header.backingFileSize = UInt32(name.utf8.count)
        backingName = name.isEmpty ? nil : name
        extensions.backingFormatName = name.isEmpty ? nil : format
    }
}

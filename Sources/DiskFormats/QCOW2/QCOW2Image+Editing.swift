internal import DiskImage
internal import DiskStorage

/// Changes of what a QCOW2 image says of itself, which is the name and the format of its backing file alone.
extension QCOW2Image: EditableBackend {
    var settableFields: ImageMetadata.Fields { [] }
    var metadata: ImageMetadata { ImageMetadata() }

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) { _ = try storedName(of: parent) }

    /// How the image names that backing file.
    private func storedName(of parent: CreateRequest.ParentDescription) throws(DiskError) -> String {
        guard !keepsRawData else {
            throw DiskError(
                .unsupported, "its external data file is the disk also without this image: it cannot have a parent")
        }
        let name = QEMUFileName.stored(parent.path)
        guard 1...Int(QCOW2Header.backingNameLimit) ~= name.utf8.count else {
            throw DiskError(
                .unsupported,
                "the backing file's path has \(name.utf8.count) bytes; \(QCOW2Header.backingNameLimit) can be")
        }
        return name
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        try changes.check(settable: settableFields, of: "QCOW2")
        guard let change = changes.parent else { return }
        var name = ""
        var format = ""
        if case .image(let parent) = change {
            name = try storedName(of: parent)
            format = QEMUFileName.peerFormat(parent.format)
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

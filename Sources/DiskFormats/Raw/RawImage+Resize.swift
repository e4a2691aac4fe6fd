internal import DiskImage
internal import DiskStorage

extension RawImage: EditableBackend {
    /// A raw image is its disk and nothing else.
    var settableFields: ImageMetadata.Fields { [] }
    var metadata: ImageMetadata { ImageMetadata() }

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) {
        throw DiskError(.unsupported, "a raw image cannot store: a parent", image: files[0])
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        if case .none? = changes.parent, changes.metadata.fields.isEmpty { return }
        guard !changes.isEmpty else { return }
        let what = changes.parent == nil ? changes.metadata.fields.names.joined(separator: ", ") : "a parent"
        throw DiskError(.unsupported, "a raw image cannot store: \(what)", image: files[0])
    }

    /// (There is no parent that could be hidden.)
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        let storage = storages[0].storage
        guard isWritable else { throw DiskError(.readOnly, "was opened read-only", image: files[0]) }
        guard !storage.traits.hasFixedLength else {
            throw DiskError(.unsupported, "a block device has the size that it has", image: files[0])
        }
        guard size % 512 == 0, size <= UInt64(Int64.max) else {
            throw DiskError(.unsupported, "the size must be a multiple of 512 bytes, not \(size)", image: files[0])
        }
        let length = try storage.length()
        if size > virtualSize {
            do throws(DiskError) {
                if try storage.allocatedBytes() >= length, length > 0 { try storage.allocate(size) }
                if try storage.length() < size { try storage.setLength(size) }
            } catch {
                try? storage.setLength(length)
                throw error
            }
        } else if size < virtualSize {
            try storage.setLength(size)
        }
        try storage.flush()
    }
}

public import DiskStorage

extension ImageChanges {
    /// Throws ``DiskError/Kind/unsupported`` if a field is to be set that an image does not store; `name` is that of
    /// its format.
    public func check(settable: ImageMetadata.Fields, of name: String) throws(DiskError) {
        let others = metadata.fields.subtracting(settable).names
        guard let first = others.first else { return }
        throw DiskError(
            .unsupported,
            "a \(name) image stores no \(first)"
                + (others.count > 1 ? " (nor \(others.dropFirst().joined(separator: ", ")))" : ""))
    }
}

extension EditableBackend {
    /// Throws ``DiskError/Kind/unsupported`` if the disk cannot have `size` bytes because its file cannot be longer or
    /// shorter than it is.
    public func checkResizable(_ storage: any Storage) throws(DiskError) {
        guard isWritable else { throw DiskError(.readOnly, "the image was opened read-only") }
        guard storage.traits.hasFixedLength else { return }
        throw DiskError(.unsupported, "it lies on a device: only images in files get another size")
    }
}

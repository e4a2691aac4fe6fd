public import DiskImage
public import DiskStorage

/// Changes what an image says of itself: comment, UUIDs, geometries, and how it names its parent.
public enum ImageEditor {
    /// Makes the changes in the image at `path`, all or none, and nothing else: neither its disk nor what its children
    /// compare is touched, but for what is asked for. (A child that records a UUID which is changed here does not
    /// open any more, until its record is changed too.)
    ///
    /// The image is opened without its parents and locked; who else has it open is an error. A property that this
    /// image cannot store is `DiskError.Kind.unsupported`, and changes nothing.
    public static func apply(
        _ changes: ImageChanges, to path: String, options: DiskOptions = DiskOptions()
    ) throws(DiskError) {
        let backend = try open(path, options: options, for: changes)
        do throws(DiskError) {
            try backend.apply(changes)
            try backend.close()
        } catch {
            throw error.about(path)
        }
    }

    /// Opens an image for changes of what it says, and sees whether it can store all that shall be different.
    static func open(
        _ path: String, options: DiskOptions, for changes: ImageChanges
    ) throws(DiskError) -> any EditableBackend {
        var options = options
        options.isWritable = true
        (options.overlay, options.cache, options.snapshot) = (nil, nil, nil)
        var opener = ChainOpener(options: options)
        opener.keepsIdentity = true
        let layer = try opener.open(path, mode: .readWrite, withParents: false)[0]
        let format = layer.backend.format
        guard let backend = layer.backend as? any EditableBackend else {
            throw DiskError(
                .unsupported, "the format \(format) stores nothing of itself that could be changed", image: path)
        }
        let missing = changes.metadata.fields.subtracting(backend.settableFields)
        guard missing.isEmpty else {
            let names = missing.names.joined(separator: ", ")
            let known = backend.settableFields.names.joined(separator: ", ")
            throw DiskError(
                .unsupported,
                "the format \(format) cannot store in this image: \(names)"
                    + (known.isEmpty ? "" : "; what can be set is \(known)"), image: path)
        }
        return backend
    }
}

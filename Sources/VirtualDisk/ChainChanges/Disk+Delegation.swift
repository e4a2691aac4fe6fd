internal import DiskImage
public import DiskStorage

/// What an open disk tells of its images to who passes it files: ``PassedFiles``.
extension Disk {
    /// An image, and which files it has.
    public struct OpenImage: Sendable {
        /// Its first file's real path.
        public let path: String
        public let format: String
        public let files: [FileIdentity]
    }

    /// The images as they are now, the top one first; of each the files that are open under their paths.
    public var openImages: [OpenImage] {
        let passed = opener?.options.passedFiles
        return current.chain.layers.map { layer in
            OpenImage(
                path: layer.backend.files.first ?? layer.path, format: layer.backend.format,
                files: layer.backend.files.compactMap { passed?.identity(of: $0) })
        }
    }

    /// Throws why the chain of this disk cannot be changed while it is open.
    public func expectChangeable() throws(DiskError) {
        try checkChangeable(withOverlay: false)
        guard let opener else { return }
        guard opener.options.cache == nil else {
            throw DiskError(
                .unsupported, "is read through a block cache, which is bound to its images: close the disk first",
                image: current.chain.layers[0].path)
        }
        for layer in current.chain.layers {
            let path = layer.backend.files.first ?? layer.path
            guard opener.finder.isRemote(path) else { continue }
            throw DiskError(
                .unsupported, "lies on a server, whose images do not change while the disk is open", image: path)
        }
    }
}

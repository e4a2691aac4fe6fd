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

    /// The images as they are now, the top one first, without an overlay; of each the files that are open under their
    /// paths.
    public var openImages: [OpenImage] { current.chain.layers[topImage...].map(describe) }

    /// The overlay that lies over the images, if there is one. One without a name has no file.
    public var openOverlay: OpenImage? { topImage == 0 ? nil : describe(current.chain.layers[0]) }

    /// The number of the top image among the layers: 1 below an overlay, which is number 0 then.
    public var topImage: Int { opener?.options.overlay == nil ? 0 : 1 }

    private func describe(_ layer: Layer) -> OpenImage {
        let passed = opener?.options.passedFiles
        return OpenImage(
            path: layer.backend.files.first ?? layer.path, format: layer.backend.format,
            files: layer.backend.files.compactMap { passed?.identity(of: $0) })
    }

    /// Throws why the images of this disk cannot be merged while it is open, or why none can be put on top.
    public func expectChangeable(bySnapshot: Bool = false) throws(DiskError) {
        try checkChangeable(withOverlay: !bySnapshot)
        guard let opener else { return }
        for layer in current.chain.layers {
            let path = layer.backend.files.first ?? layer.path
            guard opener.finder.isRemote(path) else { continue }
            throw DiskError(
                .unsupported, "lies on a server, whose images do not change while the disk is open", image: path)
        }
    }
}

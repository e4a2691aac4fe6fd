internal import DiskImage
internal import DiskStorage

extension QCOW2Image {
    func creationSettings() throws(DiskError) -> CreationSettings {
        let obstacle: String? =
            if header.snapshotCount > 0 {
                "it has internal snapshots"
            } else if extensions.bitmapDirectory != nil {
                "it has bitmaps"
            } else if header.hasDataFile {
                "its data is in a file of its own"
            } else {
                nil
            }
        if let obstacle {
            throw DiskError(.unsupported, "\(obstacle), which a new image would not have", image: files.first)
        }
        guard header.version >= 3 else { return CreationSettings(options: ["compat": "0.10"]) }
        return CreationSettings(options: [
            "compat": "1.1", "refcount-bits": String(header.refcountBits),
            "lazy-refcounts": header.compatible.contains(.lazyRefcounts) ? "on" : "off",
            "extended-l2": header.hasExtendedL2 ? "on" : "off", "compression-type": header.compressionType.optionName,
        ])
    }
}

extension QCOW2CompressionType {
    /// What the option is called at creation.
    fileprivate var optionName: String {
        switch self {
        case .deflate: "zlib"
        case .zstd: "zstd"
        }
    }
}

internal import DiskImage
internal import DiskStorage

extension VMDKImage {
    func creationSettings() throws(DiskError) -> CreationSettings {
        let text = descriptor.withLock { $0.text }
        var settings = CreationSettings()
        if let type = text.diskDatabase("adapterType") { settings.options["adapter-type"] = type }
        switch text.createType {
        case .monolithicSparse:
            if extents.contains(where: { $0.map.grains?.hasZeroGrains == true }) {
                settings.options["zeroed-grain"] = "on"
            }
        case .streamOptimized: settings.variant = "stream"
        default:
            throw DiskError(
                .unsupported, "only VMDKs of one sparse file can be made anew; this one is \(text.createTypeName)",
                image: files.first)
        }
        return settings
    }
}

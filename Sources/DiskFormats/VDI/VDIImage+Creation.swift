internal import DiskImage
internal import DiskStorage

extension VDIImage {
    func creationSettings() throws(DiskError) -> CreationSettings {
        guard header.type != .fixed else {
            throw DiskError(.unsupported, "a fixed image has all its space, and keeps it", image: files.first)
        }
        return CreationSettings()
    }
}

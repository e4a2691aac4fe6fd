internal import DiskImage
internal import DiskStorage

extension VHDImage {
    func creationSettings() throws(DiskError) -> CreationSettings { CreationSettings() }
}

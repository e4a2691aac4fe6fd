internal import DiskImage
internal import DiskStorage

extension RawImage {
    func creationSettings() throws(DiskError) -> CreationSettings { CreationSettings() }
}

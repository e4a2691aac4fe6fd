internal import DiskImage
internal import DiskStorage

/// Blocks fill the holes whenever an image is closed, and the file is cut off then.
extension VDIImage {
    var released: [ReleasedPlaces] { [releasedPlaces] }
    var givesUpBlocks: Bool { header.type != .fixed }

    func planShrinking() -> Bool {
        allowRelocation()
        return space.extent.free > 0
    }

    func stopShrinking() {}
    func finishShrinking() {}
}

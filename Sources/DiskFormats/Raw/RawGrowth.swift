internal import DiskImage
internal import DiskStorage

extension RawDriver: MeasurableDriver {
    /// The file is as long as the disk, however much of it is a hole.
    func growth(of request: CreateRequest, companions: any CompanionOpener) -> ImageGrowth { .none }
}

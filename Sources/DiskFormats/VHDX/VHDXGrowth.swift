internal import DiskImage
internal import DiskStorage

extension VHDXDriver: MeasurableDriver {
    /// All tables are there from the beginning. (A child's bitmaps are not counted: what is written as a whole needs
    /// none.)
    func growth(of request: CreateRequest, companions: any CompanionOpener) throws(DiskError) -> ImageGrowth {
        _ = try VHDXCreator(request)
        guard request.variant != "fixed" else { return .none }
        let blockSize = request.blockSize ?? VHDXCreator.usualBlockSize(hasParent: request.parent != nil)
        return ImageGrowth(blockSize: blockSize) { empty, blocks, _ in empty.growing(by: blocks, of: blockSize) }
    }
}

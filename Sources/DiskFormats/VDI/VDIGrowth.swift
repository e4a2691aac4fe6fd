internal import DiskImage
internal import DiskStorage

extension VDIDriver: MeasurableDriver {
    /// Header and map are there from the beginning; each block adds one.
    func growth(of request: CreateRequest, companions: any CompanionOpener) throws(DiskError) -> ImageGrowth {
        let blockSize = request.blockSize ?? Self.usualBlockSize
        guard request.variant?.lowercased() != VDIVariant.fixed.rawValue else { return .none }
        return ImageGrowth(blockSize: blockSize) { empty, blocks, _ in empty.growing(by: blocks, of: blockSize) }
    }
}

internal import DiskImage
internal import DiskStorage

extension VHDDriver: MeasurableDriver {
    /// Blocks lie between what is there from the beginning and the footer, their data at multiples of a page.
    func growth(of request: CreateRequest, companions: any CompanionOpener) throws(DiskError) -> ImageGrowth {
        _ = try VHDCreator(request)
        guard request.variant != "fixed" else { return .none }
        let blockSize = request.blockSize ?? VHDCreator.usualBlockSize
        let bitmapSize = (blockSize / 512 / 8).dividedRoundingUp(by: 512) * 512
        let alignment = VHDFile.alignment
        let footer = UInt64(VHDFooter.byteCount)
        return ImageGrowth(blockSize: blockSize) { empty, blocks, _ in
            guard blocks > 0, empty >= footer else { return empty }
            let first = (empty - footer + bitmapSize).dividedRoundingUp(by: alignment) * alignment + blockSize
            let slot = bitmapSize.dividedRoundingUp(by: alignment) * alignment + blockSize
            return (first + footer).growing(by: blocks - 1, of: slot)
        }
    }
}

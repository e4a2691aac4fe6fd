internal import DiskImage
internal import DiskStorage

extension VMDKDriver: MeasurableDriver {
    /// Sparse files have all their tables from the beginning, and grains of which the last is whole too; in a stream
    /// each grain has a marker, and what it is compressed to, and each table one too.
    func growth(of request: CreateRequest, companions: any CompanionOpener) throws(DiskError) -> ImageGrowth {
        let creator = try VMDKCreator(request, companions)
        switch creator.variant {
        case .fixed, .splitFixed, .esx, .fullDevice, .partitionedDevice: return .none
        case .dynamic, .split, .esxSparse:
            let grain = try VMDKCreator.grainSectors(request, creator.variant) * 512
            return ImageGrowth(blockSize: grain) { empty, grains, _ in empty.growing(by: grains, of: grain) }
        case .stream:
            let grain = try VMDKCreator.grainSectors(request, .stream) * 512
            let header = VMDKSparseHeader(capacitySectors: creator.sectorCount)
            let bound = try Deflate.Compressor(level: 6).zlibBound(Int(grain)) + VMDKStreamMarker.grainByteCount
            let most = UInt64(bound).dividedRoundingUp(by: 512) * 512
            let table = UInt64(VMDKStreamMarker.metadataByteCount) + header.tableSectorCount * 512
            return ImageGrowth(
                blockSize: grain, tableCoverage: grain * UInt64(header.entriesPerTable), isUpperBound: true
            ) { empty, grains, tables in
                empty.growing(by: grains, of: most).growing(by: tables, of: table)
            }
        }
    }
}

internal import DiskImage
internal import DiskStorage

extension QEDDriver: MeasurableDriver {
    /// The L1 table is there from the beginning; L2 tables come with the first cluster that they are for.
    func growth(of request: CreateRequest, companions: any CompanionOpener) throws(DiskError) -> ImageGrowth {
        let (clusterSize, tableBytes) = try QEDCreator(request).layout
        return ImageGrowth(blockSize: clusterSize, tableCoverage: tableBytes / 8 * clusterSize) {
            empty, clusters, tables in
            empty.growing(by: clusters, of: clusterSize).growing(by: tables, of: tableBytes)
        }
    }
}

internal import DiskImage
internal import DiskStorage

/// QCOW version 1: the format before QCOW2, read only.
struct QCOWDriver: ImageDriver {
    let name = "qcow"
    let title = "QEMU copy-on-write disk, version 1"
    let fileExtensions = ["qcow"]
    let capabilities: FormatCapabilities = [.read, .check, .compressed]
    let variants: [FormatVariant] = []

    func probe(_ file: ProbedFile) -> ProbeResult { QCOWHeader.hasMagic(file.head) ? .certain : .no }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try QCOWImage(request) }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        throw DiskError(.unsupported, "version 1 of QCOW is only read; create a qcow2 image", image: request.path)
    }

    /// Every entry must lead somewhere.
    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        let image = try QCOWImage(
            OpenRequest(
                storage: request.storage, path: request.path, mode: .readOnly, cache: request.cache,
                companions: request.companions, skipsConsistencyChecks: true))
        var report = CheckReport()
        report.totalBlocks = image.virtualSize.dividedRoundingUp(by: image.blockSize)
        var offset: UInt64 = 0
        var batch = ExtentBatch()
        while offset < image.virtualSize, report.remaining(.loss) < Self.lossLimit {
            batch.removeAll()
            do throws(DiskError) {
                try image.map(offset: offset, length: image.virtualSize - offset, into: &batch)
                offset += batch.coveredLength
            } catch {
                guard error.kind == .invalidImage else { throw error }
                // What came before the bad entry was translated; go on behind the cluster with it.
                offset += batch.coveredLength
                report.add(.init(.loss, file: request.path, "cluster \(offset / image.blockSize): \(error.message)"))
                offset = (offset / image.blockSize + 1) * image.blockSize
            }
            for number in 0..<batch.count where batch[number].kind != .absent {
                report.allocatedBlocks += batch[number].length.dividedRoundingUp(by: image.blockSize)
            }
        }
        return report
    }

    /// After so many losses the rest is not looked at.
    private static let lossLimit = 10_000
}

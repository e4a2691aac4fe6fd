internal import DiskImage
internal import DiskStorage

/// QED, the QEMU enhanced disk: QEMU's format between QCOW2's two versions.
struct QEDDriver: ImageDriver {
    let name = "qed"
    let title = "QEMU enhanced disk"
    let fileExtensions = ["qed"]
    let capabilities: FormatCapabilities = [
        .read, .write, .createDynamic, .differencing, .discard, .check, .resize, .compact,
    ]
    let optionNames = ["table-size"]
    let variants = [FormatVariant("dynamic", "grows with what is written; option table-size=CLUSTERS")]

    func probe(_ file: ProbedFile) -> ProbeResult { QEDHeader.hasMagic(file.head) ? .certain : .no }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try QEDImage(request) }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        try QEDCreator(request).create(companions)
    }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        let header = try QEDHeader(
            parsing: request.storage.bytes(at: 0, count: QEDHeader.byteCount, for: .header, "the header"))
        let length = try request.storage.length()
        var report = CheckReport()
        do throws(DiskError) {
            try header.checkPlaces(end: length & ~(header.clusterSize - 1))
        } catch {
            // Without its L1 table nothing of the disk can be found.
            report.add(.init(.loss, file: request.path, error.message))
            return report
        }
        let image = try QEDImage(
            OpenRequest(
                storage: request.storage, path: request.path, mode: repair ? .readWrite : .readOnly,
                cache: request.cache, companions: request.companions, skipsConsistencyChecks: true))
        var check = QEDCheck(header, request.storage, file: request.path, length: length, isRepairing: repair)
        try check.run()
        report = check.report
        if length % image.blockSize != 0 {
            report.add(
                .init(
                    .note, file: request.path,
                    "\(length % image.blockSize) bytes follow the last whole cluster; they belong to nothing"))
        }
        guard header.features.contains(.needCheck) else { return report }
        report.add(
            .init(.repairable, file: request.path, "was not closed by its last writer", isRepaired: repair))
        try image.file?.clearNeedCheck()
        return report
    }
}

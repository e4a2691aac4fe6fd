internal import DiskImage
internal import DiskStorage

/// QED, the QEMU enhanced disk: QEMU's format between QCOW2's two versions.
struct QEDDriver: ImageDriver {
    let name = "qed"
    let title = "QEMU enhanced disk"
    let fileExtensions = ["qed"]
    let capabilities: FormatCapabilities = [.read, .write, .createDynamic, .differencing, .discard, .check]
    let variants = [FormatVariant("dynamic", "grows with what is written; option table-size=CLUSTERS")]

    func probe(_ file: ProbedFile) -> ProbeResult { QEDHeader.hasMagic(file.head) ? .certain : .no }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try QEDImage(request) }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        try QEDCreator(request).create(companions)
    }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        let image = try QEDImage(
            OpenRequest(
                storage: request.storage, path: request.path, mode: repair ? .readWrite : .readOnly,
                cache: request.cache, companions: request.companions, skipsConsistencyChecks: true))
        let length = try request.storage.length()
        var check = QEDCheck(
            image.header, request.storage, file: request.path, length: length, isRepairing: repair)
        try check.run()
        var report = check.report
        if length % image.blockSize != 0 {
            report.add(
                .init(
                    .note, file: request.path,
                    "\(length % image.blockSize) bytes follow the last whole cluster; they belong to nothing"))
        }
        guard image.header.features.contains(.needCheck) else { return report }
        report.add(
            .init(.repairable, file: request.path, "was not closed by its last writer", isRepaired: repair))
        try image.file?.clearNeedCheck()
        return report
    }
}

internal import DiskImage
internal import DiskStorage

/// QCOW2: QEMU's format, versions 2 and 3.
struct QCOW2Driver: ImageDriver {
    let name = "qcow2"
    let title = "QEMU copy-on-write disk, version 2 and 3"
    let fileExtensions = ["qcow2", "qcow2c"]
    let capabilities: FormatCapabilities = [
        .read, .write, .createFixed, .createDynamic, .differencing, .discard, .check, .compressed, .snapshots,
        .resize, .compact,
    ]
    let optionNames = QCOW2CreateOptions.names
    var variants: [FormatVariant] { QCOW2Variant.allCases.map { FormatVariant($0.rawValue, $0.summary) } }

    func probe(_ file: ProbedFile) -> ProbeResult { QCOW2Header.hasMagic(file.head) ? .certain : .no }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try QCOW2Opener.open(request) }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        var creator = try QCOW2Creator(request, companions)
        try creator.create()
    }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        let image = try QCOW2Opener.open(
            OpenRequest(
                storage: request.storage, path: request.path, mode: repair ? .readWrite : .readOnly,
                cache: request.cache, companions: request.companions, skipsConsistencyChecks: true))
        return try QCOW2Repair(image, file: request.path).run(repair ? .everything : .nothing)
    }
}

extension QCOW2Driver: CompressingDriver {
    func makeCompressedImage(
        _ request: CreateRequest, companions: any CompanionOpener
    ) throws(DiskError) -> any ImageStreamWriter {
        var creator = try QCOW2Creator(request, companions)
        return try creator.createCompressed()
    }

    /// Any image may have them.
    func isCompressed(variant: String?) -> Bool { false }
}

internal import DiskImage
internal import DiskStorage

/// VirtualBox's own format.
struct VDIDriver: ImageDriver {
    let name = "vdi"
    let title = "VirtualBox disk image"
    let fileExtensions = ["vdi"]
    let capabilities: FormatCapabilities = [
        .read, .write, .createDynamic, .createFixed, .differencing, .discard, .check, .resize,
        .compact, .uuids,
    ]
    let optionNames = VDICreateOptions.names
    let variants = VDIVariant.allCases.map { FormatVariant($0.rawValue, $0.summary) }
    let isRelocating = true

    func probe(_ file: ProbedFile) -> ProbeResult { VDIHeader.hasSignature(file.head) ? .certain : .no }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try VDIImage(request) }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        var check = VDICheck(try VDIImage(request.withoutConsistencyChecks), request, isRepairing: repair)
        return try check.run()
    }
}

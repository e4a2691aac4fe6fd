internal import DiskImage
internal import DiskStorage

/// VHDX: the format of Hyper-V since 2012. [MS-VHDX]
struct VHDXDriver: ImageDriver {
    let name = "vhdx"
    let title = "Microsoft virtual hard disk, version 2"
    let fileExtensions = ["vhdx", "avhdx"]
    let capabilities: FormatCapabilities = [
        .read, .write, .createFixed, .createDynamic, .differencing, .discard, .check, .resize,
        .compact, .uuids,
    ]
    let optionNames = ["logical-sector-size", "physical-sector-size", "preallocation"]
    let variants = [
        FormatVariant("dynamic", "a file that grows; with a parent, a differencing image"),
        FormatVariant("fixed", "a file of the disk's size; option preallocation=off leaves it sparse"),
    ]

    init() {}

    func probe(_ file: ProbedFile) -> ProbeResult {
        FieldReader(file.head).matches(VHDXStructure.signature, at: 0) ? .certain : .no
    }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try VHDXImage(request) }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        try VHDXCreator(request).create(companions)
    }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        var check = VHDXCheck(request.storage, file: request.path, isRepairing: repair)
        return try check.run()
    }
}

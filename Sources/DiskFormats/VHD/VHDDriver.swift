internal import DiskImage
internal import DiskStorage

/// VHD: the format of Virtual PC, Hyper-V and Azure.
struct VHDDriver: ImageDriver {
    let name = "vhd"
    let title = "Microsoft virtual hard disk"
    let fileExtensions = ["vhd", "avhd"]
    let capabilities: FormatCapabilities = [
        .read, .write, .createFixed, .createDynamic, .differencing, .discard, .check, .resize,
        .compact, .uuids,
    ]
    let optionNames = ["preallocation"]
    let variants = [
        FormatVariant("dynamic", "a file that grows; with a parent, a differencing image"),
        FormatVariant("fixed", "a file of the disk's size; option preallocation=off leaves it sparse"),
    ]

    init() {}

    /// A dynamic image begins with the copy of its footer, a fixed one has the guest's bytes there: it is known by the
    /// footer alone, which therefore has to be right.
    func probe(_ file: ProbedFile) -> ProbeResult {
        if VHDFooter.hasCookie(file.head) { return .certain }
        guard file.tail.count >= VHDFooter.byteCount else { return .no }
        for bytes in [Array(file.tail.suffix(512)), Array(file.tail.suffix(511)) + [0]]
        where VHDFooter.hasCookie(bytes) && VHDFooter.hasRightChecksum(bytes) {
            return .certain
        }
        return .no
    }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend {
        let structure = try VHDStructure(
            request.storage, rule: VHDSizeRule.asked(request), describesDamage: request.mode == .information)
        if structure.footer.type == .fixed { return try VHDFixedImage(structure, request) }
        return try VHDImage(structure, request)
    }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        try VHDCreator(request).create(companions)
    }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        let structure = try VHDStructure(
            request.storage, rule: VHDSizeRule.asked(request), describesDamage: true)
        var check = VHDCheck(structure, request.storage, file: request.path, isRepairing: repair)
        return try check.run()
    }
}

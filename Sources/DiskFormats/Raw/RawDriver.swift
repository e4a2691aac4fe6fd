internal import DiskImage
internal import DiskStorage

/// Raw images: the bytes of the disk and nothing else, in a file or on a block device.
struct RawDriver: ImageDriver {
    let name = "raw"
    let title = "raw disk"
    let fileExtensions = ["raw", "img", "dd", "iso", "bin"]
    let capabilities: FormatCapabilities = [
        .read, .write, .createFixed, .createDynamic, .discard, .check, .resize, .compact,
    ]
    let variants = [
        FormatVariant("dynamic", "a sparse file: space is taken when it is written"),
        FormatVariant("fixed", "all space is taken at once"),
    ]

    func probe(_ file: ProbedFile) -> ProbeResult { .possible }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try RawImage(request) }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        guard request.parent == nil else {
            throw DiskError(.unsupported, "a raw image cannot name a parent", image: request.path)
        }
        guard request.comment == nil, request.uuid == nil else {
            throw DiskError(.unsupported, "a raw image stores neither comment nor UUID", image: request.path)
        }
        guard request.options.isEmpty, request.blockSize == nil else {
            throw DiskError(.invalidArgument, "a raw image has no options and no block size", image: request.path)
        }
        let name = String(request.path.split(separator: "/").last ?? "")
        let file = try companions.createCompanion(name, of: request.path)
        switch request.variant {
        case nil, "dynamic": try file.storage.setLength(request.virtualSize)
        case "fixed": try file.storage.allocate(request.virtualSize)
        case let other?: throw DiskError(.invalidArgument, "a raw image has no variant '\(other)'", image: request.path)
        }
        try file.storage.flush()
    }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        var report = CheckReport()
        let length = try request.storage.length()
        if length % 512 != 0 {
            report.add(
                .init(
                    .note, file: request.path,
                    "its length, \(length) bytes, is no multiple of 512: block devices, as of losetup(8), do not show "
                        + "the last \(length % 512) bytes"
                ))
        }
        return report
    }
}

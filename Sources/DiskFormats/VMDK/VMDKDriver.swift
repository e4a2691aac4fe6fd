internal import DiskImage
internal import DiskStorage

/// VMDK: VMware's format, in all its kinds.
struct VMDKDriver: ImageDriver {
    let name = "vmdk"
    let title = "VMware virtual disk"
    let fileExtensions = ["vmdk"]
    let capabilities: FormatCapabilities = [
        .read, .write, .createFixed, .createDynamic, .createSplit, .differencing, .discard, .check, .compressed,
        .stream, .resize, .compact, .uuids,
    ]
    let optionNames = VMDKCreateOptions.names
    var variants: [FormatVariant] { vmdkVariants }

    func probe(_ file: ProbedFile) -> ProbeResult {
        VMDKSparseHeader.hasMagic(file.head) || COWDHeader.hasMagic(file.head)
            || VMDKDescriptor.looksLikeDescriptor(file.head) ? .certain : .no
    }

    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try VMDKOpener.open(request) }

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        try createVMDK(request, companions: companions)
    }

    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        let image = try VMDKOpener.open(
            OpenRequest(
                storage: request.storage, path: request.path, mode: repair ? .readWrite : .readOnly,
                cache: request.cache,
                companions: request.companions, skipsConsistencyChecks: true))
        var report = CheckReport()
        for extent in image.extents where extent.map.kind == .inaccessible || extent.map.kind == .flat {
            // (Of the others that are damaged, their checker tells what that amounts to.)
            guard let damage = extent.damage else { continue }
            report.add(.init(.loss, file: image.storages[Int(extent.map.storage)].storage.name, damage))
        }
        for extent in image.extents where extent.map.kind == .seSparse {
            report.merge(VMDKTranslationCheck.run(extent, file: image.storages[Int(extent.map.storage)].storage.name))
        }
        for extent in image.extents where extent.map.kind == .sparse || extent.map.kind == .compressed {
            let storage = image.storages[Int(extent.map.storage)].storage
            let canRepair = repair && extent.writer != nil
            let found = try VMDKExtentChecker(extent, storage).check(repair: canRepair ? .everything : .nothing)
            report.merge(found)
            guard extent.wasUnclean else { continue }
            report.add(
                .init(.repairable, file: storage.name, "was not closed by its last writer", isRepaired: canRepair))
            if canRepair { try extent.writer?.markClean(wasUnclean: true) }
        }
        return report
    }
}

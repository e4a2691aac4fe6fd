internal import DiskImage
internal import DiskStorage

/// An external data file keeps its name, which stands in the header, and goes where the image goes.
extension QCOW2Image: MultipleFileBackend {
    func companions(whenNamed name: String) -> [CompanionFile] {
        guard let dataFile = extensions.dataFileName, !dataFile.isEmpty, !dataFile.utf8.contains(UInt8(ascii: "/"))
        else { return [] }
        return [CompanionFile(name: dataFile, newName: dataFile)]
    }

    func firstFile(
        whenNamed name: String, _ companions: [CompanionFile], parent: CreateRequest.ParentDescription?
    ) -> [UInt8]? { nil }
}

internal import DiskImage
internal import DiskStorage

extension QEDImage {
    func creationSettings() throws(DiskError) -> CreationSettings {
        CreationSettings(options: ["table-size": String(header.tableSize)])
    }
}

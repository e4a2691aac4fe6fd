/// The kinds of disks with VDI images, for the tests that are the same for all formats.
extension DiskKind {
    static let vdi: [DiskKind] = []
}

extension PowerCutTests {
    static let vdiLayouts: [Layout] = []
}

extension FailingStorageTests {
    static let vdiLayouts: [Layout] = []
}

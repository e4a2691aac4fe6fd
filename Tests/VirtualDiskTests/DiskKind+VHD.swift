/// The kinds of disks with VHD images, for the tests that are the same for all formats.
extension DiskKind {
    static let vhd: [DiskKind] = []
}

extension PowerCutTests {
    static let vhdLayouts: [Layout] = []
}

extension FailingStorageTests {
    static let vhdLayouts: [Layout] = []
}

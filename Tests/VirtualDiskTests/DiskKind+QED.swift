/// The kinds of disks with QED images, for the tests that are the same for all formats.
extension DiskKind {
    static let qed: [DiskKind] = []
}

extension PowerCutTests {
    static let qedLayouts: [Layout] = []
}

extension FailingStorageTests {
    static let qedLayouts: [Layout] = []
}

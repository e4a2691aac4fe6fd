/// The kinds of disks with QCOW2 images, for the tests that are the same for all formats.
extension DiskKind {
    static let qcow2: [DiskKind] = []
}

extension PowerCutTests {
    static let qcow2Layouts: [Layout] = []
}

extension FailingStorageTests {
    static let qcow2Layouts: [Layout] = []
}

/// The kinds of disks with QED images, for the tests that are the same for all formats.
extension DiskKind {
    /// Of sizes that are no multiple of their clusters.
    static let qed: [DiskKind] = {
        let odd = (1 << 20) + 5 * 512
        let small = (300 << 10) + 512
        let top = { (size: Int, cluster: UInt64?, table: String) in
            Image(file: "top.qed", size: size, blockSize: cluster, options: ["table-size": table])
        }
        return [
            DiskKind("QED", Image(file: "top.qed", size: odd)),
            DiskKind("QED, 1 MiB clusters", top(odd, 1 << 20, "16")),
            DiskKind("QED, 4 KiB clusters, two L2 tables", top((5 << 20) + 512, 4096, "2")),
            // QEMU refuses tables of one cluster, also those that it has made itself.
            DiskKind("QED, 4 KiB clusters, three L2 tables", top((5 << 20) + 512, 4096, "1"), isReadByPeer: false),
            DiskKind(
                "QED, small clusters over large ones",
                Image(file: "base.qed", size: odd), top(odd, 4096, "2")),
            DiskKind(
                "QED, large clusters over small ones",
                Image(file: "base.qed", size: odd, blockSize: 4096), top(odd, 64 << 10, "2")),
            DiskKind(
                "QED over a smaller base", Image(file: "base.qed", size: small, blockSize: 4096),
                top(odd, 8192, "4")),
            DiskKind(
                "QED over a larger base", Image(file: "base.qed", size: odd), top(small, 4096, "4")),
            DiskKind(
                "QED over a raw base", Image(file: "base.raw", size: small), top(odd, 32 << 10, "4")),
            DiskKind(
                "QED over VMDK grains", Image(file: "base.vmdk", variant: "dynamic", size: odd, blockSize: 4096),
                top(odd, nil, "4")),
            DiskKind(
                "VMDK grains over QED", Image(file: "base.qed", size: odd, blockSize: 16 << 10),
                Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 4096), isReadByPeer: false),
            DiskKind(
                "overlay over QED", Image(file: "base.qed", size: odd),
                Image(file: "top.overlay", size: odd), isReadByPeer: false),
        ]
    }()
}

extension PowerCutTests {
    static let qedLayouts = [
        Layout(name: "QED base", variant: nil, blockSize: nil, hasParent: false, format: "qed", peerFormat: "qed"),
        Layout(
            name: "QED child, 4 KiB clusters", variant: nil, blockSize: 4096, options: ["table-size": "2"],
            format: "qed", parentFormat: "qed", peerFormat: "qed"),
        Layout(
            name: "QED child over VMDK", variant: nil, blockSize: 16 << 10, format: "qed", parentFormat: "vmdk",
            peerFormat: "qed"),
    ]
}

extension FailingStorageTests {
    static let qedLayouts = [
        Layout(name: "QED over QED", format: "qed", options: ["table-size": "1"], parentFormat: "qed"),
        Layout(name: "QED over VMDK", format: "qed", blockSize: nil, parentFormat: "vmdk"),
    ]
}

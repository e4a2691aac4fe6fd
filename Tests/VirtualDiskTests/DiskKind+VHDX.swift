/// The kinds of disks with VHDX images, for the tests that are the same for all formats.
extension DiskKind {
    private static let megabyte: UInt64 = 1 << 20

    /// QEMU refuses differencing ones, and sectors of 4 KiB.
    static let vhdx: [DiskKind] = {
        let odd = (3 << 20) + 5 * 512
        let pages = (3 << 20) + 5 * 4096
        let small = (1 << 20) + 512
        return [
            DiskKind("VHDX, fixed", Image(file: "top.vhdx", variant: "fixed", size: odd, blockSize: megabyte)),
            DiskKind("VHDX, 1 MiB blocks", Image(file: "top.vhdx", size: odd, blockSize: megabyte)),
            DiskKind("VHDX, 2 MiB blocks", Image(file: "top.vhdx", size: odd, blockSize: 2 * megabyte)),
            DiskKind("VHDX, one block of 32 MiB", Image(file: "top.vhdx", size: small)),
            DiskKind(
                "VHDX, sectors of 4 KiB",
                Image(
                    file: "top.vhdx", size: pages, blockSize: megabyte, options: ["logical-sector-size": "4096"]),
                isReadByPeer: false),
            DiskKind(
                "VHDX over VHDX", Image(file: "base.vhdx", size: odd, blockSize: megabyte),
                Image(file: "top.vhdx", size: odd, blockSize: megabyte), isReadByPeer: false),
            DiskKind(
                "VHDX over a fixed VHDX, sectors of 4 KiB",
                Image(
                    file: "base.vhdx", variant: "fixed", size: pages, blockSize: megabyte,
                    options: ["logical-sector-size": "4096"]),
                Image(
                    file: "top.vhdx", size: pages, blockSize: 2 * megabyte, options: ["logical-sector-size": "4096"]),
                isReadByPeer: false),
            DiskKind(
                "VHDX over a smaller VHDX over a larger one", Image(file: "base.vhdx", size: odd, blockSize: megabyte),
                Image(file: "middle.vhdx", size: small, blockSize: 4 * megabyte),
                Image(file: "top.vhdx", size: odd, blockSize: 2 * megabyte), isReadByPeer: false),
            DiskKind(
                "VHDX over VMDK", Image(file: "base.vmdk", size: odd, blockSize: 4096),
                Image(file: "top.vhdx", size: odd, blockSize: megabyte), isReadByPeer: false),
            DiskKind(
                "VHDX over a raw base", Image(file: "base.raw", size: small),
                Image(file: "top.vhdx", size: odd, blockSize: megabyte), isReadByPeer: false),
            DiskKind(
                "QCOW2 over a differencing VHDX", Image(file: "base.vhdx", size: odd, blockSize: megabyte),
                Image(file: "middle.vhdx", size: odd, blockSize: megabyte),
                Image(file: "top.qcow2", size: odd, blockSize: 4096), isReadByPeer: false),
        ]
    }()
}

extension PowerCutTests {
    /// Blocks are 1 MiB at least, so that the disk has some of them. These make 10,500 cuts in a plain run.
    static let vhdxLayouts: [Layout] = {
        let megabyte: UInt64 = 1 << 20
        func layout(
            _ name: String, _ variant: String? = nil, parent: String? = nil, _ options: [String: String] = [:]
        ) -> Layout {
            // QEMU knows no parents, and no sectors of 4 KiB.
            let isKnownToPeer = parent == nil && options.isEmpty
            return Layout(
                name: name, variant: variant, blockSize: megabyte, options: options, hasParent: parent != nil,
                format: "vhdx", parentFormat: parent ?? "", peerFormat: isKnownToPeer ? "vhdx" : nil,
                sectors: 5 * 2048, cuts: 1_750, tortureCuts: 15_000)
        }
        let pages = ["logical-sector-size": "4096"]
        return [
            layout("VHDX child", parent: "vhdx"), layout("VHDX child over VMDK", parent: "vmdk"),
            layout("VHDX child, sectors of 4 KiB", parent: "vmdk", pages),
            layout("VHDX, dynamic"), layout("VHDX, dynamic, sectors of 4 KiB", nil, pages),
            layout("VHDX, fixed", "fixed"),
        ]
    }()
}

extension FailingStorageTests {
    static let vhdxLayouts = [
        Layout(name: "VHDX child", format: "vhdx", blockSize: 1 << 20, parentFormat: "vhdx"),
        Layout(name: "VHDX child over VMDK", format: "vhdx", blockSize: 1 << 20),
    ]
}

/// The kinds of disks with VHD images, for the tests that are the same for all formats.
extension DiskKind {
    static let vhd: [DiskKind] = {
        let odd = (1 << 20) + 5 * 512
        let large = (5 << 20) + 512
        let small = (300 << 10) + 512
        return [
            DiskKind("VHD, fixed", Image(file: "top.vhd", variant: "fixed", size: odd)),
            DiskKind(
                "VHD, dynamic, 512 KiB blocks",
                Image(file: "top.vhd", variant: "dynamic", size: odd, blockSize: 512 << 10)),
            DiskKind("VHD, dynamic, 2 MiB blocks", Image(file: "top.vhd", size: large, blockSize: 2 << 20)),
            DiskKind("VHD, dynamic, 4 KiB blocks", Image(file: "top.vhd", size: odd, blockSize: 4096)),
            DiskKind("VHD, dynamic, 8 MiB blocks", Image(file: "top.vhd", size: odd, blockSize: 8 << 20)),
        ] + vhdChains(odd, large, small)
    }()

    /// QEMU reads a differencing VHD as if it had no parent.
    private static func vhdChains(_ odd: Int, _ large: Int, _ small: Int) -> [DiskKind] {
        [
            DiskKind(
                "VHD over VHD, 2 MiB blocks",
                Image(file: "base.vhd", size: large, blockSize: 2 << 20),
                Image(file: "top.vhd", size: large, blockSize: 2 << 20), isReadByPeer: false),
            DiskKind(
                "VHD over a fixed VHD, 512 KiB blocks",
                Image(file: "base.vhd", variant: "fixed", size: odd),
                Image(file: "top.vhd", size: odd, blockSize: 512 << 10), isReadByPeer: false),
            DiskKind(
                "VHD over VHD over VHD, 4 KiB, 64 KiB and 16 KiB blocks",
                Image(file: "base.vhd", size: odd, blockSize: 4096),
                Image(file: "middle.vhd", size: odd, blockSize: 64 << 10),
                Image(file: "top.vhd", size: odd, blockSize: 16 << 10), isReadByPeer: false),
            DiskKind(
                "VHD over a smaller VHD",
                Image(file: "base.vhd", size: small, blockSize: 8192),
                Image(file: "top.vhd", size: odd, blockSize: 64 << 10), isReadByPeer: false),
            DiskKind(
                "VHD over VMDK",
                Image(file: "base.vmdk", size: odd, blockSize: 4096),
                Image(file: "top.vhd", size: odd, blockSize: 32 << 10), isReadByPeer: false),
            DiskKind(
                "VHD over a raw base",
                Image(file: "base.raw", size: small),
                Image(file: "top.vhd", size: odd, blockSize: 8192), isReadByPeer: false),
            DiskKind(
                "VMDK over a differencing VHD",
                Image(file: "base.vhd", size: odd, blockSize: 128 << 10),
                Image(file: "middle.vhd", size: odd, blockSize: 128 << 10),
                Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 8192), isReadByPeer: false),
        ]
    }
}

extension PowerCutTests {
    static let vhdLayouts = [
        Layout(
            name: "VHD child, 64 KiB blocks", variant: nil, blockSize: 64 << 10, format: "vhd", parentFormat: "vhd",
            peerFormat: nil),
        Layout(
            name: "VHD child, 4 KiB blocks, over VMDK", variant: nil, blockSize: 4096, format: "vhd", peerFormat: nil),
        Layout(
            name: "VHD, dynamic, 16 KiB blocks", variant: "dynamic", blockSize: 16 << 10, hasParent: false,
            format: "vhd", peerFormat: nil),
        Layout(
            name: "VHD, fixed", variant: "fixed", blockSize: nil, hasParent: false, format: "vhd", peerFormat: nil),
    ]
}

extension FailingStorageTests {
    static let vhdLayouts = [
        Layout(name: "VHD child", format: "vhd", blockSize: 16 << 10, parentFormat: "vhd"),
        Layout(name: "VHD child over VMDK", format: "vhd"),
    ]
}

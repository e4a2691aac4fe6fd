/// The kinds of disks with VDI images, for the tests that are the same for all formats. A chain is judged by the reader
/// in Python, since QEMU reads none; so are small blocks, since QEMU reads blocks of 1 MiB alone.
extension DiskKind {
    static let vdi: [DiskKind] = {
        let mib: UInt64 = 1 << 20
        let odd = (1 << 20) + 5 * 512
        let small = (300 << 10) + 512
        return [
            DiskKind("VDI, 1 MiB blocks", Image(file: "top.vdi", size: (3 << 20) + 2560, blockSize: mib)),
            DiskKind(
                "VDI, aligned to sectors",
                Image(file: "top.vdi", size: (3 << 20) + 512, blockSize: mib, options: ["alignment": "512"])),
            DiskKind("VDI, 4 KiB blocks", Image(file: "top.vdi", size: odd, blockSize: 4096), isReadByPeer: false),
            DiskKind("VDI fixed", Image(file: "top.vdi", variant: "fixed", size: (2 << 20) + 512, blockSize: mib)),
            DiskKind(
                "VDI fixed, 16 KiB blocks", Image(file: "top.vdi", variant: "fixed", size: odd, blockSize: 16 << 10),
                isReadByPeer: false),
            DiskKind(
                "VDI zero-expand, 8 KiB blocks",
                Image(file: "top.vdi", variant: "zero-expand", size: odd, blockSize: 8192), isReadByPeer: false),
            DiskKind(
                "VDI over VDI", Image(file: "base.vdi", size: odd, blockSize: mib),
                Image(file: "top.vdi", size: odd, blockSize: 8192), isReadByPeer: false),
            DiskKind(
                "VDI over small blocks", Image(file: "base.vdi", size: odd, blockSize: 4096),
                Image(file: "top.vdi", size: odd, blockSize: 64 << 10), isReadByPeer: false),
            DiskKind(
                "VDI zero-expand over a fixed, smaller one",
                Image(file: "base.vdi", variant: "fixed", size: small, blockSize: 32 << 10),
                Image(file: "top.vdi", variant: "zero-expand", size: odd, blockSize: 16 << 10), isReadByPeer: false),
            DiskKind(
                "four VDIs", Image(file: "base.vdi", size: odd, blockSize: mib),
                Image(file: "second.vdi", size: small, blockSize: 4096),
                Image(file: "third.vdi", size: odd + 4096, blockSize: 16 << 10),
                Image(file: "top.vdi", size: odd, blockSize: 8192), isReadByPeer: false),
            DiskKind(
                "VDI over VMDK", Image(file: "base.vmdk", variant: "dynamic", size: odd, blockSize: 4096),
                Image(file: "top.vdi", size: odd, blockSize: 16 << 10), isReadByPeer: false),
            DiskKind(
                "VMDK over VDI", Image(file: "base.vdi", size: odd, blockSize: 16 << 10),
                Image(file: "top.vmdk", variant: "dynamic", size: odd), isReadByPeer: false),
            DiskKind(
                "VMDK over VDI over VMDK over VDI", Image(file: "base.vdi", size: small, blockSize: 4096),
                Image(file: "second.vmdk", variant: "dynamic", size: odd, blockSize: 8192),
                Image(file: "third.vdi", size: odd, blockSize: 32 << 10),
                Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 4096), isReadByPeer: false),
            DiskKind(
                "overlay over VDI", Image(file: "base.vdi", size: odd, blockSize: 16 << 10),
                Image(file: "top.overlay", size: odd), isReadByPeer: false),
        ]
    }()
}

extension PowerCutTests {
    static let vdiLayouts = [
        Layout(
            name: "VDI child, 4 KiB blocks", variant: nil, blockSize: 4096, format: "vdi", parentFormat: "vdi",
            peerFormat: nil),
        Layout(
            name: "VDI child, 32 KiB blocks", variant: nil, blockSize: 32 << 10, format: "vdi", parentFormat: "vdi",
            peerFormat: nil),
        Layout(
            name: "VDI base, 8 KiB blocks", variant: nil, blockSize: 8192, options: ["alignment": "512"],
            hasParent: false, format: "vdi", peerFormat: nil),
        Layout(
            name: "VDI zero-expand child over VMDK", variant: "zero-expand", blockSize: 16 << 10, format: "vdi",
            peerFormat: nil),
        Layout(
            name: "VDI fixed", variant: "fixed", blockSize: 64 << 10, hasParent: false, format: "vdi", peerFormat: nil),
    ]
}

extension FailingStorageTests {
    static let vdiLayouts = [
        Layout(name: "VDI", format: "vdi", parentFormat: "vdi", movesBlocks: true),
        Layout(
            name: "VDI zero-expand over VMDK", format: "vdi", variant: "zero-expand", blockSize: 16 << 10,
            movesBlocks: true),
    ]
}

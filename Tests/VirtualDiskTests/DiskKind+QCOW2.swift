/// The kinds of disks with QCOW2 images, for the tests that are the same for all formats.
extension DiskKind {
    private static let odd = (1 << 20) + 5 * 512
    private static let small = (300 << 10) + 512

    static let qcow2: [DiskKind] = single + chains

    private static let single = [
        DiskKind("QCOW2", Image(file: "top.qcow2", size: odd)),
        DiskKind("QCOW2 version 2, 4 KiB clusters", of(odd, 4096, ["compat": "0.10"])),
        DiskKind("QCOW2, 512-byte clusters, 1-bit refcounts", of(odd, 512, ["refcount-bits": "1"])),
        DiskKind("QCOW2, 1 KiB clusters, 64-bit refcounts", of(odd, 1024, ["refcount-bits": "64"])),
        DiskKind("QCOW2, 2 MiB clusters, 8-bit refcounts", of(odd, 2 << 20, ["refcount-bits": "8"])),
        DiskKind("QCOW2, lazy refcounts", of(odd, 16 << 10, ["lazy-refcounts": "on"])),
        DiskKind("QCOW2, subclusters of 512 bytes", of(odd, 16 << 10, ["extended-l2": "on"])),
        DiskKind("QCOW2, subclusters of 4 KiB", of(odd, 128 << 10, ["extended-l2": "on", "refcount-bits": "4"])),
        DiskKind("QCOW2, tables in advance", of(odd, 4096, [:], "metadata")),
        DiskKind("QCOW2, tables in advance, subclusters", of(odd, 32 << 10, ["extended-l2": "on"], "metadata")),
        DiskKind("QCOW2, fixed", of(odd, 64 << 10, [:], "fixed")),
        DiskKind("QCOW2, data file", of(odd, 4096, ["data-file": "top.data"])),
        DiskKind(
            "QCOW2, data file, subclusters", of(odd, 32 << 10, ["data-file": "top.data", "extended-l2": "on"])),
        DiskKind("QCOW2, raw data file", of(odd, 4096, ["data-file": "top.data", "data-file-raw": "on"])),
        DiskKind(
            "QCOW2, data file, tables in advance", of(odd, 4096, ["data-file": "top.data"], "metadata")),
    ]

    private static let chains = [
        DiskKind("QCOW2 over QCOW2", base(odd, nil), Image(file: "top.qcow2", size: odd)),
        DiskKind("QCOW2, small clusters over large ones", base(odd, 64 << 10), of(odd, 2048)),
        DiskKind("QCOW2, large clusters over small ones", base(odd, 2048), of(odd, 64 << 10)),
        DiskKind(
            "QCOW2 version 2 over version 2", base(odd, 4096, ["compat": "0.10"]), of(odd, 8192, ["compat": "0.10"])),
        DiskKind("QCOW2, subclusters over a base", base(odd, 4096), of(odd, 64 << 10, ["extended-l2": "on"])),
        DiskKind(
            "QCOW2, subclusters with tables in advance over a base", base(odd, 4096),
            of(odd, 16 << 10, ["extended-l2": "on"], "metadata")),
        DiskKind("QCOW2, data file over a base", base(odd, 4096), of(odd, 8192, ["data-file": "top.data"])),
        DiskKind("QCOW2 over a smaller base", base(small, 4096), of(odd, 32 << 10)),
        DiskKind("QCOW2 over a larger base", base(odd, 4096), of(small, 32 << 10)),
        DiskKind(
            "QCOW2 over a compressed one", Image(file: "base.qcow2", size: odd, isStream: true), of(odd, 4096)),
        DiskKind(
            "QCOW2 over one compressed by zstd",
            Image(file: "base.qcow2", size: odd, options: ["compression_type": "zstd"], isStream: true), of(odd, 4096)),
        DiskKind("QCOW2 over raw", Image(file: "base.raw", size: small), of(odd, 8192)),
        DiskKind("QCOW2 over VMDK", Image(file: "base.vmdk", variant: "dynamic", size: odd), of(odd, 8192)),
        DiskKind(
            "VMDK over QCOW2", base(odd, 4096), Image(file: "top.vmdk", variant: "dynamic", size: odd),
            isReadByPeer: false),
        DiskKind(
            "overlay over QCOW2", base(odd, 4096), Image(file: "top.overlay", size: odd, blockSize: 4096),
            isReadByPeer: false),
        DiskKind(
            "QCOW2 over QCOW2 over VMDK over raw", Image(file: "base.raw", size: small),
            Image(file: "second.vmdk", variant: "dynamic", size: odd, blockSize: 4096),
            Image(file: "third.qcow2", size: odd, blockSize: 16 << 10, options: ["extended-l2": "on"]),
            of(odd, 4096), isReadByPeer: false),
    ]

    private static func of(
        _ size: Int, _ clusterSize: UInt64, _ options: [String: String] = [:], _ variant: String? = nil
    ) -> Image {
        Image(file: "top.qcow2", variant: variant, size: size, blockSize: clusterSize, options: options)
    }

    private static func base(_ size: Int, _ clusterSize: UInt64?, _ options: [String: String] = [:]) -> Image {
        Image(file: "base.qcow2", size: size, blockSize: clusterSize, options: options)
    }
}

extension PowerCutTests {
    static let qcow2Layouts: [Layout] = [
        layout("QCOW2", nil),
        layout("QCOW2, 4 KiB clusters", 4096),
        layout("QCOW2 version 2", 4096, ["compat": "0.10"]),
        layout("QCOW2, 512-byte clusters, 64-bit refcounts", 512, ["refcount-bits": "64"]),
        layout("QCOW2, subclusters", 16 << 10, ["extended-l2": "on"]),
        layout("QCOW2, lazy refcounts, 1-bit refcounts", 2048, ["lazy-refcounts": "on", "refcount-bits": "1"]),
        layout("QCOW2, tables in advance", 4096, [:], variant: "metadata", hasParent: false),
        layout("QCOW2, data file", 4096, ["data-file": "top.data"]),
        layout("QCOW2, raw data file", 4096, ["data-file": "top.data", "data-file-raw": "on"], hasParent: false),
    ]

    private static func layout(
        _ name: String, _ blockSize: UInt64?, _ options: [String: String] = [:], variant: String? = nil,
        hasParent: Bool = true
    ) -> Layout {
        Layout(
            name: name, variant: variant, blockSize: blockSize, options: options, hasParent: hasParent, format: "qcow2",
            parentFormat: "qcow2", peerFormat: "qcow2")
    }
}

extension FailingStorageTests {
    static let qcow2Layouts: [Layout] = [
        Layout(name: "QCOW2", format: "qcow2", parentFormat: "qcow2"),
        Layout(name: "QCOW2 version 2", format: "qcow2", options: ["compat": "0.10"], parentFormat: "qcow2"),
        Layout(
            name: "QCOW2, 512-byte clusters, 64-bit refcounts", format: "qcow2", blockSize: 512,
            options: ["refcount-bits": "64"]),
        Layout(name: "QCOW2, subclusters", format: "qcow2", blockSize: 16 << 10, options: ["extended-l2": "on"]),
        Layout(name: "QCOW2, data file", format: "qcow2", options: ["data-file": "top.data"]),
    ]
}

// swift-tools-version: 6.2
import PackageDescription

// A package of its own, so that nothing but `make fuzz` builds with libFuzzer.
let package = Package(
    name: "vdmount-fuzz",
    dependencies: [.package(name: "vdmount", path: "../..")],
    targets: [
        .target(name: "FuzzSupport", dependencies: [.product(name: "VirtualDisk", package: "vdmount")]),
        .executableTarget(
            name: "fuzz", dependencies: ["FuzzSupport", .product(name: "VirtualDisk", package: "vdmount")]),
        .executableTarget(
            name: "fuzz-change", dependencies: ["FuzzSupport", .product(name: "VirtualDisk", package: "vdmount")]),
        .executableTarget(
            name: "fuzz-partitions", dependencies: [.product(name: "VirtualDisk", package: "vdmount")]),
        .executableTarget(
            name: "fuzz-cache", dependencies: [.product(name: "VirtualDisk", package: "vdmount")]),
        .executableTarget(
            name: "fuzz-network", dependencies: [.product(name: "DiskNetwork", package: "vdmount")]),
    ]
)

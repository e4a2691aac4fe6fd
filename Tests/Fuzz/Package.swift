// swift-tools-version: 6.2
import PackageDescription

// A package of its own, so that nothing but `make fuzz` builds with libFuzzer.
let package = Package(
    name: "vdmount-fuzz",
    dependencies: [.package(name: "vdmount", path: "../..")],
    targets: [
        .executableTarget(
            name: "fuzz", dependencies: [.product(name: "VirtualDisk", package: "vdmount")]),
        .executableTarget(
            name: "fuzz-partitions", dependencies: [.product(name: "VirtualDisk", package: "vdmount")]),
        .executableTarget(
            name: "fuzz-cache", dependencies: [.product(name: "VirtualDisk", package: "vdmount")]),
    ]
)

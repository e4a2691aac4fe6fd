// swift-tools-version: 6.2
import PackageDescription

/// Rules every target of ours is built by: memory-unsafe code is marked where it stands, and a warning is an error.
let strict: [SwiftSetting] = [
    .strictMemorySafety(),
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("InternalImportsByDefault"),
]

let argumentParser: Target.Dependency = .product(name: "ArgumentParser", package: "swift-argument-parser")
let logging: Target.Dependency = .product(name: "Logging", package: "swift-log")
let systemPackage: Target.Dependency = .product(name: "SystemPackage", package: "swift-system")

let package = Package(
    name: "vdmount",
    products: [
        .library(name: "VirtualDisk", targets: ["VirtualDisk"]),
        .library(name: "DiskNetwork", targets: ["DiskNetwork"]),
        .executable(name: "vdmount", targets: ["vdmount"]),
        .executable(name: "vdumount", targets: ["vdumount"]),
        .executable(name: "vdimg", targets: ["vdimg"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
        .package(url: "https://github.com/apple/swift-system", from: "1.8.1"),
    ],
    targets: [
        .systemLibrary(name: "CFuse3", pkgConfig: "fuse3", providers: [.apt(["libfuse3-dev"])]),
        .systemLibrary(name: "CISAL", pkgConfig: "libisal", providers: [.apt(["libisal-dev"])]),
        .systemLibrary(name: "CDeflate", pkgConfig: "libdeflate", providers: [.apt(["libdeflate-dev"])]),
        .systemLibrary(name: "CSeccomp", pkgConfig: "libseccomp", providers: [.apt(["libseccomp-dev"])]),
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
        .systemLibrary(name: "CCurl", pkgConfig: "libcurl", providers: [.apt(["libcurl4-openssl-dev"])]),
        .systemLibrary(name: "CNBD", pkgConfig: "libnbd", providers: [.apt(["libnbd-dev"])]),
        .systemLibrary(name: "CISCSI", pkgConfig: "libiscsi", providers: [.apt(["libiscsi-dev"])]),
        .target(name: "CLinux"),

        .target(name: "DiskStorage", dependencies: ["CLinux", systemPackage], swiftSettings: strict),
        .target(name: "DiskImage", dependencies: ["DiskStorage", "CLinux"], swiftSettings: strict),
        .target(name: "DiskPartitions", dependencies: ["DiskStorage", "CDeflate", "CISAL"], swiftSettings: strict),
        .target(
            name: "DiskFormats",
            dependencies: ["DiskImage", "DiskPartitions", "DiskStorage", "CDeflate", "CZstd"],
            swiftSettings: strict),
        .target(
            name: "VirtualDisk",
            dependencies: ["DiskFormats", "DiskImage", "DiskPartitions", "DiskStorage", "CLinux", systemPackage],
            swiftSettings: strict),

        .target(
            name: "DiskNetwork", dependencies: ["DiskStorage", "CLinux", "CCurl", "CNBD", "CISCSI"],
            swiftSettings: strict),

        .target(name: "FuseShim", dependencies: ["CFuse3", "CSeccomp"]),
        .target(name: "FuseHost", dependencies: ["FuseShim"], swiftSettings: strict),

        .target(name: "CommandSupport", dependencies: ["CLinux", argumentParser], swiftSettings: strict),
        .executableTarget(
            name: "vdmount",
            dependencies: [
                "VirtualDisk", "DiskImage", "DiskNetwork", "DiskPartitions", "DiskStorage", "FuseHost",
                "CommandSupport", argumentParser, logging,
            ],
            swiftSettings: strict),
        .executableTarget(
            name: "vdumount", dependencies: ["FuseHost", "DiskStorage", "CommandSupport", argumentParser],
            swiftSettings: strict),
        .executableTarget(
            name: "vdimg",
            dependencies: [
                "VirtualDisk", "DiskImage", "DiskNetwork", "DiskStorage", "FuseHost", "CommandSupport",
                argumentParser,
            ],
            swiftSettings: strict),

        .target(
            name: "DiskTesting", dependencies: ["VirtualDisk", "DiskFormats", "DiskImage", "DiskStorage"],
            path: "Tests/DiskTesting", swiftSettings: strict),
        .testTarget(name: "DiskStorageTests", dependencies: ["DiskStorage", "DiskTesting"], swiftSettings: strict),
        .testTarget(
            name: "DiskImageTests", dependencies: ["DiskImage", "DiskStorage", "DiskTesting"], swiftSettings: strict),
        .testTarget(
            name: "DiskNetworkTests", dependencies: ["DiskNetwork", "DiskStorage", "DiskTesting", "VirtualDisk"],
            swiftSettings: strict),
        .testTarget(
            name: "DiskPartitionsTests", dependencies: ["DiskPartitions", "DiskStorage", "DiskTesting", "VirtualDisk"],
            swiftSettings: strict),
        .testTarget(
            name: "DiskFormatsTests", dependencies: ["DiskFormats", "DiskPartitions", "DiskTesting"],
            swiftSettings: strict),
        .target(name: "CAllocationCounter", path: "Tests/CAllocationCounter"),
        .testTarget(
            name: "VirtualDiskTests", dependencies: ["VirtualDisk", "DiskTesting", "CAllocationCounter"],
            swiftSettings: strict),
        .executableTarget(name: "ConfinementProbe", dependencies: ["FuseShim"], path: "Tests/ConfinementProbe"),
        .testTarget(name: "FuseHostTests", dependencies: ["FuseHost"], swiftSettings: strict),
        .testTarget(name: "MountTests", dependencies: ["DiskTesting"], swiftSettings: strict),
    ]
)

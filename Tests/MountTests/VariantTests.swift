import DiskTesting
import Glibc
import Testing

/// Every kind of image that `vdimg create` makes, written through the mount and judged by other programs.
extension MountTests {
    @Suite struct VariantTests {
        /// A kind of image.
        struct Kind: Sendable, CustomTestStringConvertible {
            var variant: String
            var options: [String] = []
            /// qemu-img has a check for sparse images alone.
            var isSparse = true
            /// libvmdk reads no monolithicFlat, no grains of 4 KiB, and a child with zero grains wrongly.
            var isKnownToLibvmdk = true
            var isChild = false
            var testDescription: String { ([variant] + options + (isChild ? ["child"] : [])).joined(separator: " ") }
        }

        static let bases = [
            Kind(variant: "dynamic"),
            Kind(variant: "dynamic", options: ["--block-size", "4K"], isKnownToLibvmdk: false),
            Kind(variant: "dynamic", options: ["--option", "zeroed-grain=on"]),
            Kind(variant: "fixed", isSparse: false, isKnownToLibvmdk: false),
            Kind(
                variant: "fixed", options: ["--option", "preallocation=off"], isSparse: false, isKnownToLibvmdk: false),
            Kind(variant: "split", options: ["--option", "split-size=16M"]),
            Kind(variant: "split-fixed", options: ["--option", "split-size=16M"], isSparse: false),
            Kind(variant: "esx", isSparse: false),
            Kind(variant: "esx-sparse"),
        ]
        static let children = [
            Kind(variant: "dynamic", isChild: true),
            Kind(variant: "dynamic", options: ["--block-size", "8K"], isChild: true),
            Kind(variant: "dynamic", options: ["--option", "zeroed-grain=on"], isKnownToLibvmdk: false, isChild: true),
            Kind(variant: "split", options: ["--option", "split-size=16M"], isChild: true),
            Kind(variant: "esx-sparse", isChild: true),
        ]
        private static let seed = UInt64.random(in: 0...UInt64.max)

        @Test(arguments: bases + children) func writtenThroughTheMount(_ kind: Kind) throws {
            try Stage.use(inMemory: kind.isChild) { stage in
                let size = 40 << 20 + 1536
                var plan = WritePlan(seed: Self.seed, size: size)
                let model = try stage.makeRaw("model.raw", size: size)
                let image = stage.file("image.vmdk")
                if kind.isChild {
                    let parent = stage.file("parent.vmdk")
                    let below = plan.writes(40)
                    try vdimg("create", "--quiet", "--size", "\(size)", parent)
                    try qemuIO(parent, below)
                    try qemuIO(model, format: "raw", below)
                    try tool(
                        [Programs.vdimg, "create", "--quiet", "--variant", kind.variant] + kind.options
                            + ["--parent", parent, image])
                } else {
                    try tool(
                        [Programs.vdimg, "create", "--quiet", "--variant", kind.variant, "--size", "\(size)"]
                            + kind.options + [image])
                }
                for round in 0..<2 {
                    let changes = plan.mixture(60)
                    try qemuIO(model, format: "raw", changes)
                    let disk = try stage.mount(image, "--rw")
                    try qemuIO(disk.file, format: "raw", changes)
                    try expectSameBytes(disk.file, model)
                    try disk.unmount()
                    try expectEqual(image, toRaw: model, checks: kind.isSparse)
                    try tool(Programs.vdimg, "check", image)
                    if round == 0 { try expectLibvmdkAgrees(stage, kind, image, model) }
                }
                try expectSameBytes(stage.convert(image), model)
            }
        }

        private func expectLibvmdkAgrees(_ stage: Stage, _ kind: Kind, _ image: String, _ model: String) throws {
            guard kind.isKnownToLibvmdk else { return }
            let folder = try stage.makeFolder("libvmdk")
            try tool("vmdkmount", image, folder)
            // It shows each image of a chain, with all below it, as a file: the last is the top.
            try expectSameBytes("\(folder)/vmdk\(kind.isChild ? 2 : 1)", model)
            try tool("umount", folder)
        }

        @Test func streamIsReadOnly() throws {
            try Stage.use { stage in
                let image = stage.file("stream.vmdk")
                try vdimg("create", "--quiet", "--variant", "stream", "--size", "20M", image)
                let folder = try stage.makeFolder("disk")
                expectRefused(try attempt(Programs.vdmount, "--rw", image, folder), "vdimg create --parent")
                let disk = try stage.mount(image)
                try expectEqual(image, toRaw: disk.file, checks: false)
                try tool("cmp", "-n", "\(20 << 20)", disk.file, "/dev/zero")
                try disk.unmount()
            }
        }

        /// The way that the refusal names: a snapshot over a compressed image with data.
        @Test func snapshotOverStream() throws {
            try Stage.use { stage in
                let size = 12 << 20
                var plan = WritePlan(seed: Self.seed, size: size)
                let model = try stage.makeRaw("model.raw", size: size)
                try qemuIO(model, format: "raw", plan.writes(30))
                let stream = stage.file("stream.vmdk")
                try tool(
                    "qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", model, stream)
                let child = stage.file("child.vmdk")
                try vdimg("create", "--quiet", "--parent", stream, child)
                let changes = plan.mixture(60)
                try qemuIO(model, format: "raw", changes)
                let disk = try stage.mount(child, "--rw")
                try qemuIO(disk.file, format: "raw", changes)
                try expectSameBytes(disk.file, model)
                try disk.unmount()
                try expectEqual(child, toRaw: model)
            }
        }

        @Test func fullDevice() throws {
            try Stage.use { stage in
                let size = 8 << 20
                var plan = WritePlan(seed: Self.seed, size: size)
                let backing = try stage.makeRaw("device.raw", size: size)
                let model = try stage.makeRaw("model.raw", size: size)
                let device = try stage.attach(backing)
                let image = stage.file("disk.vmdk")
                try vdimg("create", "--quiet", "--variant", "full-device", "--option", "device=\(device)", image)
                let folder = try stage.makeFolder("disk")
                expectRefused(try attempt(Programs.vdmount, image, folder), "--allow-dir")
                let changes = plan.mixture(40)
                try qemuIO(model, format: "raw", changes)
                let disk = try stage.mount(image, at: folder, options: ["--rw", "--allow-dir", "/dev"])
                try qemuIO(disk.file, format: "raw", changes)
                try expectSameBytes(disk.file, model)
                try disk.unmount()
                try stage.detach(device)
                try expectSameBytes(backing, model)
            }
        }

        /// Two partitions, one of which the image shows: the other reads as zeros and stays as it is.
        @Test func partitionedDevice() throws {
            try Stage.use { stage in
                let size = 8 << 20
                let backing = try stage.makeRaw("device.raw", size: size)
                func entry(_ start: Int, _ count: Int) -> [UInt8] {
                    func word(_ value: Int) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) } }
                    return [0, 0, 0, 0, 0x83, 0, 0, 0] + word(start) + word(count)
                }
                try OpenedFile.with(backing, O_WRONLY) { file in
                    let none = [UInt8](repeating: 0, count: 32)
                    _ = try file.write(entry(2048, 4096) + entry(6144, 8192) + none + [0x55, 0xaa], at: 446)
                }
                try qemuIO(backing, format: "raw", "write -P 1 1M 2M", "write -P 2 3M 4M")
                let device = try stage.attach(backing)
                let image = stage.file("disk.vmdk")
                try vdimg(
                    "create", "--quiet", "--variant", "partitioned-device", "--option", "device=\(device)", "--option",
                    "partitions=2", image)
                let disk = try stage.mount(image, "--rw", "--allow-dir", "/dev")
                try qemuIO(
                    disk.file, format: "raw", "read -P 0 1M 2M", "read -P 2 3M 4M", "read -P 0 7M 1M",
                    "write -P 9 4M 1M")
                try tool("cmp", "-n", "512", disk.file, backing)
                try disk.unmount()
                try stage.detach(device)
                try qemuIO(
                    backing, format: "raw", "read -P 1 1M 2M", "read -P 2 3M 1M", "read -P 9 4M 1M", "read -P 2 5M 2M")
            }
        }
    }
}

import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// Chains of the other formats, mounted: what VMDK's tests show of the daemon is not repeated for each.
    @Suite struct FormatTests {
        /// What qemu-img calls a format.
        private static func peer(_ format: String) -> String { format == "vhd" ? "vpc" : format }

        /// A file system is made on a child, filled, and is still right after kill -9, by our reading and our checker's
        /// word, and where a peer can read chains of the format, by its.
        @Test(arguments: ["vdi", "vhd", "vhdx", "qed", "qcow2"]) func fileSystemOnAChild(_ format: String) throws {
            try Stage.use { stage in
                let base = stage.file("base.\(format)")
                try vdimg("create", "--quiet", "--size", "64M", base)
                let first = try stage.mount(base, "--rw")
                try tool("mkfs.ext4", "-q", first.file)
                try first.unmount()
                let sum = try tool("sha256sum", base)
                let child = stage.file("child.\(format)")
                try vdimg("create", "--quiet", "--parent", base, child)
                try fill(stage, child)
                #expect(try tool("sha256sum", base) == sum)
                try vdimg("check", "--chain", child)
                if ["qed", "qcow2"].contains(format) {
                    try tool("qemu-img", "check", "-q", "-f", format, child)
                    let last = try stage.mount(child)
                    try tool("qemu-img", "compare", "-q", "-f", format, "-F", "raw", child, last.file)
                    try last.unmount()
                }
            }
        }

        private func fill(_ stage: Stage, _ image: String) throws {
            let disk = try stage.mount(image, "--rw")
            let files = try stage.makeFolder("files")
            try tool("mount", "-o", "loop", disk.file, files)
            try tool("cp", "-r", "/etc/default", "\(files)/copy")
            try tool("fstrim", files)
            try tool("umount", files)
            try tool("sync", disk.file)
            kill(disk.pid, SIGKILL)
            expectEventually { !isRunning(disk.pid) }
            try tool(Programs.vdumount, disk.mountpoint)
            let again = try stage.mount(image, "--rw")
            try tool("e2fsck", "-fn", again.file)
            try tool("mount", "-o", "loop", again.file, files)
            try tool("diff", "-r", "/etc/default", "\(files)/copy")
            try tool("umount", files)
            try again.unmount()
        }

        /// The bytes of a disk whose sectors have 4096: what is said of it, and a file system that knows.
        @Test func sectorsOfFourKilobytes() throws {
            try Stage.use { stage in
                let image = stage.file("disk.vhdx")
                try vdimg(
                    "create", "--quiet", "--size", "400M", "--block-size", "1M", "--option", "logical-sector-size=4096",
                    image
                )
                #expect(try vdimg("info", image).contains("losetup --sector-size 4096"))
                let place = try stage.makeMountpoint()
                let result = try attempt(Programs.vdmount, "--rw", image, place)
                #expect(result.status == 0 && result.errorText.contains("losetup --sector-size 4096"), "\(result)")
                let device = try stage.attach("\(place)/disk.raw", "--sector-size", "4096")
                #expect(try tool("blockdev", "--getss", device) == "4096\n")
                try tool("mkfs.xfs", "-q", device)
                try stage.detach(device)
                try tool(Programs.vdumount, place)
                let folder = try stage.makeFolder("files")
                let mounted = try attempt(Programs.vdmount, "--fs", "--rw", image, folder)
                #expect(mounted.status == 0 && mounted.errorText.isEmpty, "\(mounted)")
                try writeFile("\(folder)/hello", "hello")
                try tool(Programs.vdumount, folder)
                try vdimg("check", image)
                try tool(Programs.vdmount, "--fs", image, folder)
                #expect(contents(of: "\(folder)/hello") == "hello")
                try tool(Programs.vdumount, folder)
            }
        }

        @Test func internalSnapshot() throws {
            try Stage.use { stage in
                let image = stage.file("disk.qcow2")
                try tool("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
                try qemuIO(image, format: "qcow2", "write -P 1 0 64k")
                try tool("qemu-img", "snapshot", "-c", "before update", image)
                try qemuIO(image, format: "qcow2", "write -P 2 0 64k")
                let sum = try tool("sha256sum", image)
                for options in [["--snapshot", "before update"], ["-o", "ro,snapshot=1"]] {
                    let disk = try stage.mount(image, at: stage.makeMountpoint(), options: options)
                    try qemuIO(disk.file, format: "raw", readOnly: true, "read -P 1 0 64k")
                    try disk.unmount()
                }
                #expect(try tool("sha256sum", image) == sum)
                let place = try stage.makeMountpoint()
                expectRefused(
                    try attempt(Programs.vdmount, "--snapshot", "other", image, place), "disk.qcow2",
                    "has no internal snapshot 'other'")
                #expect(try attempt(Programs.vdmount, "--rw", "--snapshot", "1", image, place).status == 64)
            }
        }

        /// A VHD whose geometry and current size differ: its creator, QEMU, means the geometry.
        @Test func sizeOfAVHD() throws {
            try Stage.use { stage in
                let image = stage.file("disk.vhd")
                try tool("qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=fixed", image, "10M")
                let program = """
                    import struct, sys
                    with open(sys.argv[1], "r+b") as file:
                        file.seek(-512, 2)
                        footer = bytearray(file.read(512))
                        size = struct.unpack_from(">Q", footer, 48)[0]
                        struct.pack_into(">Q", footer, 48, size - 2560)
                        footer[64:68] = bytes(4)
                        struct.pack_into(">I", footer, 64, ~sum(footer) & 0xffffffff)
                        file.seek(-512, 2)
                        file.write(footer)
                        print(size, end="")
                    """
                let geometry = Int(try tool("python3", "-c", program, image)) ?? 0
                for (options, size) in [
                    ([], geometry), (["--vhd-size", "chs"], geometry), (["-o", "vhd-size=current"], geometry - 2560),
                ] {
                    let disk = try stage.mount(image, at: stage.makeMountpoint(), options: ["-o", "ro"] + options)
                    #expect(try FileStatus(disk.file).size == size, "\(options)")
                    try disk.unmount()
                }
                #expect(try attempt(Programs.vdmount, "--vhd-size", "both", image, stage.path).status == 64)
            }
        }
    }
}

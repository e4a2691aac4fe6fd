import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// `--overlay`: a disk that can be written, and images that stay as they are.
    @Suite struct ScratchOverlayTests {
        @Test(arguments: ["vmdk", "raw", "stream"]) func imagesStayAsTheyAre(_ kind: String) throws {
            try Stage.use { stage in
                let size = 32 << 20
                var image = stage.file("disk.raw")
                let raw = try stage.makeRaw("disk.raw", size: size)
                try qemuIO(raw, format: "raw", "write -P 5 0 8M")
                if kind != "raw" {
                    image = stage.file("disk.vmdk")
                    let options = kind == "stream" ? ["-o", "subformat=streamOptimized"] : []
                    try tool(["qemu-img", "convert", "-f", "raw", "-O", "vmdk"] + options + [raw, image])
                }
                let before = try tool("sha256sum", raw, image)
                let disk = try stage.mount(image, "--overlay", "--overlay-dir", stage.path)
                let device = try stage.attach(disk.file)
                try tool("mkfs.ext4", "-q", "-F", device)
                let folder = try stage.mountFileSystem(device)
                try tool("cp", "-r", "/etc/default", "\(folder)/copy")
                try tool("diff", "-r", "/etc/default", "\(folder)/copy")
                try stage.unmountFileSystem(folder)
                try tool("e2fsck", "-fn", device)
                try stage.detach(device)
                try disk.unmount()
                #expect(try tool("sha256sum", raw, image) == before)
                let again = try stage.mount(image, "-o", "overlay,overlay-dir=\(stage.path)")
                try qemuIO(again.file, format: "raw", "read -P 5 0 8M", "write -P 6 0 1M")
                try again.unmount()
                #expect(try tool("sha256sum", raw, image) == before)
            }
        }

        @Test func aFileIsKept() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 16 << 20)
                try qemuIO(image, "write -P 5 0 8M")
                let before = contents(of: image)
                let kept = stage.file("kept")
                let disk = try stage.mount(image, "--overlay=\(kept)")
                try qemuIO(disk.file, format: "raw", "write -P 6 1M 1M", "discard 3M 1M", "flush")
                // One overlay has one writer.
                expectRefused(
                    try attempt(Programs.vdmount, "--overlay=\(kept)", image, stage.makeFolder("other")), kept,
                    "in use by process")
                kill(disk.pid, SIGKILL)
                expectEventually { !isRunning(disk.pid) }
                try tool(Programs.vdumount, disk.mountpoint)
                let again = try stage.mount(image, "--overlay=\(kept)")
                try qemuIO(
                    again.file, format: "raw", "read -P 5 0 1M", "read -P 6 1M 1M", "read -P 0 3M 1M", "read -P 5 4M 4M"
                )
                try again.unmount()
                #expect(contents(of: image) == before)
                #expect(try FileStatus(kept).mode == 0o600)
                let said = try tool(Programs.vdimg, "info", kept)
                #expect(said.contains("overlay") && said.contains("disk.vmdk"), "\(said)")
                try tool(Programs.vdimg, "check", kept)
                let other = try stage.makeImage("other.vmdk", size: 16 << 20)
                expectRefused(
                    try attempt(Programs.vdmount, "--overlay=\(kept)", other, stage.makeFolder("another")), kept,
                    "was made over")
            }
        }

        /// A full file system below the overlay is ENOSPC for who writes, and nothing else.
        @Test func fullOverlayDisk() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 64 << 20)
                try qemuIO(image, "write -P 5 0 64M")
                let small = try stage.makeFolder("small")
                try tool("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small)
                defer { _ = try? attempt("umount", small) }
                let disk = try stage.mount(image, "--overlay", "--overlay-dir", small)
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    var failure: Int32 = 0
                    var written = 0
                    while failure == 0, written < 64 << 20 {
                        do {
                            _ = try file.write([UInt8](repeating: 9, count: 1 << 20), at: written)
                            written += 1 << 20
                        } catch let error as SystemFailure { failure = error.code }
                    }
                    #expect(failure == ENOSPC && written >= 4 << 20, "\(failure) after \(written)")
                    #expect(try file.read(at: 0, count: written) == [UInt8](repeating: 9, count: written))
                    #expect(try file.read(at: 60 << 20, count: 4096) == [UInt8](repeating: 5, count: 4096))
                    // Space that is given back can be used.
                    try tool("fallocate", "--punch-hole", "--keep-size", "-o", "0", "-l", "4M", disk.file)
                    try file.sync()
                    _ = try file.write([UInt8](repeating: 8, count: 1 << 20), at: 50 << 20)
                }
                try disk.unmount()
                try qemuIO(image, "read -P 5 0 64M")
            }
        }
    }
}

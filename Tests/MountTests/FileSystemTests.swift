import DiskTesting
import Glibc
import Testing

extension Stage {
    /// Mounts a file system from a device in a new folder.
    func mountFileSystem(_ device: String, _ options: String = "rw") throws -> String {
        let folder = try makeFolder("fs-\(device.split(separator: "/").last ?? "")-\(options)")
        try tool("mount", "-o", options, device, folder)
        return folder
    }

    /// Unmounts a file system and removes its folder.
    func unmountFileSystem(_ folder: String) throws {
        try tool("umount", folder)
        unsafe rmdir(folder)
    }
}

/// File systems on a disk that lies over a snapshot.
extension MountTests {
    @Suite struct FileSystemTests {
        @Test(arguments: ["off", "on"]) func copiedTree(directLoop: String) throws {
            try Stage.use { stage in
                let size = 96 << 20
                var plan = WritePlan(seed: 2, size: size)
                let base = try stage.makeImage("base.vmdk", size: size)
                try qemuIO(base, plan.writes(80))
                let before = try stage.fingerprint()
                let child = try stage.makeSnapshot("child.vmdk", of: base)
                try tool("sh", "-c", "head -c 9000001 /dev/urandom > '\(stage.file("large"))'")

                let disk = try stage.mount(child, "--rw")
                var device = try stage.attach(disk.file, "--direct-io=\(directLoop)")
                // Without discards: what the file system does not write still comes from below.
                try tool("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)
                var folder = try stage.mountFileSystem(device)
                try tool("cp", "-a", "/usr/include/linux", stage.file("large"), folder)
                try tool("sync", "-f", folder)
                try stage.unmountFileSystem(folder)
                try tool("e2fsck", "-fn", device)
                try stage.detach(device)
                try tool("cp", "--sparse=always", disk.file, stage.file("copy.raw"))
                try disk.unmount()
                try expectEqual(child, toRaw: stage.file("copy.raw"))

                let again = try stage.mount(child)
                device = try stage.attach(again.file, "--read-only")
                folder = try stage.mountFileSystem(device, "ro")
                try tool("diff", "-r", "--no-dereference", "/usr/include/linux", "\(folder)/linux")
                try expectSameBytes("\(folder)/large", stage.file("large"))
                try stage.unmountFileSystem(folder)
                try stage.detach(device)
                try again.unmount()
                unsafe unlink(child)
                #expect(try stage.fingerprint() == before)
            }
        }

        /// The shortest way: mount(8) makes the loop device itself.
        @Test func mountWithLoopOption() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 16 << 20)
                let disk = try stage.mount(image, "--rw")
                try tool("mkfs.ext4", "-q", "-F", disk.file)
                let folder = try stage.makeFolder("fs")
                try tool("mount", "-o", "loop", disk.file, folder)
                try writeFile("\(folder)/hello", "hello")
                try tool("umount", folder)
                try disk.unmount()
                let again = try stage.mount(image)
                try tool("mount", "-o", "loop,ro", again.file, folder)
                #expect(contents(of: "\(folder)/hello") == "hello")
                try tool("umount", folder)
                try again.unmount()
            }
        }
    }
}

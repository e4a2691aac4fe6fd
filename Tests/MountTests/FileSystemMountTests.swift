import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// `vdmount --fs`: from an image to the files in one command, and back.
    @Suite(.serialized) struct FileSystemMountTests {
        /// An image of partitions, each with what a command makes of a file.
        private func makeImage(_ stage: Stage, _ table: String, _ makers: [[String]]) throws -> String {
            let raw = try stage.makeRaw("source.raw", size: 700 << 20)
            try tool("sh", "-c", "printf '%s\\n' '\(table)' | sfdisk --quiet --no-tell-kernel '\(raw)'")
            let starts = try tool("sh", "-c", "sfdisk --json '\(raw)' | grep -o '\"start\": [0-9]*' | grep -o '[0-9]*'")
                .split(separator: "\n").compactMap { Int($0) }
            for (start, maker) in zip(starts, makers) where !maker.isEmpty {
                let part = try stage.makeRaw("part.raw", size: 320 << 20)
                try tool(maker + [part])
                try tool(
                    "dd", "if=\(part)", "of=\(raw)", "bs=1M", "seek=\(start >> 11)", "conv=notrunc,sparse",
                    "status=none")
                try tool("rm", part)
            }
            let image = stage.file("disk.vmdk")
            try tool("qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, image)
            return image
        }

        private static let two = "label: gpt\nsize=320M\nsize=320M"

        private func expectNothingLeft(_ stage: Stage, _ image: String) throws {
            #expect(stage.mounts().isEmpty)
            #expect(stage.privateTargets().isEmpty)
            try qemuIO(image, "write -P 0 699M 512")
        }

        @Test(arguments: ["ext4", "xfs", "btrfs", "ext2"]) func readAndWritten(_ kind: String) throws {
            try Stage.use { stage in
                let image = try makeImage(stage, Self.two, [["mkswap", "--quiet"], ["mkfs.\(kind)", "-q"]])
                let folder = try stage.makeFolder("files")
                try tool(Programs.vdmount, "--fs", "--rw", "-o", "noatime,noexec", image, folder)
                let options = try tool("findmnt", "--noheadings", "--output", "VFS-OPTIONS", folder)
                #expect(options.contains("noatime") && options.contains("noexec"), "\(options)")
                try tool("cp", "-r", "/etc/default", "\(folder)/copy")
                #expect(try tool("findmnt", "--noheadings", "--output", "FSTYPE", folder) == "\(kind)\n")
                #expect(try tool(Programs.vdmount, "--list").contains("files \(folder)"))
                expectRefused(try attempt(Programs.vdmount, "--fs", image, folder), folder, "mounted here already")
                #expect(try attempt(Programs.vdmount, "--fs", "-o", "uid=1", image, folder).status == 64)
                try tool(Programs.vdumount, folder)
                try expectNothingLeft(stage, image)
                let before = try tool("sha256sum", image)
                try tool(Programs.vdmount, "--fs=2", image, folder)
                try tool("diff", "-r", "/etc/default", "\(folder)/copy")
                #expect(try attempt("touch", "\(folder)/new").status != 0)
                try tool(Programs.vdumount, folder)
                #expect(try tool("sha256sum", image) == before)
                try expectNothingLeft(stage, image)
            }
        }

        /// By the kernel's ntfs3, or where that is missing by ntfs-3g: a process that lets go of its device later.
        @Test func ntfs() throws {
            try Stage.use { stage in
                let image = try makeImage(stage, Self.two, [[], ["mkfs.ntfs", "--quick", "--force", "--quiet"]])
                let folder = try stage.makeFolder("files")
                try tool(Programs.vdmount, "--fs", "--rw", image, folder)
                try tool("cp", "/bin/bash", "\(folder)/large")
                try tool(Programs.vdumount, folder)
                try expectNothingLeft(stage, image)
                let before = try tool("sha256sum", image)
                try tool(Programs.vdmount, "--fs", image, folder)
                try expectSameBytes("\(folder)/large", "/bin/bash")
                #expect(try attempt("touch", "\(folder)/new").status != 0)
                try tool(Programs.vdumount, folder)
                #expect(try tool("sha256sum", image) == before)
                try expectNothingLeft(stage, image)
            }
        }

        /// A journal that was not replayed stays so, and its file system can be read.
        @Test(arguments: ["ext4", "xfs"]) func dirtyJournal(_ kind: String) throws {
            try Stage.use { stage in
                let image = try makeImage(stage, Self.two, [["mkfs.\(kind)", "-q"]])
                let folder = try stage.makeFolder("files")
                try tool(Programs.vdmount, "--fs", "--rw", image, folder)
                try tool("sh", "-c", "echo known > '\(folder)/file'")
                try tool(Programs.vdumount, folder)
                try tool(Programs.vdmount, "--fs", "--rw", image, folder)
                try tool("sh", "-c", "echo more > '\(folder)/other' && sync -f '\(folder)'")
                // The daemon dies under the mounted file system: its journal stays as it was.
                kill(try daemon(of: stage), SIGKILL)
                _ = try attempt("umount", folder)
                _ = try attempt(Programs.vdumount, folder)
                let state = try tool(
                    "sh", "-c",
                    """
                    '\(Programs.vdmount)' '\(image)' '\(stage.makeFolder("disk"))' &&
                    blkid -p -o export '\(stage.file("disk"))/part1.raw'
                    dumpe2fs -h '\(stage.file("disk"))/part1.raw' 2>/dev/null | grep features
                    '\(Programs.vdumount)' '\(stage.file("disk"))'
                    """)
                #expect(state.contains("TYPE=\(kind)"))
                if kind == "ext4" { #expect(state.contains("needs_recovery"), "\(state)") }
                let before = try tool("sha256sum", image)
                try tool(Programs.vdmount, "--fs", image, folder)
                #expect(try tool("cat", "\(folder)/file") == "known\n")
                try tool(Programs.vdumount, folder)
                #expect(try tool("sha256sum", image) == before)
                try expectNothingLeft(stage, image)
            }
        }

        /// The daemon that serves the disk of a file system.
        private func daemon(of stage: Stage) throws -> Int32 {
            let found = processIdentifiers(of: "vdmount", withArgument: { $0.hasPrefix(stage.path + "/") })
            return try #require(found.first)
        }

        @Test func whichPartition() throws {
            try Stage.use { stage in
                let image = try makeImage(stage, Self.two, [["mkfs.ext4", "-q"], ["mkfs.xfs", "-q"]])
                let folder = try stage.makeFolder("files")
                expectRefused(
                    try attempt(Programs.vdmount, "--fs", image, folder), image, "several file systems",
                    "partition 1: ext4; partition 2: xfs", "--fs=N")
                expectRefused(try attempt(Programs.vdmount, "--fs=7", image, folder), image, "no partition 7")
                expectRefused(try attempt(Programs.vdmount, "--fs", image, stage.file("none")), "none", "mkdir")
                expectRefused(try attempt(Programs.vdmount, "--fs", stage.file("no.vmdk"), folder), "no such file")
                expectRefused(try attempt(Programs.vdmount, "--fs", "-f", image, folder), status: 64, "background")
                try tool(Programs.vdmount, "-o", "fs=2,ro", image, folder)
                #expect(try tool("findmnt", "--noheadings", "--output", "FSTYPE", folder) == "xfs\n")
                try tool(Programs.vdumount, folder)
                // What mount(8) refuses takes everything back.
                try qemuIO(image, "write -P 255 1052672 4096")
                expectRefused(try attempt(Programs.vdmount, "--fs=1", image, folder), "vdmount: \(folder): mount: ")
                try expectNothingLeft(stage, image)
            }
        }

        /// Without root, as root of a user namespace, and without loop devices: what it takes is said.
        @Test func whatItTakes() throws {
            try Stage.use { stage in
                let raw = try stage.makeRaw("disk.raw", size: 16 << 20)
                try tool("mkfs.ext4", "-q", raw)
                let folder = try stage.makeFolder("files")
                // The folder of the test may be root's alone.
                let words = [Programs.vdmount, "--fs", raw, folder]
                let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search"]
                expectRefused(
                    try attempt(["setpriv", "--ambient-caps=+dac_read_search"] + user + words), folder, "needs root;")
                expectRefused(
                    try attempt(["unshare", "--user", "--map-root-user", "--mount"] + words), folder,
                    "root outside of user namespaces")
                let devices =
                    "mount -t tmpfs none /dev && mknod /dev/fuse c 10 229 && mknod /dev/null c 1 3 && exec \"$@\""
                expectRefused(
                    try attempt(["unshare", "--mount", "sh", "-c", devices, "sh"] + words), "disk.raw",
                    "cannot attach a loop device", "/dev/loop-control")
                #expect(stage.privateTargets().isEmpty)
                #expect(stage.mounts().isEmpty)
            }
        }

        /// A disk without partitions; in use; unmounted by other means; its daemon killed.
        @Test func endings() throws {
            try Stage.use { stage in
                let raw = try stage.makeRaw("disk.raw", size: 64 << 20)
                try tool("mkfs.ext4", "-q", raw)
                let folder = try stage.makeFolder("files")
                let overlay = ["--overlay-dir", stage.path, "--overlay"]
                try tool([Programs.vdmount, "--fs"] + overlay + [raw, folder])
                try tool("sh", "-c", "echo text > '\(folder)/file'")
                let user = try stage.start("sh", "-c", "cd '\(folder)' && exec sleep 60")
                expectEventually { (try? tool("readlink", "/proc/\(user.pid)/cwd")) == "\(folder)\n" }
                expectRefused(try attempt(Programs.vdumount, folder), folder, "in use by process")
                _ = try user.end(SIGKILL)
                expectRefused(
                    try attempt("sh", "-c", "cd '\(folder)' && exec '\(Programs.vdumount)' '\(folder)'"), folder,
                    "in use by this program", "cd elsewhere")
                try tool(Programs.vdumount, folder)
                // Umount(8) knows whom to call, if we are installed; here it does its own part.
                try tool(Programs.vdmount, "--fs", raw, folder)
                #expect(contents(of: "/run/mount/utab").contains("TARGET=\(folder) ROOT=/ OPTS=helper=fuse.vdmount"))
                try tool("umount", "-i", folder)
                try tool(Programs.vdumount, folder)
                try tool(Programs.vdmount, "--fs", raw, folder)
                try tool(Programs.vdumount, folder)
                #expect(!contents(of: "/run/mount/utab").contains(folder))
                #expect(stage.privateTargets().isEmpty)
                try tool(Programs.vdmount, "--fs", raw, folder)
                kill(try daemon(of: stage), SIGKILL)
                expectEventually { (try? tool(Programs.vdmount, "--list").contains("dead, its")) == true }
                #expect(try tool(Programs.vdmount, "--list").contains("files \(folder)\n"))
                _ = try attempt(Programs.vdumount, folder)
                #expect(stage.privateTargets().isEmpty)
                #expect(stage.mounts().isEmpty)
            }
        }
    }
}

import DiskTesting
import Glibc
import Testing

/// Where disks are mounted, and how mounts end.
extension MountTests {
    @Suite struct MountpointTests {
        private func image(_ stage: Stage) throws -> String {
            let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
            try qemuIO(image, "write -P 7 0 4M")
            return image
        }

        /// Checks that nothing of a writable mount is left: no mount, no daemon, no mark in the image, no lock.
        private func expectEnded(_ stage: Stage, _ disk: MountedDisk, _ image: String) throws {
            #expect(stage.mounts().isEmpty)
            expectEventually { !isRunning(disk.pid) }
            try tool(Programs.vdimg, "check", image)
            try qemuIO(image, "write -P 1 0 512")
        }

        @Test func folder() throws {
            try Stage.use { stage in
                let disk = try stage.mount(image(stage))
                #expect(try tool("ls", disk.mountpoint) == "disk.raw\ninfo.json\n")
                #expect(try FileStatus(disk.mountpoint).mode == 0o500)
                let info = try tool("findmnt", "--noheadings", "--output", "FSTYPE,SOURCE,OPTIONS", disk.mountpoint)
                #expect(info.contains("fuse.vdmount") && info.contains(stage.file("disk.vmdk")) && info.contains("ro,"))
                let space = try tool("stat", "--file-system", "-c", "%b %S", disk.mountpoint).split(separator: " ")
                let blocks = space.compactMap { Int($0.prefix { $0 != "\n" }) }
                #expect(blocks.count == 2 && blocks[0] * blocks[1] == 4 << 20)
                try disk.unmount()
                #expect(try tool("ls", disk.mountpoint) == "")
            }
        }

        @Test(arguments: [false, true]) func regularFile(writable: Bool) throws {
            try Stage.use { stage in
                let image = try image(stage)
                try writeFile(stage.file("place"), "what was here before")
                let options = writable ? ["--rw"] : []
                let disk = try stage.mount(image, at: stage.file("place"), options: options)
                #expect(disk.file == stage.file("place"))
                #expect(try FileStatus(disk.file).size == 4 << 20)
                #expect(try FileStatus(disk.file).mode == (writable ? 0o600 : 0o400))
                try qemuIO(disk.file, format: "raw", readOnly: true, "read -P 7 0 4M")
                if writable { try qemuIO(disk.file, format: "raw", "write -P 8 1M 1M") }
                let device = try stage.attach(disk.file, writable ? "--direct-io=off" : "--read-only")
                try tool("cmp", device, disk.file)
                try stage.detach(device)
                try disk.unmount()
                #expect(contents(of: stage.file("place")) == "what was here before")
                if writable { try qemuIO(image, "read -P 7 0 1M", "read -P 8 1M 1M", "read -P 7 2M 2M") }
            }
        }

        /// The disk in the place of its own image, as QEMU's exports can be.
        @Test func overTheImageItself() throws {
            try Stage.use { stage in
                let image = try image(stage)
                let disk = try stage.mount(image, at: image, options: ["--rw"])
                #expect(try FileStatus(image).size == 4 << 20)
                try qemuIO(image, format: "raw", "read -P 7 0 4M", "write -P 8 1M 1M")
                try disk.unmount()
                try qemuIO(image, "read -P 7 0 1M", "read -P 8 1M 1M", "read -P 7 2M 2M")
            }
        }

        /// Names with blanks and other letters, links, relative paths.
        @Test func oddNames() throws {
            try Stage.use { stage in
                let odd = "a b\\c,d=\"é\" 中"
                let folder = try stage.makeFolder(odd)
                let base = try stage.makeImage("\(odd)/base.vmdk", size: 4 << 20)
                try qemuIO(base, "write -P 7 0 4M")
                let place = try stage.makeFolder("\(odd)/disk")
                var disk = try stage.mount(base, at: place)
                try qemuIO(disk.file, format: "raw", readOnly: true, "read -P 7 0 4M")
                try disk.unmount()

                try tool("env", "-C", folder, Programs.vdmount, "base.vmdk", "disk/")
                try qemuIO("\(place)/disk.raw", format: "raw", readOnly: true, "read -P 7 0 4M")
                try tool("env", "-C", folder, Programs.vdumount, "disk/")

                try tool("ln", "-s", place, stage.file("link"))
                try tool("ln", "-s", base, stage.file("image-link"))
                try tool(Programs.vdmount, stage.file("image-link"), stage.file("link"))
                try qemuIO("\(place)/disk.raw", format: "raw", readOnly: true, "read -P 7 0 4M")
                disk = try MountedDisk(at: stage.file("link"))
                try disk.unmount()
                #expect(stage.mounts().isEmpty)
            }
        }

        @Test func placesThatCannotBe() throws {
            try Stage.use { stage in
                let image = try image(stage)
                let missing = stage.file("missing")
                expectRefused(try attempt(Programs.vdmount, image, missing), missing, "mkdir")
                expectRefused(
                    try attempt(Programs.vdmount, image, "/dev/null"), "/dev/null",
                    "neither a folder nor a regular file")
                let disk = try stage.mount(image)
                let again = try attempt(Programs.vdmount, image, disk.mountpoint)
                expectRefused(again, disk.mountpoint, "mounted here already", "vdumount \(disk.mountpoint)")
                try disk.unmount()
                let unmounted = try attempt(Programs.vdumount, disk.mountpoint)
                expectRefused(unmounted, disk.mountpoint, "not mounted")
                expectRefused(try attempt(Programs.vdumount, missing), missing)
                expectRefused(try attempt(Programs.vdumount, "/proc"), "/proc", "not of vdmount")
            }
        }

        @Test(arguments: [SIGINT, SIGTERM]) func foreground(_ signal: Int32) throws {
            try Stage.use { stage in
                let image = try image(stage)
                let folder = try stage.makeFolder("disk")
                let program = try stage.start(Programs.vdmount, "--rw", "-f", image, folder)
                expectEventually { (try? FileStatus("\(folder)/disk.raw")) != nil }
                let disk = try MountedDisk(at: folder)
                #expect(disk.pid == program.pid)
                try qemuIO(disk.file, format: "raw", "write -P 9 1M 1M")
                let result = try program.end(signal)
                #expect(result.status == 0, "\(result.errorText)")
                try expectEnded(stage, disk, image)
                try qemuIO(image, "read -P 9 1M 1M")
            }
        }

        /// In the background, and while the disk is in use: served until its last user is gone.
        @Test func signalToBusyDaemon() throws {
            try Stage.use { stage in
                let image = try image(stage)
                let disk = try stage.mount(image, "--rw")
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    kill(disk.pid, SIGTERM)
                    expectEventually { stage.mounts().isEmpty }
                    #expect(try file.write([UInt8](repeating: 3, count: 4096), at: 8192) == 4096)
                    try file.sync()
                    #expect(isRunning(disk.pid))
                }
                expectEventually { !isRunning(disk.pid) }
                try expectEnded(stage, disk, image)
                try qemuIO(image, "read -P 3 8192 4096")
            }
        }

        /// The second signal ends at once, cleanly for the image.
        @Test func secondSignalEndsAtOnce() throws {
            try Stage.use { stage in
                let image = try image(stage)
                let disk = try stage.mount(image, "--rw")
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    _ = try file.write([UInt8](repeating: 3, count: 4096), at: 8192)
                    kill(disk.pid, SIGTERM)
                    expectEventually { stage.mounts().isEmpty }
                    kill(disk.pid, SIGTERM)
                    expectEventually { !isRunning(disk.pid) }
                    #expect(throws: SystemFailure(ENOTCONN)) { try file.write([1], at: 0) }
                }
                try expectEnded(stage, disk, image)
                try qemuIO(image, "read -P 3 8192 4096")
            }
        }

        @Test(arguments: [["umount"], ["fusermount3", "-u"], ["umount", "--lazy"]])
        func otherWaysToUnmount(_ command: [String]) throws {
            try Stage.use { stage in
                let image = try image(stage)
                let disk = try stage.mount(image, "--rw")
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    _ = try file.write([UInt8](repeating: 3, count: 65536), at: 8192)
                }
                try tool(command + [disk.mountpoint])
                // Whoever wants to wait for the close can: vdumount does, or says that all is done.
                let waited = try attempt(Programs.vdumount, disk.mountpoint)
                if waited.status != 0 { expectRefused(waited, "not mounted") }
                #expect(try OpenedFile.with(image) { try $0.read(at: 72, count: 1) } == [0], "the unclean mark")
                try expectEnded(stage, disk, image)
                try qemuIO(image, "read -P 3 8192 65536")
            }
        }

        /// Seen at two places, it is closed when the last one goes.
        @Test func boundElsewhere() throws {
            try Stage.use { stage in
                let image = try image(stage)
                let disk = try stage.mount(image, "--rw")
                let other = try stage.makeFolder("other")
                try tool("mount", "--bind", disk.mountpoint, other)
                let first = try attempt(Programs.vdumount, disk.mountpoint)
                #expect(first.status == 0 && first.errorText.contains(other), "\(first.errorText)")
                try qemuIO("\(other)/disk.raw", format: "raw", "write -P 3 0 2M")
                try tool(Programs.vdumount, other)
                #expect(try OpenedFile.with(image) { try $0.read(at: 72, count: 1) } == [0], "the unclean mark")
                try expectEnded(stage, disk, image)
            }
        }

        /// `vdumount --all`, in a mount namespace where nobody else's disks are to be seen.
        @Test func all() throws {
            try Stage.use { stage in
                let image = try image(stage)
                let script = """
                    set -e
                    findmnt --noheadings --raw --output TARGET --types fuse.vdmount | while read -r other; do
                        umount --lazy "$other"
                    done
                    "$1/vdmount" "$2" "$3"
                    "$1/vdmount" "$2" "$4"
                    [ "$(findmnt --noheadings --types fuse.vdmount | wc -l)" = 2 ]
                    "$1/vdumount" --all
                    [ "$(findmnt --noheadings --types fuse.vdmount | wc -l)" = 0 ]
                    "$1/vdumount" --all
                    """
                let result = try attempt(
                    "unshare", "--mount", "sh", "-c", script, "sh", Programs.folder, image, stage.makeFolder("one"),
                    stage.makeFolder("two"))
                #expect(result.status == 0 && result.errors.isEmpty, "\(result.errorText)")
                try qemuIO(image, "write -P 1 0 512")
            }
        }

        @Test func busyWithLoopDevice() throws {
            try Stage.use { stage in
                let disk = try stage.mount(image(stage), "--rw")
                let device = try stage.attach(disk.file)
                expectRefused(
                    try attempt(Programs.vdumount, disk.mountpoint), disk.mountpoint, device,
                    "losetup --detach \(device)")
                try tool("mkfs.ext4", "-q", "-F", device)
                let folder = try stage.mountFileSystem(device)
                expectRefused(try attempt(Programs.vdumount, disk.mountpoint), device, "mounted at \(folder)")
                try stage.unmountFileSystem(folder)
                try stage.detach(device)
                try disk.unmount()
            }
        }

        @Test func busyWithProcess() throws {
            try Stage.use { stage in
                let disk = try stage.mount(image(stage))
                let user = try stage.start("sh", "-c", "exec sleep 60 < '\(disk.file)'")
                expectEventually { contents(of: "/proc/\(user.pid)/comm") == "sleep\n" }
                let refused = try attempt(Programs.vdumount, disk.mountpoint)
                expectRefused(refused, disk.mountpoint, "process \(user.pid) (sleep)")
                try user.end(SIGKILL)
                try disk.unmount()
            }
        }

        @Test func severalAtOnce() throws {
            try Stage.use { stage in
                let image = try image(stage)
                let disks = try (0..<4).map { _ in try stage.mount(image) }
                try tool([Programs.vdumount] + disks.map(\.mountpoint))
                #expect(stage.mounts().isEmpty)
            }
        }

        /// A user who is not root, through fusermount3. Where /dev/fuse is for root alone, he sees another one. Root
        /// may use his disk where the system lets users allow it; otherwise one line says how.
        @Test(arguments: [true, false]) func ordinaryUser(mayAllowOthers: Bool) throws {
            try Stage.use { stage in
                let image = try image(stage)
                let folder = try stage.makeFolder("disk")
                try tool("chown", "-R", "65534:65534", stage.path)
                try tool("mknod", "-m", "666", stage.file("fuse"), "c", "10", "229")
                try writeFile(stage.file("fuse.conf"), mayAllowOthers ? "# a comment\nuser_allow_other\n" : "")
                try tool("chmod", "644", stage.file("fuse.conf"))
                // The capability: the programs and the Swift runtime may lie where that user cannot go.
                let script = """
                    set -e
                    mount --bind "$2" /dev/fuse
                    mount --bind "$2.conf" /etc/fuse.conf
                    user() {
                        setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search \
                            --ambient-caps=+dac_read_search "$@"
                    }
                    user "$1/vdmount" --rw "$3" "$4"
                    user stat -c '%s %a %u %g' "$4/disk.raw"
                    user qemu-io -f raw -c 'read -P 7 0 4M' -c 'write -P 1 0 1M' "$4/disk.raw" > /dev/null
                    if cmp -n 512 "$4/disk.raw" "$4/disk.raw"; then
                        device="$(losetup --find --show --read-only "$4/disk.raw")"
                        cmp "$device" "$4/disk.raw" && echo seen
                        losetup --detach "$device"
                        sleep 0.2
                    fi
                    user "$1/vdumount" "$4"
                    user "$1/vdmount" "$3" "$4" 2> /dev/null
                    "$1/vdumount" "$4"
                    """
                let result = try attempt(
                    "unshare", "--mount", "sh", "-c", script, "sh", Programs.folder, stage.file("fuse"), image, folder)
                #expect(result.status == 0, "\(result.errorText)")
                #expect(result.outputText == "\(4 << 20) 600 65534 65534\n" + (mayAllowOthers ? "seen\n" : ""))
                if mayAllowOthers {
                    #expect(result.errorText.isEmpty)
                } else {
                    // One line of ours, then what cmp says to root.
                    let lines = result.errorText.split(separator: "\n")
                    #expect(lines.count == 2, "\(result.errorText)")
                    #expect(lines.first?.contains("user_allow_other") == true)
                    #expect(lines.first?.contains("/etc/fuse.conf") == true)
                }
                try qemuIO(image, "read -P 1 0 1M", "read -P 7 1M 3M")
            }
        }
    }
}

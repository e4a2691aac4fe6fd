import DiskTesting
import Glibc
import Testing

/// One writer or several readers, whichever program they are.
extension MountTests {
    @Suite struct LockTests {
        private func holder(_ pid: Int32, _ name: String) -> String { "process \(pid) (\(name)" }

        @Test func secondWriterIsToldWhoHoldsTheImage() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                let disk = try stage.mount(image, "--rw")
                let other = try stage.makeFolder("other")
                let refused = try attempt(Programs.vdmount, "--rw", image, other)
                expectRefused(refused, image, holder(disk.pid, "vdmount"))
                expectRefused(try attempt(Programs.vdmount, image, other), image, holder(disk.pid, "vdmount"))
                let repair = try attempt(Programs.vdimg, "check", "--repair", image)
                expectRefused(repair, holder(disk.pid, "vdmount"))
                // To look at it is always possible.
                #expect(try vdimg("info", image).contains("4 MiB"))
                #expect(stage.mounts().count == 1)
                try disk.unmount()
                try stage.mount(image, "--rw").unmount()
            }
        }

        @Test func qemuRespectsAWriter() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 4 << 20)
                let child = try stage.makeSnapshot("child.vmdk", of: base)
                let disk = try stage.mount(child, "--rw")
                let commands = [
                    ["qemu-img", "check", child], ["qemu-img", "info", child],
                    ["qemu-io", "-f", "vmdk", "-c", "write 0 512", child],
                    ["qemu-io", "-r", "-f", "vmdk", "-c", "read 0 512", child],
                    ["qemu-io", "-f", "vmdk", "-c", "write 0 512", base], ["qemu-img", "resize", base, "8M"],
                ]
                for command in commands {
                    let result = try attempt(command)
                    #expect(
                        result.status != 0 && result.errorText.contains("Failed to get"),
                        "\(command): \(result.errorText)")
                }
                try tool("qemu-img", "info", "--force-share", child)
                // Others may read the base.
                try tool("qemu-img", "check", base)
                try stage.mount(base).unmount()
                let folder = try stage.makeFolder("other")
                expectRefused(try attempt(Programs.vdmount, "--rw", base, folder), holder(disk.pid, "vdmount"))
                try disk.unmount()
                try qemuIO(child, "write 0 512")
            }
        }

        @Test func readersShare() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                try qemuIO(image, "write -P 5 0 4M")
                let disks = try (0..<3).map { _ in try stage.mount(image) }
                try tool("qemu-img", "check", "-q", image)
                for disk in disks { try qemuIO(disk.file, format: "raw", readOnly: true, "read -P 5 0 4M") }
                let write = try attempt("qemu-io", "-f", "vmdk", "-c", "write 0 512", image)
                #expect(
                    write.status != 0 && write.errorText.contains("Failed to get \"write\" lock"), "\(write.errorText)")
                let folder = try stage.makeFolder("other")
                let refused = try attempt(Programs.vdmount, "--rw", image, folder)
                expectRefused(refused, "(vdmount)", "cannot be opened for writing")
                for disk in disks { try disk.unmount() }
                try qemuIO(image, "write 0 512")
            }
        }

        @Test func writerInQemuIO() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                let child = try stage.makeSnapshot("child.vmdk", of: image)
                let writer = try stage.start("qemu-io", "-f", "vmdk", "-c", "write 0 512", "-c", "sleep 60000", image)
                try expectEventually { try attempt("qemu-img", "info", image).status != 0 }
                let folder = try stage.makeFolder("disk")
                for option in ["rw", "ro"] {
                    let refused = try attempt(Programs.vdmount, "-o", option, image, folder)
                    expectRefused(refused, image, holder(writer.pid, "qemu-io"))
                }
                expectRefused(try attempt(Programs.vdmount, child, folder), holder(writer.pid, "qemu-io"))
                try writer.end(SIGKILL)
                try stage.mount(image, at: folder, options: ["--rw"]).unmount()
            }
        }

        @Test func writerInQemuStorageDaemon() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                try writeFile(stage.file("export"), "")
                let daemon = try stage.start(
                    "qemu-storage-daemon", "--blockdev", "driver=file,node-name=file,filename=\(image)", "--blockdev",
                    "driver=vmdk,node-name=disk,file=file", "--export",
                    "type=fuse,id=export,node-name=disk,mountpoint=\(stage.file("export")),writable=on")
                try expectEventually { try FileStatus(stage.file("export")).size == 4 << 20 }
                let folder = try stage.makeFolder("disk")
                expectRefused(try attempt(Programs.vdmount, image, folder), holder(daemon.pid, "qemu-storage"))
                try daemon.end(SIGTERM)
                try stage.mount(image, at: folder).unmount()
            }
        }

        /// Each extent is locked: another descriptor that lists it is no way around.
        @Test func extentsAreLocked() throws {
            try Stage.use { stage in
                for (number, subformat) in ["twoGbMaxExtentSparse", "monolithicFlat"].enumerated() {
                    let image = try stage.makeImage("disk\(number).vmdk", size: 4 << 20, subformat: subformat)
                    let copy = stage.file("copy\(number).vmdk")
                    try tool("cp", image, copy)
                    let disk = try stage.mount(image, "--rw")
                    let folder = try stage.makeFolder("other\(number)")
                    let refused = try attempt(Programs.vdmount, "--rw", copy, folder)
                    expectRefused(refused, holder(disk.pid, "vdmount"))
                    let write = try attempt("qemu-io", "-f", "vmdk", "-c", "write 0 512", copy)
                    #expect(write.status != 0 && write.errorText.contains("Failed to get"), "\(write.errorText)")
                    try disk.unmount()
                }
            }
        }

        /// When `vdumount` returns, the image is free.
        @Test func freeAtOnceAfterUnmount() throws {
            try Stage.use(inMemory: true) { stage in
                let image = try stage.makeImage("disk.vmdk", size: 64 << 20)
                for round in 1...10 {
                    let disk = try stage.mount(image, "--rw")
                    try OpenedFile.with(disk.file, O_WRONLY) { file in
                        _ = try file.write([UInt8](repeating: UInt8(round), count: 4 << 20), at: round << 22)
                    }
                    try disk.unmount()
                    #expect(try OpenedFile.with(image) { try $0.read(at: 72, count: 1) } == [0], "the unclean mark")
                    try qemuIO(image, "read -P \(round) \(round << 22) 4M", "write -P 1 0 512")
                }
            }
        }

        /// Whoever is first gets it, and nobody else.
        @Test(arguments: [true, false]) func atTheSameMoment(samePlace: Bool) throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                let place = try stage.makeMountpoint()
                let places = try (0..<4).map { _ in samePlace ? place : try stage.makeMountpoint() }
                for _ in 0..<4 {
                    // Readers share an image, but not a place; writers share neither.
                    let mode = samePlace ? "ro" : "rw"
                    let programs = try places.map { try stage.start(Programs.vdmount, "-o", mode, image, $0) }
                    let results = try programs.map { try $0.wait() }
                    #expect(results.count { $0.status == 0 } == 1)
                    for result in results where result.status != 0 {
                        expectRefused(result, samePlace ? "mounted here already" : "is in use by process")
                    }
                    #expect(stage.mounts().count == 1)
                    for mount in stage.mounts() { try tool(Programs.vdumount, mount.path) }
                }
            }
        }
    }
}

import DiskTesting
import Glibc
import Testing

/// A kind of image whose chains are changed while they are mounted.
struct MountedKind: Sendable, CustomTestStringConvertible {
    let format: String
    /// What QEMU calls it.
    let peer: String
    var options: [String] = []
    /// Whether `qemu-img check` knows it.
    var isChecked = true
    var testDescription: String { ([format] + options).joined(separator: " ") }

    static let all = [
        MountedKind(format: "vmdk", peer: "vmdk"),
        MountedKind(format: "vmdk", peer: "vmdk", options: ["--variant", "split", "--option", "split-size=8M"]),
        MountedKind(format: "vmdk", peer: "vmdk", options: ["--variant", "fixed"]),
        MountedKind(format: "qcow2", peer: "qcow2"), MountedKind(format: "vhdx", peer: "vhdx"),
        MountedKind(format: "vdi", peer: "vdi"), MountedKind(format: "vhd", peer: "vpc", isChecked: false),
        MountedKind(format: "qed", peer: "qed"),
    ]

    func file(_ name: String) -> String { "\(name).\(format)" }

    /// A new image.
    func make(_ stage: Stage, _ name: String, size: Int) throws -> String {
        let path = stage.file(file(name))
        try tool([Programs.vdimg, "create", "--quiet", "--size", "\(size)"] + options + [path])
        return path
    }

    /// What an image shows is what the file holds, and the image is in order, as QEMU and as we see it.
    func expect(
        _ image: String, _ model: String, _ sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let checked = try attempt(Programs.vdimg, "check", image)
        #expect(checked.status == 0, "\(checked.outputText)\(checked.errorText)", sourceLocation: sourceLocation)
        if isChecked, !options.contains("fixed") {
            let result = try attempt("qemu-img", "check", "-f", peer, image)
            #expect(result.status == 0, "\(result.outputText)\(result.errorText)", sourceLocation: sourceLocation)
        }
        let result = try attempt("qemu-img", "compare", "-f", peer, "-F", "raw", image, model)
        #expect(result.status == 0, "\(result.outputText)\(result.errorText)", sourceLocation: sourceLocation)
    }
}

extension MountTests {
    /// Snapshots and merges of a disk that is mounted, while a guest works on it.
    @Suite struct MountedChainTests {
        private static let size = 32 << 20

        private func expectImages(
            _ disk: MountedDisk, _ images: [String], _ sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            #expect(try disk.images() == images, sourceLocation: sourceLocation)
            let text = contents(of: "\(disk.mountpoint)/info.json")
            for image in images { #expect(text.contains("\"\(image)\""), sourceLocation: sourceLocation) }
        }

        /// Snapshots on top of snapshots, then all merged again, in each direction, with a guest that writes.
        @Test(arguments: MountedKind.all) func changesUnderAGuest(_ kind: MountedKind) throws {
            try Stage.use { stage in
                let base = try kind.make(stage, "disk", size: Self.size)
                let model = try stage.makeRaw("model", size: Self.size)
                let disk = try stage.mount(base, "--rw")
                let names = [base] + (1...3).map { stage.file(kind.file("disk-00\($0)")) }
                let guest = try Guest(stage, on: disk, model: model, isWriting: true)
                for number in 0..<3 {
                    usleep(200_000)
                    let said = try vdimg("snapshot", names[number])
                    #expect(
                        said
                            == "\(names[number + 1]): over \(names[number]), on top of the disk at \(disk.mountpoint)\n"
                    )
                }
                try expectImages(disk, names.reversed())
                usleep(200_000)
                try vdimg("merge", "--quiet", names[3], "--from", "1", "--to", "2")
                try expectImages(disk, [names[3], names[1], names[0]])
                try vdimg("merge", "--quiet", names[3], "--from", names[0], "--to", names[1])
                try expectImages(disk, [names[3], names[1]])
                try vdimg("merge", "--quiet", names[3])
                try expectImages(disk, [names[1]])
                for name in [names[0], names[2], names[3]] {
                    #expect(throws: SystemFailure(ENOENT)) { try FileStatus(name) }
                }
                // The names are free again; all of them go into the lowest.
                for name in [names[1], names[2]] {
                    try vdimg("snapshot", "--quiet", name)
                    usleep(100_000)
                }
                try expectImages(disk, [names[3], names[2], names[1]])
                try vdimg("merge", "--quiet", names[3], "--to", names[1])
                try expectImages(disk, [names[1]])
                usleep(100_000)
                try guest.end()
                try expectMoreIsRefused(disk, names[1])
                try disk.unmount()
                try kind.expect(names[1], model)
                let again = try stage.mount(names[1])
                try expectSameBytes(again.file, model)
                try again.unmount()
            }
        }

        /// The new images are as locked as the old ones were.
        private func expectMoreIsRefused(_ disk: MountedDisk, _ image: String) throws {
            let place = try attempt(Programs.vdmount, "--rw", image, disk.mountpoint + "/..")
            #expect(place.status != 0)
            let writer = try attempt("qemu-io", "-f", "raw", "-c", "write 0 512", image)
            #expect((writer.outputText + writer.errorText).contains("lock"), "\(writer.outputText)\(writer.errorText)")
        }

        /// What was merged or put on top leaves nothing open, and nothing locked, that is none of the disk's any more.
        @Test func descriptorsDoNotGather() throws {
            try Stage.use { stage in
                let base = try MountedKind.all[1].make(stage, "disk", size: Self.size)
                let disk = try stage.mount(base, "--rw")
                let top = stage.file("disk-001.vmdk")
                try vdimg("snapshot", "--quiet", base)
                try vdimg("merge", "--quiet", top)
                let count = try disk.descriptorCount()
                for _ in 0..<5 {
                    try vdimg("snapshot", "--quiet", base)
                    try vdimg("merge", "--quiet", top)
                }
                #expect(try disk.descriptorCount() == count)
                try disk.unmount()
            }
        }

        /// A read-only mount goes on while its images are merged. A snapshot is made over its top image, to be used
        /// elsewhere.
        @Test(arguments: MountedKind.all) func readOnlyMounts(_ kind: MountedKind) throws {
            try Stage.use { stage in
                let base = try kind.make(stage, "disk", size: Self.size)
                let model = try stage.makeRaw("model", size: Self.size)
                let writable = try stage.mount(base, "--rw")
                let writer = try Guest(stage, on: writable, model: model, isWriting: true)
                let names = [base] + (1...3).map { stage.file(kind.file("disk-00\($0)")) }
                for name in names.dropLast() {
                    usleep(150_000)
                    try vdimg("snapshot", "--quiet", name)
                }
                usleep(150_000)
                try writer.end()
                try writable.unmount()

                let disk = try stage.mount(names[3])
                let guest = try Guest(stage, on: disk, model: model, isWriting: false)
                for arguments in [["--from", "2", "--to", "1"], ["--from", "1", "--to", "2"], []] {
                    try tool([Programs.vdimg, "merge", "--quiet", names[3]] + arguments)
                }
                try expectImages(disk, [base])
                let said = try vdimg("snapshot", base)
                #expect(said == "\(names[1]): over \(base)\n")
                try expectImages(disk, [base])
                let other = try stage.mount(names[1], "--rw")
                try qemuIO(other.file, format: "raw", "write -P 9 0 1M")
                try other.unmount()
                try guest.end()
                try expectSameBytes(disk.file, model)
                try disk.unmount()
                try kind.expect(base, model)
            }
        }

        @Test func keptFilesStay() throws {
            try Stage.use { stage in
                let kind = MountedKind.all[0]
                let base = try kind.make(stage, "disk", size: 4 << 20)
                let disk = try stage.mount(base, "--rw")
                let said = try vdimg("snapshot", "--comment", "before", base, stage.file("new.vmdk"))
                #expect(said.hasPrefix(stage.file("new.vmdk")))
                try qemuIO(disk.file, format: "raw", "write -P 7 1M 1M")
                let text = try vdimg("merge", "--keep", stage.file("new.vmdk"))
                #expect(text.contains("merged into \(base)") && text.contains("not needed any more"))
                #expect(try FileStatus(stage.file("new.vmdk")).size > 1 << 20)
                try disk.unmount()
                try qemuIO(base, readOnly: true, "read -P 7 1M 1M")
            }
        }

        /// The new image belongs to whom the old one belongs to.
        @Test func ownerAndModeOfSnapshots() throws {
            try Stage.use { stage in
                let base = try MountedKind.all[0].make(stage, "disk", size: 4 << 20)
                try tool("chown", "1234:4321", base)
                try tool("chmod", "640", base)
                let disk = try stage.mount(base, "--rw")
                try vdimg("snapshot", "--quiet", base)
                let status = try FileStatus(stage.file("disk-001.vmdk"))
                #expect(status.owner == 1234 && status.group == 4321 && status.mode == 0o640)
                try disk.unmount()
            }
        }

        @Test(arguments: ["--no-sandbox", "--foreground"]) func otherDaemons(_ option: String) throws {
            try Stage.use { stage in
                let kind = MountedKind.all[1]
                let base = try kind.make(stage, "disk", size: 16 << 20)
                let model = try stage.makeRaw("model", size: 16 << 20)
                let place = try stage.makeMountpoint()
                if option == "--foreground" {
                    _ = try stage.start(Programs.vdmount, option, "--rw", base, place)
                    expectEventually { (try? FileStatus("\(place)/disk.raw")) != nil }
                } else {
                    try tool(Programs.vdmount, option, "--rw", base, place)
                }
                let disk = try MountedDisk(at: place)
                let guest = try Guest(stage, on: disk, model: model, isWriting: true)
                try vdimg("snapshot", "--quiet", base)
                usleep(200_000)
                try vdimg("snapshot", "--quiet", stage.file("disk-001.vmdk"))
                usleep(200_000)
                try vdimg("merge", "--quiet", stage.file("disk-002.vmdk"), "--from", "1")
                try expectImages(disk, [stage.file("disk-002.vmdk"), base])
                try vdimg("merge", "--quiet", stage.file("disk-002.vmdk"))
                try guest.end()
                try disk.unmount()
                try kind.expect(base, model)
            }
        }

        /// The disk of a user who is not root: he changes its chain, and root does, who then is that user; another user
        /// does not.
        @Test func disksOfUsers() throws {
            try Stage.use { stage in
                let base = try MountedKind.all[1].make(stage, "disk", size: 16 << 20)
                let folder = try stage.makeMountpoint()
                try tool("chown", "-R", "65534:65534", stage.path)
                try tool("mknod", "-m", "666", stage.file("fuse"), "c", "10", "229")
                // The capability: the programs and the Swift runtime may lie where that user cannot go.
                let script = """
                    set -e
                    mount --bind "$2" /dev/fuse
                    as() {
                        user=$1; shift
                        setpriv --reuid=$user --regid=$user --clear-groups --inh-caps=+dac_read_search \
                            --ambient-caps=+dac_read_search "$@"
                    }
                    as 65534 "$1/vdmount" --rw "$3.vmdk" "$4" 2> /dev/null
                    as 65534 "$1/vdimg" snapshot --quiet "$3.vmdk"
                    as 65534 qemu-io -f raw -c "write -P 2 2M 1M" "$4/disk.raw" > /dev/null
                    if as 1234 "$1/vdimg" snapshot --quiet "$3-001.vmdk"; then exit 9; fi
                    "$1/vdimg" snapshot --quiet "$3-001.vmdk"
                    as 65534 qemu-io -f raw -c "write -P 3 3M 1M" "$4/disk.raw" > /dev/null
                    stat -c '%u %g' "$3-001.vmdk" "$3-002.vmdk"
                    "$1/vdimg" merge --quiet "$3-002.vmdk" --from 1
                    as 65534 "$1/vdimg" merge --quiet "$3-002.vmdk"
                    as 65534 "$1/vdumount" "$4"
                    ls "$3"-0* 2> /dev/null || true
                    """
                let result = try attempt(
                    "unshare", "--mount", "sh", "-c", script, "sh", Programs.folder, stage.file("fuse"),
                    stage.file("disk"), folder)
                #expect(result.status == 0, "\(result.errorText)")
                #expect(result.outputText == "65534 65534\n65534 65534\n", "\(result.outputText)")
                try qemuIO(base, readOnly: true, "read -P 2 2M 1M", "read -P 3 3M 1M")
            }
        }
    }
}

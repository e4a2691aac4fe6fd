import DiskTesting
import Glibc
import Testing

/// Options, messages and exit statuses.
extension MountTests {
    @Suite struct CommandLineTests {
        @Test func exitStatuses() throws {
            try Stage.use { stage in
                for program in [Programs.vdmount, Programs.vdumount, Programs.vdimg] {
                    for option in ["--help", "-h", "--version"] {
                        let result = try attempt(program, option)
                        #expect(result.status == 0 && !result.output.isEmpty && result.errors.isEmpty)
                    }
                    #expect(try attempt(program, "--no-such-option").status == 64)
                }
                let folder = try stage.makeFolder("disk")
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                #expect(try attempt(Programs.vdmount).status == 64)
                #expect(try attempt(Programs.vdmount, image).status == 64)
                #expect(try attempt(Programs.vdumount).status == 64)
                #expect(try attempt(Programs.vdmount, "--lanes", "0", image, folder).status == 64)
                #expect(try attempt(Programs.vdmount, "--log-level", "loud", image, folder).status == 64)
                #expect(try attempt(Programs.vdimg, "create", stage.file("x.vmdk")).status == 64)
                let missing = stage.file("missing.vmdk")
                expectRefused(try attempt(Programs.vdmount, missing, folder), missing, "no such file")
                for command in ["info", "map", "check"] {
                    expectRefused(try attempt(Programs.vdimg, command, missing), missing, "no such file")
                }
                expectRefused(try attempt(Programs.vdmount, folder, folder), folder)
                expectRefused(try attempt(Programs.vdmount, "/dev/null", folder), "/dev/null")
                expectRefused(try attempt(Programs.vdmount, "--format", "vhdy", image, folder), "vhdy")
                #expect(stage.mounts().isEmpty)
            }
        }

        @Test func listOfOptions() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                func status(_ options: String) throws -> FileStatus {
                    let disk = try stage.mount(image, "-o", options)
                    defer { _ = try? disk.unmount() }
                    return try FileStatus(disk.file)
                }
                #expect(try status("ro").mode == 0o400)
                #expect(try status("rw").mode == 0o600)
                #expect(try status("rw,ro").mode == 0o400)
                #expect(
                    try status("rw,noatime,nofail,noauto,_netdev,x-systemd.automount,x-foo,allow_other").mode == 0o600)
                let other = try status("ro,uid=65534,gid=7,umask=027")
                #expect(other.mode == 0o440 && other.owner == 65534 && other.group == 7)
                #expect(try status("rw,umask=0").mode == 0o666)
                #expect(try status("format=vmdk,allow-dir=/tmp,log-level=debug,table-cache=1M,lanes=2").size == 1 << 20)
                let folder = try stage.makeFolder("refused")
                for options in [
                    "ro,no-such", "uid=me", "umask=9", "format=", "allow-dir", "lanes=x", "table-cache=many",
                ] {
                    let result = try attempt(Programs.vdmount, "-o", options, image, folder)
                    expectRefused(
                        result, status: 64,
                        options.split(separator: ",").last.map(String.init)?.split(separator: "=").first.map(
                            String.init) ?? "")
                }
                #expect(stage.mounts().isEmpty)
            }
        }

        /// As with mount(8), the list may follow at once.
        @Test func joinedOption() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let disk = try stage.mount(image, "-orw,umask=077")
                #expect(try FileStatus(disk.file).mode == 0o600)
                try disk.unmount()
            }
        }

        /// A caller that closed its standard descriptors: no image gets their numbers.
        @Test(arguments: ["<&-", "<&- >&- 2>&-", ">&-", "2>&-"]) func closedDescriptors(_ closing: String) throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                try qemuIO(image, "write -P 7 0 4M")
                let folder = try stage.makeMountpoint()
                try tool("sh", "-c", "exec '\(Programs.vdmount)' --rw '\(image)' '\(folder)' \(closing)")
                let disk = try MountedDisk(at: folder)
                try qemuIO(disk.file, format: "raw", "read -P 7 0 4M", "write -P 8 1M 1M")
                try disk.unmount()
                try qemuIO(image, "read -P 7 0 1M", "read -P 8 1M 1M", "read -P 7 2M 2M")
                // What fails must not write its message into the image.
                let before = try stage.fingerprint()
                for words in ["check --repair --format vmdk", "check --repair --format raw", "info --chain"] {
                    _ = try attempt("sh", "-c", "exec '\(Programs.vdimg)' \(words) '\(image)' \(closing)")
                }
                #expect(try stage.fingerprint() == before)
            }
        }

        /// The daemon keeps nothing open that its caller had: here a lock.
        @Test func inheritedDescriptors() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let folder = try stage.makeMountpoint()
                try tool("flock", stage.file("lock"), Programs.vdmount, image, folder)
                let disk = try MountedDisk(at: folder)
                #expect(try attempt("flock", "--nonblock", stage.file("lock"), "true").status == 0)
                try disk.unmount()
            }
        }

        /// Another user may read what the options let him.
        @Test func otherUsers() throws {
            try Stage.use { stage in
                try tool("chmod", "755", stage.path)
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                func read(_ options: String...) throws -> Int32 {
                    let disk = try stage.mount(image, "-o", options.joined(separator: ","))
                    defer { _ = try? disk.unmount() }
                    let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
                    return try attempt(user + ["cmp", "-n", "4096", disk.file, "/dev/zero"]).status
                }
                #expect(try read("ro") != 0)
                #expect(try read("ro", "uid=65534") == 0)
                #expect(try read("ro", "umask=022") == 0)
                #expect(try read("ro", "umask=027") != 0)
                #expect(try read("ro", "umask=027", "gid=65534") == 0)
            }
        }

        /// As fstab does it, but for the type: mount(8) looks for the program of fuse.vdmount in system folders alone.
        @Test func mountCommand() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let folder = try stage.makeFolder("disk")
                func mount(_ image: String, _ options: String...) throws -> Subprocess.Result {
                    try attempt(["mount", "-t", "fuse"] + options + ["\(Programs.vdmount)#\(image)", folder])
                }
                var result = try mount(image, "-o", "ro,nofail,x-systemd.requires=nothing,umask=022")
                #expect(result.status == 0, "\(result.errorText)")
                var disk = try MountedDisk(at: folder)
                #expect(try FileStatus(disk.file).mode == 0o444)
                try tool("umount", folder)
                expectEventually { !isRunning(disk.pid) }
                // Without a word, mount(8) means read-write.
                result = try mount(image)
                #expect(result.status == 0, "\(result.errorText)")
                disk = try MountedDisk(at: folder)
                #expect(try FileStatus(disk.file).mode == 0o600)
                try qemuIO(disk.file, format: "raw", "write -P 1 0 64k")
                try tool("umount", folder)
                expectEventually { !isRunning(disk.pid) }
                try qemuIO(image, "read -P 1 0 64k")
                #expect(try mount(image, "-o", "no-such").status != 0)
                #expect(try mount(stage.file("missing")).status != 0)
                #expect(stage.mounts().isEmpty)
            }
        }

        @Test func formatByName() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 8 << 20)
                var disk = try stage.mount(image, "--format", "raw")
                let size = try FileStatus(image).size
                #expect(try FileStatus(disk.file).size == size)
                try expectSameBytes(disk.file, image)
                try disk.unmount()
                disk = try stage.mount(image, "-o", "format=raw")
                #expect(try FileStatus(disk.file).size == size)
                try disk.unmount()

                let raw = try stage.makeRaw("disk.img", size: 1 << 20)
                let folder = try stage.makeFolder("folder")
                expectRefused(try attempt(Programs.vdmount, "--rw", raw, folder), raw, "--format raw")
                expectRefused(try attempt(Programs.vdmount, "--format", "vmdk", raw, folder), raw)
                disk = try stage.mount(raw, "--rw", "--format", "raw")
                try qemuIO(disk.file, format: "raw", "write -P 4 1000 5000")
                try disk.unmount()
                try qemuIO(raw, format: "raw", "read -P 0 0 1000", "read -P 4 1000 5000")
            }
        }

        /// A failure in the foreground is told on standard error as well; the log of the background goes to a file.
        @Test func messagesAndLog() throws {
            try Stage.use { stage in
                let folder = try stage.makeFolder("disk")
                expectRefused(try attempt(Programs.vdmount, "-f", stage.file("missing.vmdk"), folder), "no such file")
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let log = stage.file("log")
                let disk = try stage.mount(image, "--log-file", log, "--log-level", "info")
                expectEventually { contents(of: log).contains(image) }
                try disk.unmount()
                let nowhere = try attempt(Programs.vdmount, "--log-file", "/nowhere/log", image, folder)
                expectRefused(nowhere, "/nowhere/log")
            }
        }

        /// What the image tool says is for programs too.
        @Test func imageTool() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 8 << 20)
                try qemuIO(base, "write -P 1 1M 1M")
                let child = stage.file("child.vmdk")
                try vdimg("create", "--quiet", "--parent", base, child)
                for words in [
                    ["info", "--chain", "--json", child], ["map", "--json", child], ["check", "--json", child],
                    ["formats", "--json"],
                ] {
                    let text = try tool([Programs.vdimg] + words)
                    let result = try Subprocess.run(["python3", "-m", "json.tool"], input: Array(text.utf8))
                    #expect(result.status == 0, "\(words): \(text)")
                }
                #expect(try vdimg("map", child).contains(base))
                expectRefused(try attempt(Programs.vdimg, "create", "--size", "1M", base), base, "exists")
                #expect(try FileStatus(base).size > 1 << 20)
                expectRefused(
                    try attempt(Programs.vdimg, "create", "--variant", "round", "--size", "1M", stage.file("x.vmdk")),
                    "round")
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus(stage.file("x.vmdk")) }
            }
        }

        /// What was printed and did not arrive makes the command fail: the answer is not complete.
        @Test func outputThatIsLost() throws {
            try Stage.use { stage in
                let image = "'\(try stage.makeImage("disk.vmdk", size: 1 << 20))'"
                let commands = [
                    "info \(image)", "info --json \(image)", "map \(image)", "map --json \(image)",
                    "map --svg - \(image)",
                    "check \(image)", "check --json \(image)", "compare --quiet --json \(image) \(image)",
                    "measure --quiet --format qcow2 \(image)", "convert --quiet --to raw \(image) -", "formats",
                    "formats --json", "--help", "check --help", "--version",
                ]
                for words in commands {
                    let result = try attempt("sh", "-c", "exec '\(Programs.vdimg)' \(words) >/dev/full")
                    let status: Int32 = words.hasPrefix("compare") ? 2 : 1
                    expectRefused(result, status: status, "cannot write to standard output", "No space left")
                }
                // Who closes the pipe early wants no more.
                let head = try attempt("sh", "-c", "'\(Programs.vdimg)' map \(image) | head -c 10")
                #expect(head.status == 0 && head.output.count == 10 && head.errors.isEmpty)
            }
        }

        /// What goes to standard output is what was asked for, or nothing.
        @Test func streamsAreWhatWasAskedFor() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                try qemuIO(image, "write -P 7 0 1M")
                let out = stage.file("out")
                func convert(_ words: String) throws -> Subprocess.Result {
                    try attempt("sh", "-c", "exec '\(Programs.vdimg)' convert --quiet \(words) '\(image)' - >'\(out)'")
                }
                #expect(try convert("--to raw --size 3M").status == 0)
                #expect(try FileStatus(out).size == 3 << 20)
                #expect(try convert("--to vmdk --variant stream --option adapter-type=lsilogic").status == 0)
                #expect(try vdimg("info", out).contains("lsilogic"))
                for words in [
                    "--to raw --size 1K", "--to raw --variant fixed", "--to raw --option a=b",
                    "--to raw --block-size 4K",
                    "--to vmdk --variant fixed", "--to vmdk --option no=such", "--to qcow2",
                ] {
                    let result = try convert(words)
                    let size = try FileStatus(out).size
                    #expect(result.status == 1 && size == 0, "\(words): \(result.errorText)")
                }
                for words in ["--to qcow2 --compress", "--to raw --parent-format raw", "--to raw --verify"] {
                    #expect(try convert(words).status == 64)
                }
                let other = try stage.makeImage("other.vmdk", size: 1 << 20)
                for words in ["--variant fixed", "--compress", "--block-size 4K", "--option a=b"] {
                    let command =
                        [Programs.vdimg, "convert", "--overwrite"] + words.split(separator: " ").map(String.init)
                    #expect(try attempt(command + [image, other]).status == 64)
                }
                expectRefused(
                    try attempt(Programs.vdimg, "convert", image, stage.file("")), status: 64, "is a folder")
                let nothing = stage.file("nothing.qcow2")
                expectRefused(
                    try attempt("sh", "-c", "true | '\(Programs.vdimg)' convert --quiet - '\(nothing)'"),
                    "standard input", "holds nothing")
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus(nothing) }
            }
        }

        /// A name that is no text would become another file's.
        @Test func namesThatAreNoText() throws {
            try Stage.use { stage in
                _ = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let before = try stage.fingerprint()
                for program in [Programs.vdimg, Programs.vdmount, Programs.vdumount] {
                    let script = "exec '\(program)' create --size 1M \"$(printf '\(stage.file("x"))\\377.vmdk')\""
                    expectRefused(try attempt("sh", "-c", script), status: 64, "argument 4", "UTF-8")
                }
                #expect(try stage.fingerprint() == before)
            }
        }
    }
}

import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// `vdmount --list` and the control socket behind it.
    @Suite struct ListTests {
        @Test func whatIsMounted() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 8 << 20)
                let child = stage.file("child with space.vmdk")
                try vdimg("create", "--quiet", "--parent", base, child)
                let disk = try stage.mount(child, "--rw")
                try OpenedFile.with(disk.file, O_RDWR | OpenedFile.direct) { file in
                    _ = try file.write([UInt8](repeating: 3, count: 1 << 20), at: 0)
                    _ = try file.read(at: 0, count: 65536)
                    try expectListed(disk, child, base)
                }
                kill(disk.pid, SIGKILL)
                expectEventually { !isRunning(disk.pid) }
                #expect(try tool(Programs.vdmount, "--list").contains("\(disk.mountpoint): dead"))
                try tool(Programs.vdumount, disk.mountpoint)
                #expect(try !tool(Programs.vdmount, "--list").contains(disk.mountpoint))
            }
        }

        private func expectListed(_ disk: MountedDisk, _ child: String, _ base: String) throws {
            let program = """
                import json, sys
                mount = [m for m in json.load(sys.stdin) if m["mountpoint"] == sys.argv[1]][0]
                images = [i["path"] + " " + i["format"] for i in mount["images"]]
                print(mount["state"], mount["mode"], mount["process"], mount["size"], mount["bytes-written"],
                      mount["bytes-read"] >= 65536, mount["cached-bytes"] > 0, mount["dirty-bytes"] >= 0, images)
                """
            let list = try tool(Programs.vdmount, "--list", "--json")
            let said = try Subprocess.run(["python3", "-c", program, disk.mountpoint], input: Array(list.utf8))
            #expect(
                said.outputText
                    == "serving rw \(disk.pid) 8388608 1048576 True True True ['\(child) vmdk', '\(base) vmdk']\n",
                "\(said.outputText)\(said.errorText)")
            let text = try tool(Programs.vdmount, "--list")
            #expect(
                text.contains("\(disk.mountpoint): rw, process \(disk.pid)\n  image \(child) (vmdk)\n  below \(base)"))
        }

        /// An image that was named from where the user stood is found from elsewhere too.
        @Test func pathsAreWhole() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 8 << 20)
                let folder = try stage.makeMountpoint()
                for options in ["", "--overlay=changes"] {
                    try tool(
                        "sh", "-c", "cd '\(stage.path)' && '\(Programs.vdmount)' \(options) disk.vmdk '\(folder)'")
                    let names = options.isEmpty ? [image] : [stage.file("changes"), image]
                    for name in names {
                        #expect(try tool(Programs.vdmount, "--list", "--json").contains("\"path\" : \"\(name)\""))
                        #expect(contents(of: "\(folder)/info.json").contains("\"path\" : \"\(name)\""))
                    }
                    try tool(Programs.vdumount, folder)
                }
            }
        }

        /// What goes through the files of partitions counts too.
        @Test func trafficOfPartitions() throws {
            try Stage.use { stage in
                let disk = try stage.mount(stage.makeImage("disk.vmdk", size: 16 << 20), "--rw")
                try tool("sh", "-c", "printf 'label: dos\\nsize=8M\\n' | sfdisk -q --no-tell-kernel '\(disk.file)'")
                func written() throws -> Int {
                    let list = try tool(Programs.vdmount, "--list", "--json")
                    let program = """
                        import json, sys
                        print(*[m["bytes-written"] for m in json.load(sys.stdin) if m["mountpoint"] == sys.argv[1]])
                        """
                    let said = try Subprocess.run(["python3", "-c", program, disk.mountpoint], input: Array(list.utf8))
                    return try #require(Int(said.outputText.filter { $0 != "\n" }))
                }
                let before = try written()
                try OpenedFile.with("\(disk.mountpoint)/part1.raw", O_RDWR | OpenedFile.direct) { file in
                    _ = try file.write([UInt8](repeating: 3, count: 1 << 20), at: 0)
                }
                #expect(try written() == before + (1 << 20))
                try disk.unmount()
            }
        }

        /// The socket is its owner's alone, does not understand everything, and goes with the mount.
        @Test func controlSocket() throws {
            try Stage.use { stage in
                let disk = try stage.mount(stage.makeImage("disk.vmdk", size: 1 << 20))
                let find = "ls /run/vdmount/*-\(disk.pid).control"
                let socket = try tool("sh", "-c", find).split(separator: "\n").map(String.init)[0]
                #expect(try FileStatus(socket).mode == 0o600)
                let program = """
                    import socket, sys
                    def ask(text):
                        s = socket.socket(socket.AF_UNIX)
                        s.connect(sys.argv[1])
                        s.sendall(text)
                        s.shutdown(socket.SHUT_WR)
                        return s.makefile().read()
                    assert ask(b"status\\n").startswith("ok\\n{"), "status"
                    for text in [b"", b"\\n", b"STATUS\\n", b"x" * 100000, bytes(range(256))]:
                        try:
                            assert ask(text) == "unknown\\n", text
                        except (BrokenPipeError, ConnectionResetError):
                            pass
                    idle = [socket.socket(socket.AF_UNIX) for _ in range(4)]
                    for s in idle:
                        s.connect(sys.argv[1])
                    for s in idle:
                        s.close()
                    assert ask(b"status\\n").startswith("ok\\n{"), "again"
                    """
                try tool("python3", "-c", program, socket)
                let other = try attempt(
                    "setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", program, socket)
                #expect(other.status != 0 && other.errorText.contains("PermissionError"), "\(other.errorText)")
                try disk.unmount()
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus(socket) }
            }
        }

        /// Where somebody else's socket stands in the place of the daemon's, nothing is said to it.
        @Test func socketOfSomebodyElse() throws {
            try Stage.use { stage in
                let disk = try stage.mount(stage.makeImage("disk.vmdk", size: 1 << 20))
                let socket = try tool("sh", "-c", "ls /run/vdmount/*-\(disk.pid).control").split(separator: "\n")
                    .map(String.init)[0]
                try tool("chmod", "711", stage.path)
                let folder = try stage.makeFolder("theirs")
                try tool("chown", "65534", folder)
                let program = """
                    import os, socket, sys
                    s = socket.socket(socket.AF_UNIX)
                    s.bind(sys.argv[1] + "/socket")
                    s.listen()
                    heard = s.accept()[0].makefile().read()
                    open(sys.argv[1] + "/heard", "w").write(heard + "end")
                    """
                let other = try stage.start(
                    "setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", program, folder)
                expectEventually { (try? FileStatus("\(folder)/socket")) != nil }
                try tool("mv", socket, socket + ".kept")
                try tool("ln", "-s", "\(folder)/socket", socket)
                let list = try tool(Programs.vdmount, "--list")
                #expect(list.contains("\(disk.mountpoint): ro, process \(disk.pid)"), "\(list)")
                try tool("mv", socket + ".kept", socket)
                _ = try other.wait()
                #expect(contents(of: "\(folder)/heard") == "end")
                try disk.unmount()
            }
        }

        @Test func wrongUsage() throws {
            for words in [["--list", "x.vmdk"], ["--json"], [], ["x.vmdk"]] {
                expectRefused(try attempt([Programs.vdmount] + words), status: 64, "")
            }
        }
    }
}

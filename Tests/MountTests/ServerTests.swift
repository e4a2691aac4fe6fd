import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// Images on servers: a daemon without a network, and a process beside it that has one.
    @Suite struct ServerTests {
        /// A VMDK with data, and the raw file that it must read as.
        private func makeDisk(_ stage: Stage) throws -> (image: String, raw: String) {
            let image = try stage.makeImage("disk.vmdk", size: 32 << 20)
            try qemuIO(image, "write -P 5 1M 300k", "write -P 6 20M 3M")
            return (image, try stage.convert(image))
        }

        /// The process beside a daemon.
        private func helper(of disk: MountedDisk) throws -> Int32 {
            let found = try tool("pgrep", "-P", "\(disk.pid)", "-f", "storage-process").split(separator: "\n")
            guard found.count == 1, let pid = Int32(found[0]) else { throw TestFailure("no single process: \(found)") }
            return pid
        }

        @Test func imageOnAWebServer() throws {
            try Stage.use { stage in
                let (_, raw) = try makeDisk(stage)
                let server = try TestServer.web(stage.path, ["--user", "me:secret"])
                let address = "http://me:secret@127.0.0.1:\(server.port)/flaky/disk.vmdk?token=secret"
                let disk = try stage.mount(address)
                try expectSameBytes(disk.file, raw)
                // No secret is told to others.
                let list = try tool(Programs.vdmount, "--list", "--json")
                #expect(list.contains("http:\\/\\/me:***@127.0.0.1") || list.contains("http://me:***@127.0.0.1"))
                let table = contents(of: "/proc/self/mountinfo")
                for text in [list, table, contents(of: "\(disk.mountpoint)/info.json")] {
                    #expect(!text.contains("secret"))
                }
                let pid = try helper(of: disk)
                #expect(!contents(of: "/proc/\(pid)/cmdline").contains("secret"))
                let status = contents(of: "/proc/\(pid)/status")
                #expect(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"))
                #expect(status.contains("CapEff:\t0000000000000000"))
                // The daemon has no socket of a network, and its usual filter.
                let sockets = try tool("sh", "-c", "ss -Htanup | grep 'pid=\(disk.pid),' || true")
                #expect(sockets == "")
                #expect(contents(of: "/proc/\(disk.pid)/status").contains("Seccomp:\t2"))
                try disk.unmount()
                expectEventually { !isRunning(pid) }
            }
        }

        @Test func writesOverAWebServer() throws {
            try Stage.use { stage in
                let (image, raw) = try makeDisk(stage)
                let server = try TestServer.web(stage.path)
                let before = try tool("sha256sum", image)
                let address = "http://127.0.0.1:\(server.port)/plain/disk.vmdk"
                expectRefused(
                    try attempt(Programs.vdmount, "--rw", address, stage.makeFolder("no")), "cannot be written")
                let disk = try stage.mount(address, "--overlay=\(stage.file("kept"))")
                try qemuIO(disk.file, format: "raw", "read -P 6 20M 3M", "write -P 9 1M 64k", "flush")
                try disk.unmount()
                let again = try stage.mount(address, "--overlay=\(stage.file("kept"))")
                try qemuIO(again.file, format: "raw", "read -P 9 1M 64k", "read -P 5 1088k 200k")
                try again.unmount()
                #expect(try tool("sha256sum", image) == before)
                let cache = stage.file("cache")
                for _ in 0..<2 {
                    let cached = try stage.mount(address, "--cache", cache, "--cache-size", "16M")
                    try expectSameBytes(cached.file, raw)
                    try cached.unmount()
                }
                let last = try stage.mount(address, "--cache", cache)
                try expectSameBytes(last.file, raw)
                let said = try tool(Programs.vdmount, "--list")
                #expect(said.contains("read from it") && !said.contains("0 bytes read from it"))
                try last.unmount()
            }
        }

        @Test func chainsOnlyWithPermission() throws {
            try Stage.use { stage in
                let (image, _) = try makeDisk(stage)
                let child = try stage.makeSnapshot("child.vmdk", of: image)
                try qemuIO(child, "write -P 7 1M 4k")
                let raw = try stage.convert(child, to: "child.raw")
                let server = try TestServer.web(stage.path, ["--log", stage.file("log")])
                let folder = "http://127.0.0.1:\(server.port)/plain/"
                expectRefused(
                    try attempt(Programs.vdmount, folder + "child.vmdk", stage.makeFolder("no")), "--allow-url")
                #expect(!contents(of: stage.file("log")).contains("disk.vmdk"))
                let disk = try stage.mount(folder + "child.vmdk", "--allow-url", folder)
                try expectSameBytes(disk.file, raw)
                try disk.unmount()
                let said = try vdimg("info", "--chain", "--allow-url", folder, folder + "child.vmdk")
                #expect(said.contains("\(folder)disk.vmdk"))
                try vdimg("check", folder + "disk.vmdk")
                try vdimg("convert", "--allow-url", folder, folder + "child.vmdk", stage.file("copy.qcow2"))
                try tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", stage.file("copy.qcow2"), raw)
                // Wrong options are usage errors, and tell no secret.
                let wrong = try attempt(Programs.vdimg, "info", "--storage-option", "what=secret", folder + "disk.vmdk")
                #expect(wrong.status == 64 && !wrong.errorText.contains("secret"))
            }
        }

        @Test func certificates() throws {
            try Stage.use { stage in
                let (_, raw) = try makeDisk(stage)
                let subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
                let base = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
                try tool(base + subject + ["-keyout", stage.file("key"), "-out", stage.file("cert")])
                let server = try TestServer.web(stage.path, ["--tls", stage.file("cert"), stage.file("key")])
                let address = "https://127.0.0.1:\(server.port)/plain/disk.vmdk"
                expectRefused(
                    try attempt(Programs.vdmount, address, stage.makeFolder("no")), "certificate", "ca-file")
                let disk = try stage.mount(address, "-o", "storage-option=ca-file=\(stage.file("cert"))")
                try expectSameBytes(disk.file, raw)
                try disk.unmount()
            }
        }

        @Test func exportOfNBD() throws {
            try Stage.use { stage in
                let raw = try stage.makeRaw("disk.raw", size: 64 << 20)
                let server = try TestServer.nbd(raw)
                let address = "nbd://127.0.0.1:\(server.port)"
                let disk = try stage.mount(address, "--rw", "--format", "raw")
                let device = try stage.attach(disk.file)
                try tool("mkfs.ext4", "-q", "-F", device)
                let folder = try stage.mountFileSystem(device)
                try tool("cp", "-r", "/etc/default", "\(folder)/copy")
                try stage.unmountFileSystem(folder)
                try stage.detach(device)
                try disk.unmount()
                try tool("e2fsck", "-fn", raw)
                // A format that grows, in an export that does not.
                try tool("qemu-img", "create", "-q", "-f", "qcow2", stage.file("inner.qcow2"), "32M")
                try tool("dd", "if=\(stage.file("inner.qcow2"))", "of=\(raw)", "conv=notrunc", "bs=64k")
                let inner = try stage.mount(address, "--rw")
                var plan = WritePlan(seed: 4, size: 32 << 20)
                let commands = plan.mixture(60)
                try qemuIO(inner.file, format: "raw", commands)
                try inner.unmount()
                let model = try stage.makeRaw("model", size: 32 << 20)
                try qemuIO(model, format: "raw", commands)
                server.stop()
                let check = try attempt("qemu-img", "check", "-f", "qcow2", raw)
                #expect(check.status == 0, "\(check.outputText)\(check.errorText)")
                let compared = try attempt("qemu-img", "compare", "-f", "qcow2", "-F", "raw", raw, model)
                #expect(compared.status == 0, "\(compared.outputText)\(compared.errorText)")
            }
        }

        @Test func diskOfISCSI() throws {
            try Stage.use { stage in
                let raw = try stage.makeRaw("disk.raw", size: 32 << 20)
                let target = try TestTarget(raw, user: "me", password: "twelve-chars")
                let address = "iscsi://me@127.0.0.1:\(target.port)/\(TestTarget.name)/1"
                try tool("sh", "-c", "echo twelve-chars >'\(stage.file("password"))'")
                let disk = try stage.mount(
                    address, "--rw", "--format", "raw", "--storage-option", "password-file=\(stage.file("password"))")
                var plan = WritePlan(seed: 9, size: 32 << 20)
                let commands = plan.mixture(60)
                try qemuIO(disk.file, format: "raw", commands)
                try disk.unmount()
                let model = try stage.makeRaw("model", size: 32 << 20)
                try qemuIO(model, format: "raw", commands)
                target.stop()
                try expectSameBytes(raw, model)
            }
        }

        /// Without a server, or without the process that reaches it, reads fail and nothing hangs.
        @Test func whatGoesAway() throws {
            try Stage.use { stage in
                _ = try makeDisk(stage)
                let server = try TestServer.web(stage.path)
                let address = "http://127.0.0.1:\(server.port)/plain/disk.vmdk"
                let options = ["--storage-option", "timeout=1", "--storage-option", "retries=1"]
                let first = try stage.mount(address, at: stage.makeMountpoint(), options: options)
                let second = try stage.mount(address, at: stage.makeMountpoint(), options: options)
                kill(try helper(of: first), SIGKILL)
                for disk in [first, second] {
                    if disk.pid == second.pid { server.stop() }
                    #expect(throws: SystemFailure(EIO)) {
                        try OpenedFile.with(disk.file, O_RDONLY | OpenedFile.direct) { file in
                            try file.read(at: 22 << 20, count: 1 << 20)
                        }
                    }
                    try disk.unmount()
                }
            }
        }

        /// What ends the daemon leaves its helper alone until everything is written.
        @Test func signalsInTheForeground() throws {
            try Stage.use { stage in
                let raw = try stage.makeRaw("disk.raw", size: 8 << 20)
                let server = try TestServer.nbd(raw)
                let place = try stage.makeMountpoint()
                let program = try stage.start(
                    Programs.vdmount, "-f", "--rw", "--format", "raw", "nbd://127.0.0.1:\(server.port)", place)
                expectEventually { (try? FileStatus("\(place)/disk.raw")) != nil }
                let disk = try MountedDisk(at: place)
                let helper = try helper(of: disk)
                for signal in [SIGINT, SIGTERM, SIGHUP] { kill(helper, signal) }
                try qemuIO(disk.file, format: "raw", "write -P 3 1M 1M")
                #expect(try program.end(SIGTERM).status == 0)
                expectEventually { !isRunning(helper) }
                try qemuIO(raw, format: "raw", "read -P 3 1M 1M")
            }
        }
    }
}

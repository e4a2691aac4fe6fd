import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// What a daemon gives up when it serves. All other tests that mount run confined too.
    @Suite struct ConfinementTests {
        private static let probe = "\(Programs.folder)/ConfinementProbe"

        /// What a program that confined itself can still do: `attempt: result`, of all its threads.
        private func attempts(_ words: [String]) throws -> [String: Set<String>] {
            var results: [String: Set<String>] = [:]
            for line in try tool(words + [Self.probe, "attempt"]).split(separator: "\n") {
                let fields = line.split(separator: " ").map(String.init)
                if fields.count == 3 { results[fields[1], default: []].insert(fields[2]) }
                if fields.first == "missing" { results["missing"] = [fields[1]] }
            }
            return results
        }

        /// Told to open a file, to connect, to execute and much else, a confined program cannot.
        @Test func harmIsRefused() throws {
            var results = try attempts([])
            #expect(results.removeValue(forKey: "missing") == ["0"])
            #expect(results.removeValue(forKey: "read-what-is-open") == ["allowed"])
            #expect(results.count > 60)
            for (name, result) in results { #expect(result == ["EPERM"], "\(name)") }
        }

        /// Each of the two walls holds by itself.
        @Test func landlockAloneKeepsFilesShut() throws {
            let results = try attempts([Self.probe, "without", "seccomp"])
            #expect(results["missing"] == ["2"])
            #expect(results["read-what-is-open"] == ["allowed"])
            for name in ["read-shadow", "read-folder", "new-file", "unnamed-file", "execute"] {
                #expect(results[name] == ["EACCES"], "\(name)")
            }
            #expect(results["signal-parent"] == ["EPERM"])
        }

        @Test func filterAloneKeepsFilesShut() throws {
            let results = try attempts([Self.probe, "without", "landlock"])
            #expect(results["missing"] == ["1"])
            for name in ["read-shadow", "new-file", "execute", "internet", "mount"] {
                #expect(results[name] == ["EPERM"], "\(name)")
            }
        }

        /// What the status of each thread of a process says, after `name:`.
        private func threads(_ pid: Int32, _ name: String) throws -> Set<String> {
            let folders = try tool("ls", "/proc/\(pid)/task").split(separator: "\n")
            let lines = folders.flatMap { contents(of: "/proc/\(pid)/task/\($0)/status").split(separator: "\n") }
            return Set(
                lines.filter { $0.hasPrefix(name + ":") }.map { $0.dropFirst(name.count + 1).filter { $0 != "\t" } })
        }

        private static let none = Set([String(repeating: "0", count: 16)])

        @Test func everyThreadOfTheDaemonIsConfined() throws {
            try Stage.use { stage in
                let disk = try stage.mount(stage.makeImage("disk.vmdk", size: 8 << 20), "--rw")
                try tool(
                    "fio", "--name=load", "--filename=\(disk.file)", "--rw=randrw", "--bs=4k", "--size=8M",
                    "--direct=1",
                    "--ioengine=libaio", "--iodepth=16", "--number_ios=4000", "--output=/dev/null")
                #expect(try threads(disk.pid, "CapEff") == Self.none)
                #expect(try threads(disk.pid, "CapPrm") == Self.none)
                #expect(try threads(disk.pid, "NoNewPrivs") == ["1"])
                #expect(try threads(disk.pid, "Seccomp") == ["2"])
                try disk.unmount()
            }
        }

        @Test func unconfinedWhenAskedFor() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                for option in ["--no-sandbox", "-ono-sandbox"] {
                    let disk = try stage.mount(image, option)
                    #expect(try threads(disk.pid, "CapEff") != Self.none)
                    #expect(try threads(disk.pid, "Seccomp") == ["0"])
                    try disk.unmount()
                }
            }
        }

        @Test(arguments: ["landlock", "seccomp"]) func goesOnWhereTheKernelLacksIt(_ what: String) throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let place = try stage.makeMountpoint()
                let result = try attempt(Self.probe, "without", what, Programs.vdmount, image, place)
                #expect(result.status == 0, "\(result.errorText)")
                #expect(result.errorText.contains("this kernel has no \(what == "landlock" ? "Landlock" : "seccomp")"))
                let disk = try MountedDisk(at: place)
                try tool("cmp", "-n", "1048576", disk.file, "/dev/zero")
                try disk.unmount()
            }
        }

        /// The process that unmounts for the daemon ends with it, however that ends.
        @Test func keeperEndsWithTheDaemon() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let first = try stage.mount(image)
                let keeper = try #require(self.keeper(of: first))
                try first.unmount()
                expectEventually { !isRunning(keeper) }
                let second = try stage.mount(image)
                let other = try #require(self.keeper(of: second))
                kill(second.pid, SIGKILL)
                expectEventually { !isRunning(other) }
            }
        }

        private func keeper(of disk: MountedDisk) -> Int32? {
            processIdentifiers(of: "vd-keeper") { $0 == disk.mountpoint }.first { pid in
                contents(of: "/proc/\(pid)/stat").split(separator: " ").dropFirst(3).first == "\(disk.pid)"
            }
        }

        /// Without it the daemon cannot unmount, says so, loses nothing, and `vdumount` can.
        @Test func keeperIsKilled() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let log = stage.file("log")
                let disk = try stage.mount(image, "--rw", "--log-file", log)
                kill(try #require(keeper(of: disk)), SIGKILL)
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    _ = try file.write([UInt8](repeating: 7, count: 4096), at: 8192)
                }
                kill(disk.pid, SIGTERM)
                expectEventually { contents(of: log).contains("'vdumount' can") }
                #expect(isRunning(disk.pid))
                try disk.unmount()
                expectEventually { !isRunning(disk.pid) }
                try qemuIO(image, readOnly: true, "read -P 7 8192 4096")
            }
        }
    }
}

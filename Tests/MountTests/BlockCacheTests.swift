import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// `--cache`: what was read from images is read from a file beside them the next time.
    @Suite struct BlockCacheTests {
        private static let size = 24 << 20

        /// A chain of two images with random bytes, and the disk that it is.
        private func makeChain(_ stage: Stage) throws -> (child: String, expected: String) {
            let raw = stage.file("content")
            try tool("dd", "if=/dev/urandom", "of=\(raw)", "bs=1M", "count=\(Self.size >> 20)", "status=none")
            let base = stage.file("base.vmdk")
            try tool("qemu-img", "convert", "-O", "vmdk", raw, base)
            let child = try stage.makeSnapshot("child.vmdk", of: base)
            try qemuIO(child, "write -P 7 3M 2M")
            return (child, try stage.convert(child))
        }

        @Test func isUsedAgain() throws {
            try Stage.use { stage in
                let (child, expected) = try makeChain(stage)
                let cache = stage.file("cache.vci")
                for round in 0..<3 {
                    // As an option, as mount(8) gives it, and with a file that is there.
                    let words = [
                        ["--cache", cache, "--cache-size", "64M"], ["-o", "cache=\(cache),cache-size=64M"],
                        ["--cache=\(cache)"],
                    ][round]
                    let result = try attempt([Programs.vdmount] + words + [child, stage.makeFolder("\(round)")])
                    #expect(result.status == 0 && result.errorText.isEmpty, "\(result.errorText)")
                    let disk = try MountedDisk(at: stage.file("\(round)"))
                    try tool("cmp", expected, disk.file)
                    let list = try tool(Programs.vdmount, "--list", "--json")
                    #expect(list.contains("\"cache-file\" : \"\(cache)\""))
                    #expect(list.contains("\"cache-miss-bytes\" : 0,") == (round > 0), "\(round): \(list)")
                    #expect(try tool(Programs.vdimg, "cache", "info", cache).contains("in use") == (round == 0))
                    try disk.unmount()
                    let said = try tool(Programs.vdimg, "cache", "info", cache)
                    #expect(said.contains("24 MiB in 384 extents") && said.contains("64 MiB"), "\(said)")
                    #expect(try tool(Programs.vdimg, "cache", "check", cache).contains("no problems"))
                }
                #expect(try FileStatus(cache).mode == 0o600)
            }
        }

        /// Confined, for a disk that is written too, with a file that takes its space at once; killed in the middle.
        @Test(arguments: ["--rw", "--overlay"]) func belowWhatIsWritten(_ option: String) throws {
            try Stage.use { stage in
                let (child, expected) = try makeChain(stage)
                let cache = stage.file("cache.vci")
                try tool(Programs.vdimg, "cache", "create", "--quiet", "--fixed", "--size", "8M", cache)
                let disk = try stage.mount(child, option, "--cache", cache)
                try tool("cmp", expected, disk.file)
                try qemuIO(disk.file, format: "raw", "write -P 9 10M 1M", "read -P 9 10M 1M", "read -P 7 3M 2M")
                kill(disk.pid, SIGKILL)
                expectEventually { !isRunning(disk.pid) }
                try tool(Programs.vdumount, disk.mountpoint)
                let checked = try attempt(Programs.vdimg, "cache", "check", cache)
                #expect(checked.status == 2 && checked.outputText.contains("not closed cleanly"), "\(checked)")
                let place = try stage.makeFolder("again")
                let result = try attempt(Programs.vdmount, option, "--cache", cache, child, place)
                #expect(result.status == 0 && result.errorText.contains("not closed cleanly: emptied"))
                let again = try MountedDisk(at: place)
                let ninth = option == "--rw" ? 9 : nil
                if let ninth { try qemuIO(again.file, format: "raw", "read -P \(ninth) 10M 1M", "read -P 7 3M 2M") }
                try tool("cmp", "-n", "\(10 << 20)", expected, again.file)
                try again.unmount()
                try tool(Programs.vdimg, "cache", "check", cache)
            }
        }

        /// One mount has it; another goes on without. A file that is none stops a mount, as does nothing else.
        @Test func whoCannotHaveIt() throws {
            try Stage.use { stage in
                let (child, expected) = try makeChain(stage)
                let cache = stage.file("cache.vci")
                let disk = try stage.mount(child, "--cache", cache)
                let place = try stage.makeFolder("second")
                let second = try attempt(Programs.vdmount, "--cache", cache, child, place)
                #expect(second.status == 0 && second.errorText.contains("in use by process \(disk.pid)"))
                #expect(second.errorText.split(separator: "\n").count == 1, "\(second.errorText)")
                try tool("cmp", expected, "\(place)/disk.raw")
                try MountedDisk(at: place).unmount()
                expectRefused(try attempt(Programs.vdimg, "cache", "drop", cache), cache, "in use")
                try disk.unmount()
                try tool(Programs.vdimg, "cache", "drop", cache)
                #expect(try tool(Programs.vdimg, "cache", "info", "--json", cache).contains("\"extents\" : 0"))

                try writeFile(stage.file("letters"), "not a cache")
                expectRefused(
                    try attempt(Programs.vdmount, "--cache", stage.file("letters"), child, stage.makeFolder("other")),
                    stage.file("letters"), "is no block cache")
                #expect(contents(of: stage.file("letters")) == "not a cache")
                // Damage empties it.
                try OpenedFile.with(cache, O_RDWR) { file in _ = try file.write([1, 2, 3], at: 1024) }
                let damaged = try attempt(Programs.vdmount, "--cache", cache, child, place)
                #expect(damaged.status == 0, "\(damaged.errorText)")
                try tool("cmp", expected, "\(place)/disk.raw")
                try MountedDisk(at: place).unmount()
                try tool(Programs.vdimg, "cache", "check", cache)
            }
        }

        /// A cache on a file system that is full: one line in the log, and the disk is whole.
        @Test func fullFileSystem() throws {
            try Stage.use { stage in
                let (child, expected) = try makeChain(stage)
                let small = try stage.makeFolder("small")
                try tool("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small)
                defer { _ = try? attempt("umount", small) }
                let log = stage.file("log")
                let disk = try stage.mount(child, "--cache", "\(small)/cache.vci", "--log-file", log)
                try tool("cmp", expected, disk.file)
                try disk.unmount()
                let lines = contents(of: log).split(separator: "\n").filter { $0.contains("block cache") }
                #expect(lines.count == 1 && lines[0].contains("No space left"), "\(lines)")
            }
        }

        /// Changes of a device do not show, so that nothing of one is kept for the next time.
        @Test func imagesOnDevices() throws {
            try Stage.use { stage in
                let raw = stage.file("content")
                try tool("dd", "if=/dev/urandom", "of=\(raw)", "bs=1M", "count=4", "status=none")
                let device = try stage.attach(raw)
                let cache = stage.file("cache.vci")
                for round in 0..<2 {
                    let place = try stage.makeFolder("\(round)")
                    let result = try attempt(Programs.vdmount, "--cache", cache, device, place)
                    #expect(result.status == 0 && result.errorText.isEmpty, "\(result.errorText)")
                    let disk = try MountedDisk(at: place)
                    try tool("cmp", raw, disk.file)
                    try disk.unmount()
                    try tool(Programs.vdimg, "cache", "check", cache)
                    let said = try tool(Programs.vdimg, "cache", "info", cache)
                    #expect(said.contains("0 bytes in 0 extents") && said.contains("none"), "\(said)")
                    try OpenedFile.with(device, O_RDWR) { file in
                        _ = try file.write([UInt8](repeating: UInt8(round + 1), count: 4096), at: 8192)
                        try file.sync()
                    }
                }
                try stage.detach(device)
            }
        }

        @Test(arguments: [
            ["--cache-size", "1G"], ["--cache", "f", "--cache-size", "1M"], ["--cache", "f", "--cache-size", "1T"],
            ["--cache="], ["-o", "cache"], ["-o", "cache=f,cache-size=x"],
        ])
        func wrongUsage(_ words: [String]) throws {
            #expect(try attempt([Programs.vdmount] + words + ["image", "place"]).status == 64)
        }
    }
}

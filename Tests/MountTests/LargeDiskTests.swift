import DiskTesting
import Glibc
import Testing

/// Disks whose tables do not fit into memory, and long chains.
extension MountTests {
    @Suite struct LargeDiskTests {
        /// A line of /proc/PID/status in bytes.
        private func memory(_ pid: Int32, _ name: String) -> Int {
            let line = contents(of: "/proc/\(pid)/status").split(separator: "\n").first { $0.hasPrefix(name + ":") }
            return (line?.split(whereSeparator: { $0 == " " || $0 == "\t" }).dropFirst().first.flatMap { Int($0) } ?? 0)
                << 10
        }

        /// With grains of 4 KiB, 10 GiB have 5,120 tables of 2 KiB: 10 MiB of entries, more than the usual cache; 2 GiB
        /// have twice as many as the small one.
        @Test(arguments: [("8M", 10, 1), ("1M", 2, 2)])
        func memoryIsBounded(tableCache: String, gibibytes: Int, readWhole: Int) throws {
            try Stage.use(inMemory: true) { stage in
                let image = stage.file("disk.vmdk")
                let size = gibibytes << 30
                try vdimg("create", "--quiet", "--size", "\(size)", "--block-size", "4K", image)
                var disk = try stage.mount(image, "--rw", "--table-cache", tableCache)
                // An entry in every table.
                try OpenedFile.with(disk.file, O_WRONLY | OpenedFile.direct) { file in
                    for table in 0..<size >> 21 {
                        _ = try file.write(
                            [UInt8](repeating: UInt8(table % 251 + 1), count: 512), at: table << 21 + 512)
                    }
                    try file.sync()
                }
                expectSmall(disk, "after writing")
                try disk.unmount()

                disk = try stage.mount(image, "--table-cache", tableCache)
                let readers = try (0..<4).map { number in
                    try stage.start(
                        "dd", "if=\(disk.file)", "of=/dev/null", "bs=1M", "iflag=direct", "status=none",
                        "skip=\(number * readWhole << 8)", "count=\(readWhole << 8)")
                }
                for reader in readers { #expect(try reader.wait().status == 0) }
                try OpenedFile.with(disk.file, O_RDONLY | OpenedFile.direct) { file in
                    for table in 0..<size >> 21 {
                        let bytes = try file.read(at: table << 21 + 512, count: 512)
                        if bytes != [UInt8](repeating: UInt8(table % 251 + 1), count: 512) {
                            Issue.record("table \(table): \(bytes[0])")
                        }
                    }
                }
                expectSmall(disk, "after reading")
                try disk.unmount()
            }
        }

        /// The aim is 32 MiB of the release build, whose code is small. Here the shared libraries of the Swift runtime
        /// and the debug code come on top, which is why what the process has of its own is looked at.
        private func expectSmall(
            _ disk: MountedDisk, _ moment: String, sourceLocation: SourceLocation = #_sourceLocation
        ) {
            let own = memory(disk.pid, "RssAnon")
            let peak = memory(disk.pid, "VmHWM")
            #expect(own > 0 && own < 32 << 20, "\(own >> 10) KiB \(moment)", sourceLocation: sourceLocation)
            #expect(peak < 64 << 20, "at most \(peak >> 10) KiB \(moment)", sourceLocation: sourceLocation)
        }

        /// A split disk has more extents than a process usually may open files.
        @Test func manyExtents() throws {
            try Stage.use(inMemory: true) { stage in
                let image = stage.file("disk.vmdk")
                try vdimg(
                    "create", "--quiet", "--variant", "split", "--option", "split-size=1M", "--size", "100M", image)
                let folder = try stage.makeMountpoint()
                try tool("sh", "-c", "ulimit -S -n 64; exec '\(Programs.vdmount)' --rw '\(image)' '\(folder)'")
                let disk = try MountedDisk(at: folder)
                try qemuIO(disk.file, format: "raw", "write -P 5 0 100M")
                try disk.unmount()
                try qemuIO(image, "read -P 5 0 100M")
                // Where the limit cannot be raised, that is what is said.
                let refused = try attempt(
                    "sh", "-c", "ulimit -n 64; exec '\(Programs.vdmount)' '\(image)' '\(folder)'")
                expectRefused(refused, "Too many open files")
                #expect(stage.mounts().isEmpty)
            }
        }

        /// qemu-img asks where data begins at every grain; a long hole is not gone through each time.
        @Test func comparedThroughTheMount() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 3 << 30)
                try qemuIO(image, "write -P 1 1G 1M", "write -P 2 2500M 100k")
                let disk = try stage.mount(image)
                try expectEqual(image, toRaw: disk.file)
                try disk.unmount()
            }
        }

        /// 2 TiB over eight snapshots. The aim is 100 ms to mount in the release build; here it is given two seconds.
        @Test func twoTebibytesOverEightSnapshots() throws {
            try Stage.use { stage in
                let size = 2 << 40
                var image = stage.file("base.vmdk")
                try vdimg("create", "--quiet", "--size", "\(size)", image)
                let places = (0...8).map { $0 * (size / 9) + 4096 } + [size - 4096]
                try qemuIO(image, places.map { "write -P 100 \($0) 4k" })
                for level in 1...8 {
                    let child = stage.file("child\(level).vmdk")
                    try vdimg("create", "--quiet", "--parent", image, child)
                    image = child
                    let disk = try stage.mount(image, "--rw")
                    try qemuIO(disk.file, format: "raw", "write -P \(level) \(places[level]) 512")
                    try disk.unmount()
                }
                let clock = ContinuousClock()
                var disk: MountedDisk?
                let time = try clock.measure { disk = try stage.mount(image) }
                #expect(time < .seconds(2))
                let mounted = try #require(disk)
                #expect(try FileStatus(mounted.file).size == size)
                let reads = (1...8).flatMap { level in
                    ["read -P \(level) \(places[level]) 512", "read -P 100 \(places[level] + 512) 3584"]
                }
                try qemuIO(
                    mounted.file, format: "raw", readOnly: true,
                    reads + ["read -P 100 \(places[0]) 4k", "read -P 100 \(places[9]) 4k", "read -P 0 1T 1M"])
                expectSmall(mounted, "after reading")
                try mounted.unmount()
                try tool("qemu-img", "check", "-q", image)
            }
        }
    }
}

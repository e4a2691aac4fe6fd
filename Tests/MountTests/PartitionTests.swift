import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// Partitions as files beside the disk. Which tables are understood is tested with their reader.
    @Suite struct PartitionTests {
        private static let table = """
            label: gpt
            size=8M, name="boot", type=U
            size=16M, name="data"
            """

        private func makeImage(_ stage: Stage) throws -> String {
            let raw = try stage.makeRaw("source.raw", size: 40 << 20)
            try tool("sh", "-c", "printf '%s\\n' '\(Self.table)' | sfdisk --quiet --no-tell-kernel '\(raw)'")
            try qemuIO(raw, format: "raw", "write -P 1 1M 8M", "write -P 2 9M 16M")
            try tool("mkfs.ext4", "-q", "-L", "files", "-E", "offset=\(9 << 20)", raw, "16384")
            let image = stage.file("disk.vmdk")
            try tool("qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, image)
            return image
        }

        private func names(_ disk: MountedDisk) throws -> String { try tool("ls", disk.mountpoint) }

        @Test func filesBesideTheDisk() throws {
            try Stage.use { stage in
                let disk = try stage.mount(makeImage(stage))
                #expect(try names(disk) == "disk.raw\ninfo.json\npart1.raw\npart2.raw\n")
                for (number, offset, size) in [(1, 1 << 20, 8 << 20), (2, 9 << 20, 16 << 20)] {
                    let part = "\(disk.mountpoint)/part\(number).raw"
                    #expect(try FileStatus(part).size == size)
                    let slice = stage.file("slice")
                    try tool(
                        "dd", "if=\(stage.file("source.raw"))", "of=\(slice)", "bs=1M", "skip=\(offset >> 20)",
                        "count=\(size >> 20)", "status=none")
                    try expectSameBytes(part, slice)
                    // Behind its end there is nothing.
                    try OpenedFile.with(part) { file in
                        let (behind, last) = (
                            try file.read(at: size, count: 4096), try file.read(at: size - 512, count: 4096)
                        )
                        #expect(behind.isEmpty && last.count == 512)
                    }
                }
                let program = """
                    import json, sys
                    d = json.load(open(sys.argv[1] + "/info.json"))
                    print(d["disk"]["partition-table"], d["disk"]["size"], d["images"][0]["format"])
                    for p in d["partitions"]:
                        print(p["number"], p["file"], p["offset"], p["size"], p["name"],
                              p.get("file-system", {}).get("kind"), p.get("file-system", {}).get("label"))
                    """
                #expect(
                    try tool("python3", "-c", program, disk.mountpoint) == """
                        gpt 41943040 vmdk
                        1 part1.raw 1048576 8388608 boot None None
                        2 part2.raw 9437184 16777216 data ext4 files

                        """)
                let folder = try stage.makeFolder("files")
                try tool("mount", "-o", "loop,ro", "\(disk.mountpoint)/part2.raw", folder)
                #expect(try tool("ls", folder) == "lost+found\n")
                try stage.unmountFileSystem(folder)
                try disk.unmount()
            }
        }

        /// Written through a partition's file it is in the disk, and nowhere else.
        @Test func writtenThroughAPartition() throws {
            try Stage.use { stage in
                let image = try makeImage(stage)
                let disk = try stage.mount(image, "--rw")
                let part = "\(disk.mountpoint)/part2.raw"
                // What the page cache has of the disk is forgotten.
                try qemuIO(disk.file, format: "raw", readOnly: true, "read -P 1 1M 8M")
                try tool("dd", "if=\(disk.file)", "of=/dev/null", "bs=1M", "status=none")
                let device = try stage.attach(part)
                try tool("mkfs.ext4", "-q", "-F", device)
                let folder = try stage.mountFileSystem(device)
                try tool("cp", "-r", "/etc/default", "\(folder)/copy")
                try stage.unmountFileSystem(folder)
                try stage.detach(device)
                let offset = try stage.attach(
                    disk.file, "--read-only", "--offset", "\(9 << 20)", "--sizelimit", "\(16 << 20)")
                try tool("e2fsck", "-fn", offset)
                try stage.detach(offset)
                try expectSameBytes(part, stage.slice(disk.file, 9, 16))
                try disk.unmount()
                try qemuIO(image, "read -P 1 1M 8M")
            }
        }

        @Test func oneSideWrites() throws {
            try Stage.use { stage in
                let disk = try stage.mount(makeImage(stage), "--rw", "--log-file", stage.file("log"))
                let parts = (1...2).map { "\(disk.mountpoint)/part\($0).raw" }
                try OpenedFile.with(parts[0], O_RDWR) { _ in
                    #expect(throws: SystemFailure(EBUSY)) { try OpenedFile.with(disk.file, O_RDWR) { _ in } }
                    let byte = try OpenedFile.with(disk.file) { try $0.read(at: 1 << 20, count: 1) }
                    #expect(byte == [1])
                    try OpenedFile.with(parts[1], O_RDWR) { _ in }
                }
                #expect(
                    contents(of: stage.file("log")).contains(
                        "disk.raw: cannot be opened for writing while part1.raw is"))
                expectEventually { (try? OpenedFile.with(disk.file, O_RDWR) { _ in }) != nil }
                try OpenedFile.with(disk.file, O_RDWR) { _ in
                    for part in parts {
                        #expect(throws: SystemFailure(EBUSY)) { try OpenedFile.with(part, O_WRONLY) { _ in } }
                        try OpenedFile.with(part) { _ in }
                    }
                }
                try disk.unmount()
            }
        }

        /// The table is written through the mount, in several kinds.
        @Test func tableChanges() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 64 << 20)
                let disk = try stage.mount(image, "--rw")
                #expect(try names(disk) == "disk.raw\ninfo.json\n")
                func expect(_ table: String, _ parts: [Int]) throws {
                    try tool(
                        "sh", "-c",
                        "printf '%s\\n' '\(table)' | sfdisk --quiet --no-tell-kernel --wipe always '\(disk.file)'")
                    let wanted = "disk.raw\ninfo.json\n" + parts.map { "part\($0).raw\n" }.joined()
                    // As soon as the program that wrote the table has ended.
                    #expect(try names(disk) == wanted)
                    #expect(
                        try information(disk).split(separator: " ").dropFirst() == parts.map { "part\($0).raw" }[...])
                }
                try expect("label: gpt\nsize=8M\nsize=8M\nsize=8M", [1, 2, 3])
                try OpenedFile.with("\(disk.mountpoint)/part3.raw") { file in
                    try expect(
                        "label: dos\nsize=8M\nsize=30M,type=5\nsize=5M\nstart=10M,size=5M\nstart=20M,size=5M",
                        [1, 3, 5, 6])
                    // Who has one open may go on with it.
                    let bytes = try file.read(at: 0, count: 512)
                    #expect(bytes.count == 512)
                }
                try expect("label: gpt\nstart=4M,size=8M", [1])
                #expect(try FileStatus("\(disk.mountpoint)/part1.raw").size == 8 << 20)
                try tool("dd", "if=/dev/zero", "of=\(disk.file)", "bs=1M", "count=1", "conv=notrunc", "status=none")
                try tool(
                    "dd", "if=/dev/zero", "of=\(disk.file)", "bs=1M", "count=1", "seek=63", "conv=notrunc",
                    "status=none")
                #expect(try names(disk) == "disk.raw\ninfo.json\n")
                #expect(try information(disk) == "none")
                try disk.unmount()
            }
        }

        /// The kind of the table and the files of the partitions, as info.json has them.
        private func information(_ disk: MountedDisk) throws -> String {
            let program = """
                import json, sys
                d = json.load(open(sys.argv[1] + "/info.json"))
                def words(part):
                    return [part["file"]] + ([part["file-system"]["kind"]] if "file-system" in part else [])
                print(*[d["disk"]["partition-table"]] + sum([words(p) for p in d["partitions"]], []), end="")
                """
            return try tool("python3", "-c", program, disk.mountpoint)
        }

        /// A file system that is made, and one that goes, without a change of the table.
        @Test func fileSystemsChange() throws {
            try Stage.use { stage in
                let disk = try stage.mount(stage.makeImage("disk.vmdk", size: 64 << 20), "--rw")
                let script = "printf '%s\\n' 'label: gpt' size=8M size=40M | sfdisk --quiet --no-tell-kernel"
                try tool("sh", "-c", "\(script) '\(disk.file)'")
                #expect(try information(disk) == "gpt part1.raw part2.raw")
                try tool("mkfs.ext4", "-q", "\(disk.mountpoint)/part2.raw")
                #expect(try information(disk) == "gpt part1.raw part2.raw ext4")
                // Who reads it meanwhile goes on with what was there.
                try OpenedFile.with("\(disk.mountpoint)/info.json") { file in
                    let before = try file.read(at: 0, count: 1 << 16)
                    try tool("mkswap", "\(disk.mountpoint)/part1.raw")
                    try tool("wipefs", "--all", "--quiet", "\(disk.mountpoint)/part2.raw")
                    #expect(try information(disk).contains("ext4"))
                    #expect(try file.read(at: 0, count: 1 << 16) == before)
                }
                #expect(try information(disk) == "gpt part1.raw swap part2.raw")
                let shown = try FileStatus("\(disk.mountpoint)/info.json").size
                #expect(contents(of: "\(disk.mountpoint)/info.json").utf8.count == shown)
                try disk.unmount()
            }
        }

        /// A table that contradicts itself: no files, and one line for the user.
        @Test func badTable() throws {
            try Stage.use { stage in
                let raw = try stage.makeRaw("disk.raw", size: 8 << 20)
                // Two partitions that overlap.
                let program = """
                    import struct, sys
                    entry = lambda start, size: struct.pack("<B3sB3sII", 0, b"", 0x83, b"", start, size)
                    disk = open(sys.argv[1], "r+b")
                    disk.seek(446)
                    disk.write(entry(2048, 8000) + entry(4000, 4000) + bytes(32) + b"\\x55\\xaa")
                    """
                try tool("python3", "-c", program, raw)
                let folder = try stage.makeMountpoint()
                let result = try attempt(Programs.vdmount, raw, folder)
                #expect(result.status == 0 && result.errorText.contains("overlap"), "\(result.errorText)")
                let disk = try MountedDisk(at: folder)
                #expect(try names(disk) == "disk.raw\ninfo.json\n")
                #expect(contents(of: "\(folder)/info.json").contains("overlap"))
                try disk.unmount()
            }
        }
    }
}

extension Stage {
    /// Some MiB of a file as a file of their own.
    fileprivate func slice(_ path: String, _ start: Int, _ count: Int) throws -> String {
        let slice = file("slice")
        try tool("dd", "if=\(path)", "of=\(slice)", "bs=1M", "skip=\(start)", "count=\(count)", "status=none")
        return slice
    }
}

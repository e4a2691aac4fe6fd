import DiskTesting
import Glibc
import Testing

/// Space that is given up goes back, zeros are zeros, and `disk.raw` tells what is allocated.
extension MountTests {
    @Suite struct DiscardTests {
        /// Images over which space is given up.
        enum Layout: String, CaseIterable, Sendable {
            case base, childOfEmptyBase, childOfFullBase, zeroGrainChildOfFullBase, splitChild, esxSparse, flat
        }

        /// The top image of a disk of `size` bytes, all of them from below if the layout says so.
        private func make(_ layout: Layout, _ stage: Stage, size: Int) throws -> String {
            let image = stage.file("top.vmdk")
            let parent = stage.file("parent.vmdk")
            var options: [String] = []
            switch layout {
            case .base: options = ["--size", "\(size)"]
            case .flat: options = ["--size", "\(size)", "--variant", "fixed"]
            case .esxSparse: options = ["--size", "\(size)", "--variant", "esx-sparse"]
            case .childOfEmptyBase, .childOfFullBase: options = ["--parent", parent]
            case .zeroGrainChildOfFullBase: options = ["--parent", parent, "--option", "zeroed-grain=on"]
            case .splitChild: options = ["--parent", parent, "--variant", "split", "--option", "split-size=16M"]
            }
            if options.contains(parent) {
                try vdimg("create", "--quiet", "--size", "\(size)", parent)
                if layout != .childOfEmptyBase { try qemuIO(parent, "write -P 99 0 \(size)") }
            }
            try tool([Programs.vdimg, "create", "--quiet"] + options + [image])
            return image
        }

        @Test(arguments: Layout.allCases) func fstrimShrinksTheTopImage(_ layout: Layout) throws {
            try Stage.use(inMemory: true) { stage in
                let image = try make(layout, stage, size: 64 << 20)
                let disk = try stage.mount(image, "--rw")
                let device = try stage.attach(disk.file)
                try tool("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", device)
                let folder = try stage.mountFileSystem(device)
                try tool("sh", "-c", "head -c 25165824 /dev/urandom > \(folder)/large")
                try tool("sh", "-c", "head -c 4000000 /dev/urandom | tee \(folder)/kept > \(stage.file("kept"))")
                try tool("sync", "-f", folder)
                let before = try stage.usage("top")
                try tool("rm", "\(folder)/large")
                try tool("sync", "-f", folder)
                try tool("fstrim", folder)
                try tool("sync", "-f", folder)
                let after = try stage.usage("top")
                #expect(after <= before - (20 << 20), "from \(before) to \(after) bytes")
                try stage.unmountFileSystem(folder)
                try tool("e2fsck", "-fn", device)
                try stage.detach(device)
                try tool("cp", "--sparse=always", disk.file, stage.file("copy.raw"))
                try disk.unmount()
                #expect(try stage.usage("top") <= before - (20 << 20))
                try expectEqual(image, toRaw: stage.file("copy.raw"), checks: layout != .flat)

                let again = try stage.mount(image)
                try expectSameBytes(again.file, stage.file("copy.raw"))
                let read = try stage.attach(again.file, "--read-only")
                let files = try stage.mountFileSystem(read, "ro")
                try expectSameBytes("\(files)/kept", stage.file("kept"))
                try stage.unmountFileSystem(files)
                try stage.detach(read)
                try again.unmount()
            }
        }

        /// The same ranges, whole blocks and odd ones, given up in the disk and in a plain file.
        @Test(arguments: Layout.allCases, ["--punch-hole", "--zero-range"])
        func fallocate(_ layout: Layout, _ mode: String) throws {
            try Stage.use(inMemory: true) { stage in
                let size = 24 << 20 + 512
                let image = try make(layout, stage, size: size)
                let model = stage.file("model.raw")
                var plan = WritePlan(seed: 5, size: size)
                let writes = plan.writes(20)
                let disk = try stage.mount(image, "--rw")
                try tool("cp", disk.file, model)
                for file in [disk.file, model] { try qemuIO(file, format: "raw", writes) }
                var ranges = (0..<12).map { _ in plan.range(maximum: 3 << 20, aligned: false) }
                ranges += [
                    (1 << 20, 4 << 20), (1 << 20, 1), (8 << 20 + 511, 2), (size - 700, 700), (size - 65536, 65536),
                ]
                for (offset, count) in ranges {
                    for (mode, file) in [(mode, disk.file), ("--punch-hole", model)] {
                        try tool("fallocate", mode, "--keep-size", "-o", "\(offset)", "-l", "\(count)", file)
                    }
                }
                try expectSameBytes(disk.file, model)
                try disk.unmount()
                try expectEqual(image, toRaw: model, checks: layout != .flat)
                let again = try stage.mount(image)
                try expectSameBytes(again.file, model)
                try again.unmount()
            }
        }

        /// What is given up and taken again in one session, with and without a flush between.
        @Test(arguments: [Layout.childOfFullBase, .zeroGrainChildOfFullBase, .base])
        func takenAgain(_ layout: Layout) throws {
            try Stage.use(inMemory: true) { stage in
                let size = 16 << 20
                let image = try make(layout, stage, size: size)
                let model = stage.file("model.raw")
                let disk = try stage.mount(image, "--rw")
                try tool("cp", disk.file, model)
                for round in 1...4 {
                    var commands = ["write -P \(round) 0 8M", "discard 0 8M", "write -P \(round + 50) 2M 100k"]
                    if round % 2 == 0 { commands.insert("flush", at: 2) }
                    commands += ["write -P \(round + 100) 3000000 1000000"]
                    for file in [disk.file, model] { try qemuIO(file, format: "raw", commands) }
                    try expectSameBytes(disk.file, model)
                }
                try disk.unmount()
                try expectEqual(image, toRaw: model)
                // Four rounds took no more space than one.
                #expect(try FileStatus(image).size < 14 << 20)
            }
        }

        @Test func rangesBeyondTheEnd() throws {
            try Stage.use(inMemory: true) { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                try qemuIO(image, "write -P 1 0 4M")
                let disk = try stage.mount(image, "--rw")
                // What ends behind the end is cut where the size is kept, else refused.
                let atEnd = ["-o", "\(4 << 20 - 4096)", "-l", "8192", disk.file]
                try tool(["fallocate", "--punch-hole"] + atEnd)
                #expect(try attempt(["fallocate", "--zero-range"] + atEnd).status != 0)
                #expect(try attempt("fallocate", "--punch-hole", "-o", "5M", "-l", "1M", disk.file).status != 0)
                try qemuIO(disk.file, format: "raw", "read -P 1 0 4190208", "read -P 0 4190208 4096")
                #expect(try FileStatus(disk.file).size == 4 << 20)
                try disk.unmount()
            }
        }

        @Test func readOnlyDiskGivesNothingUp() throws {
            try Stage.use(inMemory: true) { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                let disk = try stage.mount(image)
                let result = try attempt("fallocate", "--punch-hole", "-o", "0", "-l", "1M", disk.file)
                #expect(result.status != 0 && result.errorText.contains("Read-only"), "\(result.errorText)")
                try disk.unmount()
            }
        }

        @Test func seekDataAndHole() throws {
            try Stage.use(inMemory: true) { stage in
                let grain = 65536
                let size = 40 << 20 + 512
                let base = try stage.makeImage("base.vmdk", size: size)
                try qemuIO(base, "write -P 1 0 64k", "write -P 1 33M 256k", "write -P 1 \(size - 512) 512")
                let child = try stage.makeSnapshot("child.vmdk", of: base)
                try qemuIO(child, "write -P 2 8454144 64k", "write -P 2 8M 64k")
                let disk = try stage.mount(child, "--rw")
                let expected = [
                    0..<grain, 8 << 20..<8 << 20 + 2 * grain, 33 << 20..<33 << 20 + 4 * grain, 40 << 20..<size,
                ]
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    var found = try file.dataRanges()
                    #expect(found == expected)
                    #expect(try file.seek(100, OpenedFile.seekData) == 100)
                    #expect(try file.seek(100, OpenedFile.seekHole) == grain)
                    #expect(try file.seek(1 << 20, OpenedFile.seekHole) == 1 << 20)
                    #expect(try file.seek(size - 1, OpenedFile.seekHole) == size)
                    for whence in [OpenedFile.seekData, OpenedFile.seekHole] {
                        #expect(throws: SystemFailure(ENXIO)) { try file.seek(size, whence) }
                        #expect(throws: SystemFailure(ENXIO)) { try file.seek(size + 1, whence) }
                    }
                    _ = try file.write([1], at: 20 << 20)
                    // What is known of the rest of the grain is up to the file system below.
                    #expect(try file.dataRanges().contains { $0.lowerBound == 20 << 20 && $0.count <= grain })
                    try tool("fallocate", "--punch-hole", "-o", "\(20 << 20)", "-l", "\(grain)", disk.file)
                    found = try file.dataRanges()
                    #expect(found == expected)
                }
                // A tool that lives from it.
                try tool("cp", "--sparse=auto", disk.file, stage.file("copy"))
                try expectSameBytes(disk.file, stage.file("copy"))
                #expect(try FileStatus(stage.file("copy")).allocated < 2 << 20)
                try disk.unmount()
            }
        }

        @Test func blocksTellTheUsage() throws {
            try Stage.use(inMemory: true) { stage in
                let image = try stage.makeImage("disk.vmdk", size: 64 << 20)
                let disk = try stage.mount(image, "--rw")
                let empty = try FileStatus(disk.file).allocated
                #expect(empty < 1 << 20)
                try qemuIO(disk.file, format: "raw", "write -P 1 8M 16M", "flush")
                func grew(by bytes: Int) throws -> Bool {
                    let growth = try FileStatus(disk.file).allocated - empty
                    return growth >= bytes && growth < bytes + 1 << 20
                }
                // The kernel may remember the old answer for a second.
                try expectEventually { try grew(by: 16 << 20) }
                try tool("fallocate", "--punch-hole", "-o", "8M", "-l", "12M", disk.file)
                try expectEventually { try grew(by: 4 << 20) }
                try disk.unmount()
            }
        }
    }
}

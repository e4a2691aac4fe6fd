import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// Chains that are changed while they are mounted with a block cache: what is cached stays where it is still right,
    /// and nothing is ever read that is not.
    @Suite struct MountedCacheTests {
        private static let size = 24 << 20

        private func stack(_ stage: Stage, _ kind: MountedKind, count: Int = 4) throws -> MountedStack {
            try MountedStack(stage, kind, Array(repeating: Self.size, count: count), in: "images")
        }

        private func merge(_ top: String, _ arguments: String...) throws {
            try tool([Programs.vdimg, "merge", "--quiet", top] + arguments)
        }

        /// Mounts with a cache; what it says of that is answered too.
        private func mount(
            _ stage: Stage, _ image: String, _ options: String...
        ) throws -> (disk: MountedDisk, said: String) {
            let place = try stage.makeMountpoint()
            let result = try attempt(
                [Programs.vdmount, "--cache", stage.file("cache.vci"), "--cache-size", "64M"] + options
                    + [image, place])
            #expect(result.status == 0, "\(result.errorText)")
            return (try MountedDisk(at: place), result.errorText)
        }

        /// The disk holds what it must, read past the kernel's page cache.
        private func expectShown(
            _ disk: MountedDisk, _ model: String, _ sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            let script = "dd if=\"$1\" iflag=direct bs=64k status=none | cmp - \"$2\""
            let result = try attempt("sh", "-c", script, "sh", disk.file, model)
            #expect(result.status == 0, "\(result.outputText)\(result.errorText)", sourceLocation: sourceLocation)
        }

        /// All that can be cached is, as much as `held`: when the whole disk is read nothing is added. Of a disk that a
        /// guest has written to it `mayBeHidden` altogether.
        private func expectCached(
            _ disk: MountedDisk, _ model: String, _ held: Int, mayBeHidden: Bool = false,
            _ sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            let before = try disk.cacheUse()
            #expect(before.held == held, "\(before)", sourceLocation: sourceLocation)
            try expectShown(disk, model, sourceLocation)
            let after = try disk.cacheUse()
            #expect(
                after.held == held && (after.hit > before.hit || mayBeHidden), "\(before) \(after)",
                sourceLocation: sourceLocation)
        }

        @Test(arguments: MountedKind.all) func changesUnderAGuest(_ kind: MountedKind) throws {
            try Stage.use { stage in
                let stack = try stack(stage, kind)
                let (names, model) = (stack.images, stack.models[0])
                // Beside the others: some formats find parents by UUIDs alone.
                let (new, newest) = (stage.file("images/new"), stage.file("images/newest"))
                let (disk, _) = try mount(stage, names[0], "--rw")
                try expectShown(disk, model)
                let filled = try disk.cacheUse().held
                #expect(filled > 1 << 20)
                var guest = try Guest(stage, on: disk, model: model, isWriting: true)
                // Below the image that is written nothing shows another content.
                try merge(names[0], "--from", "1", "--to", "2")
                try merge(names[0], "--from", "2", "--to", "1")
                #expect(try disk.images() == [names[0], names[2]] && disk.cacheUse().held >= filled)
                // What was written is below from now on.
                try vdimg("snapshot", "--quiet", names[0], new, "--format", kind.format)
                usleep(100_000)
                try merge(new, "--from", "1", "--to", "2")
                try vdimg("snapshot", "--quiet", new, newest, "--format", kind.format)
                usleep(100_000)
                try merge(newest, "--from", "1", "--to", "0")
                #expect(try disk.images() == [newest, names[2]])
                usleep(100_000)
                try guest.end()
                try expectShown(disk, model)
                let held = try disk.cacheUse().held
                try disk.unmount()
                try vdimg("cache", "check", stage.file("cache.vci"))

                let (again, said) = try mount(stage, newest, "--rw")
                #expect(said.isEmpty, "\(said)")
                try expectCached(again, model, held, mayBeHidden: true)
                guest = try Guest(stage, on: again, model: model, isWriting: true, seed: 2)
                // Into the image that is left: nothing is cached, until there is one below again.
                try merge(newest)
                #expect(try again.images() == [names[2]])
                #expect(try again.cacheUse().held == 0)
                try vdimg("snapshot", "--quiet", names[2], new, "--format", kind.format)
                usleep(100_000)
                try guest.end()
                try expectShown(again, model)
                let last = try again.cacheUse().held
                try again.unmount()

                let (third, hint) = try mount(stage, new, "--rw")
                #expect(hint.isEmpty, "\(hint)")
                try expectCached(third, model, last, mayBeHidden: true)
                try merge(new)
                try third.unmount()
                try kind.expect(names[2], model)
            }
        }

        /// On a read-only mount the disk never shows anything else: all that is cached stays, the next time too.
        @Test(arguments: MountedKind.all) func readOnlyMounts(_ kind: MountedKind) throws {
            try Stage.use { stage in
                let stack = try stack(stage, kind)
                let (names, model) = (stack.images, stack.models[0])
                let (disk, _) = try mount(stage, names[0])
                try expectShown(disk, model)
                let before = try disk.cacheUse()
                #expect(before.held > 1 << 20)
                let guest = try Guest(stage, on: disk, model: model, isWriting: false)
                try merge(names[0], "--from", "2", "--to", "1")
                try merge(names[0])
                try guest.end()
                #expect(try disk.images() == [names[1], names[3]])
                let after = try disk.cacheUse()
                #expect(after.held == before.held && after.hit > before.hit, "\(before) \(after)")
                try expectShown(disk, model)
                #expect(try disk.cacheUse().held == before.held)
                try disk.unmount()
                try vdimg("cache", "check", stage.file("cache.vci"))
                let (again, said) = try mount(stage, names[1])
                #expect(said.isEmpty, "\(said)")
                try expectCached(again, model, before.held)
                try merge(names[1], "--from", "1", "--to", "0")
                try again.unmount()
                let (last, hint) = try mount(stage, names[1])
                #expect(hint.isEmpty, "\(hint)")
                try expectCached(last, model, before.held)
                try last.unmount()
                try kind.expect(names[1], model)
            }
        }

        /// What the image that is written takes in, or gives, is not cached any more.
        @Test(arguments: [["--from", "0", "--to", "1"], ["--from", "1", "--to", "0"], ["--from", "0", "--to", "2"]])
        func theImageThatIsWritten(_ arguments: [String]) throws {
            try Stage.use { stage in
                let stack = try stack(stage, MountedKind.all[0], count: 4)
                let (disk, _) = try mount(stage, stack.images[0], "--rw")
                try expectShown(disk, stack.models[0])
                #expect(try disk.cacheUse().held > 1 << 20)
                try tool([Programs.vdimg, "merge", "--quiet", stack.images[0]] + arguments)
                #expect(try disk.cacheUse().held == 0)
                let guest = try Guest(stage, on: disk, model: stack.models[0], isWriting: true)
                usleep(100_000)
                try guest.end()
                try expectShown(disk, stack.models[0])
                let top = try disk.images()[0]
                let held = try disk.cacheUse().held
                try disk.unmount()
                let (again, said) = try mount(stage, top, "--rw")
                #expect(said.isEmpty, "\(said)")
                try expectCached(again, stack.models[0], held, mayBeHidden: true)
                try again.unmount()
            }
        }

        /// Killed at any moment of a merge, and mounted again with the same cache: it is used only where it is right.
        @Test(arguments: [MountedKind.all[0], MountedKind.all[3], MountedKind.all[5]])
        func killedDaemon(_ kind: MountedKind) throws {
            try Stage.use { stage in
                let stack = try stack(stage, kind, count: 6)
                let (names, model) = (stack.images, stack.models[0])
                for round in 0..<12 {
                    let (disk, _) = try mount(stage, names[0])
                    // In part: what the merge reads goes past the cache.
                    if round % 2 == 0 { try expectShown(disk, model) }
                    let count = try disk.images().count
                    let merge =
                        count > 2
                        ? try stage.start(
                            Programs.vdimg, "merge", "--force", names[0], "--from", "1", "--to",
                            round % 4 < 2 ? "2" : "0")
                        : nil
                    usleep(UInt32.random(in: 0..<120_000))
                    kill(disk.pid, SIGKILL)
                    _ = try merge?.wait()
                    expectEventually { !isRunning(disk.pid) }
                    _ = try attempt(Programs.vdumount, disk.mountpoint)
                    let (again, _) = try mount(stage, names[0])
                    try expectShown(again, model)
                    try again.unmount()
                }
                let (disk, _) = try mount(stage, names[0])
                // What a killed merge has left of an image that was merged away may lie beside them.
                try merge(names[0], "--to", names[5], "--force")
                try disk.unmount()
                try kind.expect(names[5], model)
            }
        }

        /// Neither images that are not part of the disk any more nor what they were opened by is kept.
        @Test(arguments: [MountedKind.all[0], MountedKind.all[1]]) func descriptorsDoNotGather(
            _ kind: MountedKind
        ) throws {
            try Stage.use { stage in
                let stack = try stack(stage, kind, count: 2)
                let (disk, _) = try mount(stage, stack.images[0], "--rw")
                try expectShown(disk, stack.models[0])
                var (top, base) = (stack.images[0], stack.images[1])
                func change(_ number: Int) throws {
                    let new = stage.file("images/new\(number).\(kind.format)")
                    try vdimg("snapshot", "--quiet", top, new)
                    // The lowest one goes up, the file that was opened first with it.
                    try merge(new, "--from", base, "--to", top)
                    (top, base) = (new, top)
                }
                for number in 0..<2 { try change(number) }
                let count = try disk.descriptorCount()
                for number in 2..<7 { try change(number) }
                #expect(try disk.descriptorCount() == count)
                let open = try tool("ls", "-l", "/proc/\(disk.pid)/fd")
                #expect(!open.contains("(deleted)"), "\(open)")
                try expectShown(disk, stack.models[0])
                try disk.unmount()
            }
        }
    }
}

extension MountedDisk {
    /// What its block cache has been good for, in bytes.
    func cacheUse() throws -> (hit: Int, held: Int) {
        let program = """
            import json, sys
            for mount in json.load(sys.stdin):
                if mount["mountpoint"] == sys.argv[1]:
                    print(*[mount["cache-%s-bytes" % what] for what in ("hit", "used")])
            """
        let list = try tool(Programs.vdmount, "--list", "--json")
        let said = try Subprocess.run(["python3", "-c", program, mountpoint], input: Array(list.utf8))
        let numbers = said.outputText.split(whereSeparator: \.isWhitespace).compactMap { Int($0) }
        guard numbers.count == 2 else { throw TestFailure("no block cache: \(list)") }
        return (numbers[0], numbers[1])
    }
}

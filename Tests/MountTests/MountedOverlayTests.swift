import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// Merges of images below an overlay, while the disk is mounted: the images change, what the disk shows does not,
    /// and an overlay that is kept is opened again.
    @Suite struct MountedOverlayTests {
        private static let size = 24 << 20

        /// Whether what an overlay records of an image stays the same when that image is written to.
        private static func hasIdentity(_ kind: MountedKind) -> Bool { !["qcow2", "qed"].contains(kind.format) }

        private func stack(_ stage: Stage, _ kind: MountedKind, count: Int = 4) throws -> MountedStack {
            try MountedStack(stage, kind, Array(repeating: Self.size, count: count), in: "images")
        }

        /// With an overlay that is gone afterwards, the top image is merged too.
        @Test(arguments: MountedKind.all) func withoutAName(_ kind: MountedKind) throws {
            try Stage.use { stage in
                let stack = try stack(stage, kind)
                let (names, model) = (stack.images, stage.file("shown"))
                try tool("cp", stack.models[0], model)
                let disk = try stage.mount(names[0], "--overlay")
                let guest = try Guest(stage, on: disk, model: model, isWriting: true)
                try vdimg("merge", "--quiet", names[0], "--from", "2", "--to", "1")
                #expect(try disk.images().dropFirst() == [names[0], names[1], names[3]])
                // Into its parent: what is named is the top one below the overlay.
                let said = try vdimg("merge", names[0])
                #expect(said == "\(names[0]): merged into \(names[1])\n")
                #expect(try disk.images().dropFirst() == [names[1], names[3]])
                for name in [names[0], names[2]] {
                    #expect(throws: SystemFailure(ENOENT)) { try FileStatus(name) }
                }
                expectRefused(try attempt(Programs.vdimg, "merge", names[3]), "name its top image, \(names[1])")
                let record = contents(of: "\(disk.mountpoint)/info.json")
                #expect(record.contains("\"\(names[1])\"") && !record.contains("\"\(names[0])\""))
                try vdimg("merge", "--quiet", names[1], "--from", "1", "--to", "0")
                usleep(100_000)
                try guest.end()
                try expectSameBytes(disk.file, model)
                try disk.unmount()
                // The images show what they did.
                try kind.expect(names[1], stack.models[0])
            }
        }

        /// An overlay with a name stays right about the image that it records.
        @Test(arguments: MountedKind.all) func withAName(_ kind: MountedKind) throws {
            try Stage.use { stage in
                let stack = try stack(stage, kind, count: 5)
                let (names, model) = (stack.images, stage.file("shown"))
                let kept = stage.file("images/kept")
                try tool("cp", stack.models[0], model)
                let disk = try stage.mount(names[0], "--overlay=\(kept)")
                let guest = try Guest(stage, on: disk, model: model, isWriting: true)
                try vdimg("merge", "--quiet", names[0], "--from", "3", "--to", "2")
                try vdimg("merge", "--quiet", names[0], "--from", "2", "--to", "3")
                let result = try attempt(
                    Programs.vdimg, "merge", "--quiet", names[0], "--from", "1", "--to", "0")
                if Self.hasIdentity(kind) {
                    #expect(result.status == 0, "\(result.errorText)")
                } else {
                    expectRefused(result, kept, "when it was changed last", disk.mountpoint)
                }
                // The image that the overlay names goes, and it names the one that comes in its place.
                try vdimg("merge", "--quiet", names[0])
                let left = Self.hasIdentity(kind) ? [kept, names[4]] : [kept, names[1], names[4]]
                #expect(try disk.images() == left)
                try guest.end()
                try disk.unmount()
                let again = try stage.mount(left[1], "--overlay=\(kept)")
                #expect(try again.images() == left)
                try expectSameBytes(again.file, model)
                try again.unmount()
                try vdimg("check", kept)
                try kind.expect(left[1], stack.models[0])
            }
        }

        @Test func refusals() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 4 << 20)
                let top = try stage.makeSnapshot("top.vmdk", of: base)
                let kept = stage.file("kept")
                let disk = try stage.mount(top, "--overlay=\(kept)")
                try qemuIO(disk.file, format: "raw", "write -P 5 0 1M", "flush")
                let before = try tool("sha256sum", base, top)
                for words in [["merge", kept], ["merge", kept, "--to", base], ["merge", base]] {
                    expectRefused(try attempt([Programs.vdimg] + words), disk.mountpoint)
                }
                expectRefused(try attempt(Programs.vdimg, "merge", kept), "is the overlay of the disk", top)
                // Another image over it would not hold what was written, which is not what is asked for.
                for image in [top, kept] {
                    expectRefused(try attempt(Programs.vdimg, "snapshot", image), "create --parent", disk.mountpoint)
                }
                try vdimg("create", "--quiet", "--parent", top, stage.file("other.vmdk"))
                try qemuIO(stage.file("other.vmdk"), readOnly: true, "read -P 0 0 1M")
                #expect(try disk.images() == [kept, top, base])
                #expect(try tool("sha256sum", base, top) == before)
                try disk.unmount()
                // When it is unmounted, the overlay goes into the image.
                try vdimg("merge", "--quiet", "--force", kept)
                try qemuIO(top, readOnly: true, "read -P 5 0 1M")
            }
        }

        /// The daemon is killed at any moment of a merge: what was synced is there when the disk is mounted with its
        /// overlay again, and so are the images.
        @Test(arguments: MountedKind.all) func killedDaemon(_ kind: MountedKind) throws {
            try Stage.use(inMemory: true) { stage in
                let (names, patterns) = try makePatterns(stage, kind)
                let kept = stage.file("kept")
                var model = KilledDaemonTests.Model(allowed: patterns.map { [$0] })
                let merges = Self.hasIdentity(kind) ? [(1, 2), (0, 1), (1, 0)] : [(2, 1), (0, 1), (2, 3)]
                var top = names[0]
                for round in 0..<(unsafe getenv("VDMOUNT_TORTURE") != nil ? 12 : 3) {
                    let disk = try stage.mount(top, "--overlay=\(kept)")
                    let journal = stage.file("journal")
                    unsafe unlink(journal)
                    let writer = try stage.start(
                        "python3", "-c", KilledDaemonTests.writer, disk.file, journal, "\(round + 1)", "0",
                        "\(KilledDaemonTests.blocks)")
                    expectEventually { contents(of: journal).split(separator: "\n").count { $0 == "f" } >= 3 }
                    let (source, target) = merges[round % merges.count]
                    let isLong = try disk.images().count - 1 > max(source, target)
                    let merge =
                        isLong
                        ? try stage.start(
                            Programs.vdimg, "merge", top, "--from", "\(source)", "--to", "\(target)") : nil
                    usleep(UInt32.random(in: 0..<120_000))
                    kill(disk.pid, SIGKILL)
                    _ = try merge?.wait()
                    let wrote = try writer.wait()
                    #expect(wrote.status == 0, "\(wrote.errorText)")
                    model.replay(journal)
                    expectEventually { !isRunning(disk.pid) }
                    _ = try attempt(Programs.vdumount, disk.mountpoint)
                    // The overlay belongs to one of them.
                    let place = try stage.makeMountpoint()
                    var refusals = ""
                    let found = try names.first { name in
                        let result = try attempt(Programs.vdmount, "--overlay=\(kept)", name, place)
                        refusals += result.errorText
                        return result.status == 0
                    }
                    top = try #require(found, "round \(round): \(refusals)")
                    let again = try MountedDisk(at: place)
                    #expect(try model.firstMistake(in: again.file) == nil, "round \(round)")
                    // What the merge has left of images that are not part of the disk any more.
                    let images = try again.images()
                    for name in names where !images.contains(name) { unsafe unlink(name) }
                    try again.unmount()
                }
                // Without the overlay the image shows what it did.
                var below = KilledDaemonTests.Model(allowed: patterns.map { [$0] })
                let disk = try stage.mount(top)
                #expect(try below.firstMistake(in: disk.file) == nil)
                try disk.unmount()
            }
        }

        /// Six images, the top one first, with a pattern of its own in each, and what each block of the disk holds.
        private func makePatterns(_ stage: Stage, _ kind: MountedKind) throws -> (names: [String], blocks: [UInt64]) {
            var names: [String] = []
            var blocks = [UInt64](repeating: 0, count: KilledDaemonTests.blocks)
            let place = try stage.makeMountpoint()
            for number in 1...6 {
                let name = stage.file(kind.file("image\(number)"))
                let making = names.first.map { ["--parent", $0] } ?? kind.options
                try tool(
                    [Programs.vdimg, "create", "--quiet", "--size", "\(KilledDaemonTests.size)"] + making + [name])
                let first = (number - 1) * 300
                let range = first..<min(first + 3200, KilledDaemonTests.blocks)
                let disk = try stage.mount(name, at: place, options: ["--rw"])
                try qemuIO(
                    disk.file, format: "raw", "write -P \(number) \(first * 4096) \(range.count * 4096)", "flush")
                try disk.unmount()
                for block in range { blocks[block] = UInt64(number) * 0x0101_0101_0101_0101 }
                names.insert(name, at: 0)
            }
            return (names, blocks)
        }
    }
}

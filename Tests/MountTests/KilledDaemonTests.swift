import DiskTesting
import Glibc
import Testing

/// The daemon is killed while programs write: what they have synced is there afterwards.
extension MountTests {
    @Suite struct KilledDaemonTests {
        /// Writes random blocks until it fails. Before each write and after each fsync it says so in a journal.
        static let writer = """
            import os, random, struct, sys
            path, journal, seed, first, count = sys.argv[1:]
            seed, first, count = int(seed), int(first), int(count)
            choice = random.Random(seed)
            disk = os.open(path, os.O_RDWR)
            log = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            number = seed << 32
            while True:
                for _ in range(choice.randrange(1, 20)):
                    block = first + choice.randrange(count)
                    blocks = min(choice.choice((1, 1, 1, 5, 40)), first + count - block)
                    number += 1
                    os.write(log, b"w %d %d %d\\n" % (number, block, blocks))
                    try:
                        os.pwrite(disk, struct.pack("<Q", number) * (512 * blocks), block * 4096)
                    except OSError:
                        sys.exit(0)
                try:
                    os.fsync(disk)
                except OSError:
                    sys.exit(0)
                os.write(log, b"f\\n")
            """

        static let blocks = 5000
        static let size = blocks * 4096

        /// For each block, what it may hold: 64-bit numbers that fill it.
        struct Model {
            var allowed: [[UInt64]]

            /// Follows a writer's journal.
            mutating func replay(_ journal: String) {
                var pending: [(number: UInt64, blocks: Range<Int>)] = []
                for line in contents(of: journal).split(separator: "\n") {
                    let words = line.split(separator: " ")
                    guard words[0] == "w" else {
                        for write in pending { for block in write.blocks { allowed[block] = [write.number] } }
                        pending = []
                        continue
                    }
                    guard words.count == 4, let number = UInt64(words[1]), let first = Int(words[2]),
                        let count = Int(words[3])
                    else { continue }
                    pending.append((number, first..<first + count))
                }
                for write in pending { for block in write.blocks { allowed[block].append(write.number) } }
            }

            /// The first block that holds what it may not; otherwise the model becomes what the disk holds.
            mutating func firstMistake(in file: String) throws -> String? {
                try OpenedFile.with(file) { file in
                    let bytes = try file.read(at: 0, count: size)
                    for block in 0..<blocks {
                        let bytes = bytes[block * 4096..<(block + 1) * 4096]
                        let number = bytes.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
                        guard isEqual(bytes.dropFirst(8), bytes.dropLast(8)) else { return "block \(block) is torn" }
                        guard allowed[block].contains(number) else {
                            return "block \(block) holds \(number), allowed are \(allowed[block])"
                        }
                        allowed[block] = [number]
                    }
                    return nil
                }
            }
        }

        @Test(arguments: [
            ["--variant", "dynamic"], ["--variant", "dynamic", "--option", "zeroed-grain=on", "--block-size", "8K"],
            ["--variant", "split", "--option", "split-size=8M"], ["--variant", "esx-sparse"],
        ]) func syncedWritesSurvive(_ options: [String]) throws {
            try Stage.use(inMemory: true) { stage in
                let base = stage.file("base.vmdk")
                try vdimg("create", "--quiet", "--size", "\(Self.size)", base)
                try qemuIO(base, "write -P 171 0 \(Self.size / 2)")
                let image = stage.file("child.vmdk")
                try tool([Programs.vdimg, "create", "--quiet"] + options + ["--parent", base, image])
                let folder = try stage.makeFolder("disk")
                var model = Model(
                    allowed: (0..<Self.blocks).map { $0 < Self.blocks / 2 ? [0xabab_abab_abab_abab] : [0] })
                for round in 1...3 {
                    let disk = try stage.mount(image, at: folder, options: ["--rw"])
                    #expect(try model.firstMistake(in: disk.file) == nil)
                    let journals = try killInTheMiddle(stage, disk, round: round)
                    for journal in journals { model.replay(journal) }
                    #expect(throws: SystemFailure(ENOTCONN)) { try FileStatus(disk.file) }
                    expectUnclean(try attempt(Programs.vdimg, "check", image))
                }
                try expectRecovery(stage, image, folder, &model)
            }
        }

        /// Two programs write; the daemon is killed when they have synced some dozens of times.
        private func killInTheMiddle(_ stage: Stage, _ disk: MountedDisk, round: Int) throws -> [String] {
            let journals = [stage.file("journal1"), stage.file("journal2")]
            for journal in journals { unsafe unlink(journal) }
            let half = Self.blocks / 2
            let writers = try [0, 1].map { number in
                try stage.start(
                    "python3", "-c", Self.writer, disk.file, journals[number], "\(round * 2 + number)",
                    "\(number * half)", "\(half)")
            }
            let enough = eventually {
                journals.allSatisfy { contents(of: $0).split(separator: "\n").count { $0 == "f" } >= 40 * round }
            }
            #expect(enough, "the writers do not get on")
            kill(disk.pid, SIGKILL)
            for writer in writers {
                let result = try writer.wait()
                #expect(result.status == 0, "\(result.errorText)")
            }
            return journals
        }

        private func expectUnclean(_ result: Subprocess.Result) {
            #expect(result.status == 2, "\(result.outputText)\(result.errorText)")
            #expect(result.outputText.contains("not closed"))
        }

        /// `vdumount` clears the dead mount; the image is repaired, and the repair changes nothing that can be read.
        private func expectRecovery(_ stage: Stage, _ image: String, _ folder: String, _ model: inout Model) throws {
            let cleared = try attempt(Programs.vdumount, folder)
            #expect(cleared.status == 0 && cleared.errorText.contains("dead mount"), "\(cleared.errorText)")
            // Read-only, what is unclean stays so.
            let unclean = try stage.fingerprint()
            var disk = try stage.mount(image)
            #expect(try model.firstMistake(in: disk.file) == nil)
            try disk.unmount()
            #expect(try stage.fingerprint() == unclean)

            expectUnclean(try attempt(Programs.vdimg, "check", image))
            for options in [["--repair"], []] {
                let result = try attempt([Programs.vdimg, "check"] + options + [image])
                #expect(result.status == 0, "\(options) \(result.outputText)\(result.errorText)")
            }
            disk = try stage.mount(image, "--rw")
            #expect(try model.firstMistake(in: disk.file) == nil)
            try tool("cp", "--sparse=always", disk.file, stage.file("copy.raw"))
            try disk.unmount()
            try expectEqual(image, toRaw: stage.file("copy.raw"))
        }

        /// An image that was not closed is taken over by the next read-write mount, and clean when that ends.
        @Test func mountClearsDeadMountAndUncleanMark() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 8 << 20)
                let folder = try stage.makeFolder("disk")
                var disk = try stage.mount(image, at: folder, options: ["--rw"])
                try qemuIO(disk.file, format: "raw", "write -P 3 1M 1M", "flush")
                kill(disk.pid, SIGKILL)
                expectEventually { !isRunning(disk.pid) }
                expectUnclean(try attempt(Programs.vdimg, "check", image))
                let result = try attempt(Programs.vdmount, "--rw", image, folder)
                #expect(
                    result.status == 0 && result.errorText.contains("cleared the dead mount"), "\(result.errorText)")
                disk = try MountedDisk(at: folder)
                try qemuIO(disk.file, format: "raw", "read -P 3 1M 1M")
                try disk.unmount()
                try tool(Programs.vdimg, "check", image)
                try tool("qemu-img", "check", "-q", image)
            }
        }

        /// A dead mount is cleared from under a loop device too.
        @Test func deadMountUnderLoopDevice() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 8 << 20)
                let disk = try stage.mount(image, "--rw")
                let device = try stage.attach(disk.file)
                kill(disk.pid, SIGKILL)
                expectEventually { !isRunning(disk.pid) }
                let result = try attempt(Programs.vdumount, disk.mountpoint)
                #expect(result.status == 0 && result.errorText.contains("dead mount"), "\(result.errorText)")
                #expect(stage.mounts().isEmpty)
                try stage.detach(device)
                try stage.mount(image, at: disk.mountpoint, options: ["--rw"]).unmount()
            }
        }

        /// The Swift runtime's locks do not survive a fork in the thread that forked: the daemon goes on in another
        /// one, and the first one does nothing, not even take signals. Otherwise one end in a hundred or so hangs.
        @Test func endsEveryTime() throws {
            try Stage.use(inMemory: true) { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                let place = try stage.makeMountpoint()
                for round in 0..<30 {
                    let disk = try stage.mount(image, at: place, options: ["--rw"])
                    let blocked = contents(of: "/proc/\(disk.pid)/status").split(separator: "\n")
                        .first { $0.hasPrefix("SigBlk:") }?.suffix(16)
                    let signals = UInt64(blocked ?? "", radix: 16) ?? 0
                    #expect(signals & 0x4003 == 0x4003, "the first thread takes signals")
                    try tool("cp", "--sparse=never", disk.file, "/dev/null")
                    let end = try attempt("timeout", "20", Programs.vdumount, place)
                    #expect(end.status == 0, "round \(round): \(end.errorText)")
                }
            }
        }

        /// Without a call of fsync nothing is lost either when some seconds have passed.
        @Test func unsyncedWritesSurviveAfterSomeSeconds() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 8 << 20)
                let disk = try stage.mount(image, "--rw")
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    _ = try file.write([UInt8](repeating: 7, count: 1 << 20), at: 3 << 20)
                    usleep(8_000_000)
                    kill(disk.pid, SIGKILL)
                    expectEventually { !isRunning(disk.pid) }
                }
                try tool(Programs.vdumount, disk.mountpoint)
                let again = try stage.mount(image)
                try qemuIO(again.file, format: "raw", readOnly: true, "read -P 7 3M 1M")
                try again.unmount()
            }
        }
    }
}

import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// Changes of a mounted chain that are stopped, killed, refused, or asked for by somebody who means no good.
    @Suite struct MountedChainSafetyTests {
        private static let size = 512 << 20
        /// So much must be copied that a merge can be met in the middle.
        private static let filled = 256 << 20

        /// A mounted disk of two images, of which the upper one holds much; what it must show is in `model`.
        private func mountChain(
            _ stage: Stage, _ options: [String] = ["--rw"]
        ) throws -> (disk: MountedDisk, base: String, top: String, model: String) {
            let base = try MountedKind(format: "qcow2", peer: "qcow2").make(stage, "disk", size: Self.size)
            let top = stage.file("disk-001.qcow2")
            try vdimg("snapshot", "--quiet", base)
            let model = try stage.makeRaw("model", size: Self.size)
            let writes = stride(from: 0, to: Self.filled, by: 64 << 20).map { start in
                "write -P \(start >> 26 + 1) \(start) 64M"
            }
            try qemuIO(top, format: "qcow2", writes)
            try qemuIO(model, format: "raw", writes)
            return (try stage.mount(top, at: stage.makeMountpoint(), options: options), base, top, model)
        }

        /// Starts a merge and answers when it is in the middle.
        private func beginMerge(_ stage: Stage, _ top: String, into base: String) throws -> RunningProgram {
            let before = try FileStatus(base).allocated
            let merge = try stage.start(Programs.vdimg, "merge", top)
            var isBegun = false
            for _ in 0..<20_000 where !isBegun {
                isBegun = try FileStatus(base).allocated > before + (16 << 20)
                usleep(1000)
            }
            #expect(isBegun)
            return merge
        }

        private func expectSame(_ image: String, _ model: String) throws {
            try tool("qemu-img", "check", "-q", "-f", "qcow2", image)
            let result = try attempt("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, model)
            #expect(result.status == 0, "\(result.outputText)\(result.errorText)")
        }

        enum End: CaseIterable, Sendable { case interrupt, terminate, kill }

        /// A merge that is stopped leaves the disk as it was, and the next one finishes.
        @Test(arguments: End.allCases) func stoppedMerge(_ end: End) throws {
            try Stage.use { stage in
                let (disk, base, top, model) = try mountChain(stage)
                let descriptors = try disk.descriptorCount()
                let merge = try beginMerge(stage, top, into: base)
                let result = try merge.end([.interrupt: SIGINT, .terminate: SIGTERM, .kill: SIGKILL][end] ?? 0)
                if end != .kill {
                    #expect(result.status == 1 && result.errorText.contains("stopped before it was done"), "\(result)")
                }
                try expectEventually { try disk.images() == [top, base] && disk.descriptorCount() <= descriptors + 4 }
                #expect(try differenceOfSparseFiles(disk.file, model) == nil)
                try qemuIO(disk.file, format: "raw", "write -P 99 100M 1M")
                try qemuIO(model, format: "raw", "write -P 99 100M 1M")
                try vdimg("merge", "--quiet", top)
                #expect(try disk.images() == [base])
                try disk.unmount()
                try expectSame(base, model)
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus(top) }
            }
        }

        /// A daemon that dies in the middle leaves a chain that shows what it did; unmounted or mounted, it is merged.
        @Test(arguments: [false, true]) func killedDaemon(_ isMountedAgain: Bool) throws {
            try Stage.use { stage in
                let (disk, base, top, model) = try mountChain(stage)
                let merge = try beginMerge(stage, top, into: base)
                kill(disk.pid, SIGKILL)
                expectRefused(try merge.wait(), disk.mountpoint, "ended before it was done")
                try tool(Programs.vdumount, disk.mountpoint)
                if isMountedAgain {
                    let again = try stage.mount(top, "--rw")
                    #expect(try differenceOfSparseFiles(again.file, model) == nil)
                    try vdimg("merge", "--quiet", top)
                    try again.unmount()
                } else {
                    try vdimg("merge", "--quiet", top)
                }
                try expectSame(base, model)
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus(top) }
            }
        }

        /// To unmount stops a merge, and ends cleanly.
        @Test(arguments: [false, true]) func unmountedInTheMiddle(_ bySignal: Bool) throws {
            try Stage.use { stage in
                let (disk, base, top, model) = try mountChain(stage)
                let merge = try beginMerge(stage, top, into: base)
                if bySignal {
                    kill(disk.pid, SIGTERM)
                    expectEventually { !isRunning(disk.pid) }
                } else {
                    try disk.unmount()
                }
                let result = try merge.wait()
                #expect(result.status == 1 && !result.errorText.isEmpty, "\(result)")
                try expectSame(top, model)
                try vdimg("merge", "--quiet", top)
                try expectSame(base, model)
            }
        }

        /// Questions are answered while a merge goes on.
        @Test func listDuringAMerge() throws {
            try Stage.use { stage in
                let (disk, base, top, model) = try mountChain(stage)
                let merge = try beginMerge(stage, top, into: base)
                #expect(try disk.images().contains(base))
                let second = try attempt(Programs.vdimg, "merge", top)
                if second.status == 1 {
                    #expect(
                        second.errorText.contains("another change") || second.errorText.contains("no such file")
                            || second.errorText.contains("changed meanwhile")
                            // What is not needed any more is emptied before it is removed.
                            || second.errorText.contains("no parent to merge"), "\(second.errorText)")
                }
                #expect(try merge.wait().status == 0)
                try disk.unmount()
                try expectSame(base, model)
            }
        }

        // MARK: - Refusals

        @Test func refusals() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 4 << 20)
                let top = try stage.makeSnapshot("top.vmdk", of: base)
                let disk = try stage.mount(top)
                expectRefused(try attempt(Programs.vdimg, "merge", base), "name its top image, \(top)")
                let other = try stage.mount(top)
                expectRefused(try attempt(Programs.vdimg, "merge", top), "mounted more than once")
                try other.unmount()
                try tool("mv", base, stage.file("moved.vmdk"))
                #expect(try attempt(Programs.vdimg, "merge", top).status == 1)
                try tool("mv", stage.file("moved.vmdk"), base)
                let child = try stage.makeSnapshot("other.vmdk", of: base)
                expectRefused(try attempt(Programs.vdimg, "merge", top), child)
                unsafe unlink(child)
                try vdimg("merge", "--quiet", top)
                try disk.unmount()
            }
        }

        /// An image that another program has open is refused as ever.
        @Test func lockedByQEMU() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 4 << 20)
                let top = try stage.makeSnapshot("top.vmdk", of: base)
                let daemon = try stage.start(
                    "qemu-storage-daemon", "--blockdev",
                    "driver=vmdk,node-name=n,file.driver=file,file.filename=\(top)",
                    "--nbd-server", "addr.type=unix,addr.path=\(stage.file("nbd"))", "--export",
                    "type=nbd,id=e,node-name=n,writable=on")
                expectEventually { (try? FileStatus(stage.file("nbd"))) != nil }
                let refused = try attempt(Programs.vdimg, "merge", top)
                expectRefused(refused, "by process \(daemon.pid)")
                try daemon.end(SIGTERM)
            }
        }

        /// An image that QEMU reads below a mounted one cannot be written; nothing has changed then.
        @Test func targetIsReadByAnother() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 4 << 20)
                let top = try stage.makeSnapshot("top.vmdk", of: base)
                let disk = try stage.mount(top, "--rw")
                let other = try stage.mount(base)
                try qemuIO(disk.file, format: "raw", "write -P 5 0 1M")
                expectRefused(try attempt(Programs.vdimg, "merge", top), base, "in use by")
                #expect(try disk.images() == [top, base])
                try qemuIO(disk.file, format: "raw", "read -P 5 0 1M", "write -P 6 1M 1M")
                try other.unmount()
                try vdimg("merge", "--quiet", top)
                try disk.unmount()
                try qemuIO(base, readOnly: true, "read -P 5 0 1M", "read -P 6 1M 1M")
            }
        }

        // MARK: - Clients that mean no good, or die

        /// What such a client says; between its tries it asks whether the daemon still answers.
        private static let hostile = """
            import array, json, os, socket, sys, threading
            path, top, base, other = sys.argv[1:]
            def connect():
                s = socket.socket(socket.AF_UNIX)
                s.settimeout(20)
                s.connect(path)
                return s
            def ask(text):
                s = connect()
                s.sendall(text)
                s.shutdown(socket.SHUT_WR)
                return s.makefile().read()
            def chain():
                answer = ask(b"chain\\n")
                assert answer.startswith("ok\\n{"), answer
                return json.loads(answer[3:])
            def order(*steps):
                s = connect()
                try:
                    for text, files in steps:
                        socket.send_fds(s, [text], files) if files else s.sendall(text)
                    s.shutdown(socket.SHUT_WR)
                    return s.makefile().read()
                except (BrokenPipeError, ConnectionResetError):
                    return "error"
            def files(name):
                return [os.open(name, os.O_RDWR), os.open(name, os.O_RDONLY)]
            generation = chain()["generation"]
            merge = b"merge %d 0 1 remove\\n" % generation
            pipe = os.pipe()
            folder = os.open("/", os.O_RDONLY)
            character = os.open("/dev/zero", os.O_RDWR)
            path_only = os.open(base, os.O_PATH)
            write_only = os.open(base, os.O_WRONLY)
            wrong = files(other)
            right = files(base)
            upper = files(top)
            for steps in [
                [(b"merge\\n", [])], [(b"merge 0 0\\n", [])], [(b"merge %d 0 9 remove\\n" % generation, [])],
                [(b"merge %d 0 0 remove\\n" % generation, [])], [(b"merge %d -1 1 remove\\n" % generation, [])],
                [(b"merge 77 0 1 remove\\n", []), (b"go\\n", [])],
                [(b"merge 99999999999999999999 0 1 remove\\n", [])],
                [(merge, []), (b"file\\n", wrong), (b"go\\n", [])],
                [(merge, []), (b"file\\n", list(pipe)), (b"go\\n", [])],
                [(merge, []), (b"file\\n", [folder, folder]), (b"go\\n", [])],
                [(merge, []), (b"file\\n", [character, character]), (b"go\\n", [])],
                [(merge, []), (b"file\\n", [path_only, path_only]), (b"go\\n", [])],
                [(merge, []), (b"file\\n", [write_only, write_only]), (b"go\\n", [])],
                [(merge, []), (b"file\\n", right * 50), (b"go\\n", [])],
                [(merge, []), (b"file\\n", []), (b"go\\n", [])],
                [(merge, []), (b"go\\n", right)],
                [(merge, []), (b"file\\n", right), (b"fi", [])],
                [(merge, []), (b"gone\\n", [right[0]]), (b"go\\n", [])],
                [(merge, []), (b"gone\\n", [wrong[0]]), (b"go\\n", [])],
                [(merge, []), (b"gone\\n", upper), (b"go\\n", [])],
                [(merge, []), (b"file\\n", [right[1]]), (b"go\\n", [])],
                [(merge, []), (b"image raw /etc/passwd\\n", []), (b"file\\n", wrong), (b"go\\n", [])],
                [(merge, []), (b"x" * 100000, []), (b"go\\n", [])],
                [(merge, []), (bytes(range(256)) * 40, right)],
                [(merge, right)], [(b"status\\n" + merge, right * 100)],
                [(b"snapshot %d\\n" % generation, []), (b"go\\n", [])],
                [(b"snapshot %d\\n" % generation, []), (b"image vmdk " + other.encode() + b"\\n", []),
                 (b"file\\n", right), (b"go\\n", [])],
                [(b"snapshot %d\\n" % generation, []), (b"image vmdk " + other.encode() + b"\\n", []),
                 (b"file\\n", wrong), (b"file\\n", upper), (b"go\\n", [])],
                [(b"snapshot %d\\n" % generation, []), (b"companion a " + other.encode() + b"\\n", []),
                 (b"file\\n", wrong), (b"go\\n", [])],
                [(b"snapshot\\n", [])], [(b"forget\\n", [])], [(b"forget -1\\n", [])], [(b"forget 1e99\\n", [])],
            ]:
                answer = order(*steps)
                assert not answer.startswith("done"), (steps, answer)
                assert "\\ndone" not in answer, (steps, answer)
                assert chain()["generation"] == generation, steps
            # Left open, with half a line and descriptors that wait.
            idle = [connect() for _ in range(3)]
            for s in idle:
                try:
                    socket.send_fds(s, [b"merge"], right)
                except OSError:
                    pass
            busy = connect()
            busy.sendall(merge)
            assert chain()["generation"] == generation, "while idle"
            for s in idle + [busy]:
                s.close()
            """

        @Test func hostileClient() throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 4 << 20)
                let top = try stage.makeSnapshot("top.vmdk", of: base)
                let other = try stage.makeImage("other.vmdk", size: 4 << 20)
                let disk = try stage.mount(top, "--rw")
                try qemuIO(disk.file, format: "raw", "write -P 5 0 1M", "flush")
                // What the threads of Dispatch have open is open now.
                let program = ["python3", "-c", Self.hostile, try disk.controlSocket(), top, base, other]
                try tool(program)
                let count = try disk.descriptorCount()
                try tool(program)
                try expectEventually { try disk.descriptorCount() <= count }
                #expect(try disk.images() == [top, base])
                try qemuIO(disk.file, format: "raw", "read -P 5 0 1M")
                try vdimg("merge", "--quiet", top)
                try disk.unmount()
                try qemuIO(base, readOnly: true, "read -P 5 0 1M")
                try tool("qemu-img", "check", "-q", other)
            }
        }

        /// A client that dies when the images have changed places, and has removed nothing: the image that is left
        /// holds nothing that could be read over what is written since, and the same command removes it.
        @Test func clientDiesBeforeItHasRemoved() throws {
            try Stage.use { stage in
                let base = try MountedKind(format: "qcow2", peer: "qcow2").make(stage, "disk", size: 4 << 20)
                try vdimg("snapshot", "--quiet", base)
                let top = stage.file("disk-001.qcow2")
                let disk = try stage.mount(top, "--rw")
                try qemuIO(disk.file, format: "raw", "write -P 5 0 1M", "flush")
                let client = """
                    import os, socket, sys
                    path, top, base = sys.argv[1:]
                    s = socket.socket(socket.AF_UNIX)
                    s.connect(path)
                    s.sendall(b"merge 0 0 1 remove\\n")
                    socket.send_fds(s, [b"file\\n"], [os.open(base, mode) for mode in [os.O_RDWR, os.O_RDONLY] * 3])
                    socket.send_fds(s, [b"gone\\n"], [os.open(top, os.O_RDWR)])
                    s.sendall(b"go\\n")
                    lines = s.makefile().read().split("\\n")
                    assert lines[-2].startswith("done"), lines
                    """
                try tool("python3", "-c", client, try disk.controlSocket(), top, base)
                #expect(try disk.images() == [base])
                #expect(try FileStatus(top).size == 0)
                try qemuIO(disk.file, format: "raw", "read -P 5 0 1M", "write -P 6 0 64k", "flush")
                let said = try vdimg("merge", top)
                #expect(said.contains("merged into \(base)"))
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus(top) }
                try disk.unmount()
                try qemuIO(base, format: "qcow2", readOnly: true, "read -P 6 0 64k", "read -P 5 64k 960k")
            }
        }

        /// A snapshot whose client dies before the image is on top changes nothing.
        @Test func snapshotThatIsNotGivenAway() throws {
            try Stage.use { stage in
                let base = try MountedKind.all[0].make(stage, "disk", size: 4 << 20)
                let disk = try stage.mount(base, "--rw")
                try qemuIO(disk.file, format: "raw", "write -P 5 0 1M", "flush")
                let client = """
                    import socket, sys
                    s = socket.socket(socket.AF_UNIX)
                    s.connect(sys.argv[1])
                    s.sendall(b"snapshot 0\\n")
                    assert s.recv(100) == b"ready\\n"
                    """
                try tool("python3", "-c", client, try disk.controlSocket())
                try vdimg("snapshot", "--quiet", base)
                try qemuIO(disk.file, format: "raw", "read -P 5 0 1M", "write -P 6 0 64k")
                try disk.unmount()
                let image = try stage.mount(stage.file("disk-001.vmdk"))
                try qemuIO(image.file, format: "raw", readOnly: true, "read -P 6 0 64k", "read -P 5 64k 960k")
                try image.unmount()
            }
        }

        /// A name that is taken: the disk goes on with the image that it has.
        @Test func failedSnapshot() throws {
            try Stage.use { stage in
                let base = try MountedKind.all[0].make(stage, "disk", size: 4 << 20)
                let disk = try stage.mount(base, "--rw")
                try writeFile(stage.file("taken.vmdk"), "mine")
                expectRefused(try attempt(Programs.vdimg, "snapshot", base, stage.file("taken.vmdk")), "taken.vmdk")
                #expect(contents(of: stage.file("taken.vmdk")) == "mine")
                // Blocks larger than any region of the open disk: the daemon refuses it.
                let large = stage.file("large.vhdx")
                let result = try attempt(Programs.vdimg, "snapshot", "--block-size", "256M", base, large)
                #expect(result.status == 1, "\(result.errorText)")
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus(large) }
                #expect(try disk.images() == [base])
                try qemuIO(disk.file, format: "raw", "write -P 5 0 1M", "read -P 5 0 1M")
                try disk.unmount()
            }
        }
    }
}

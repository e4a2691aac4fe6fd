import DiskTesting
import Glibc
import Testing

/// A program that reads a mounted disk, and writes to it, past the page cache, and knows at any moment what it must
/// hold.
struct Guest {
    /// Ends when the file `stop` is there; then the model is what the disk must hold. A mistake ends it at once.
    private static let program = """
        import mmap, os, random, sys
        path, model_path, stop, seed, writes = sys.argv[1:]
        model = bytearray(open(model_path, "rb").read())
        size = len(model)
        disk = os.open(path, (os.O_RDWR if writes == "1" else os.O_RDONLY) | os.O_DIRECT)
        view = memoryview(mmap.mmap(-1, 1 << 20))
        choice = random.Random(int(seed))
        pool = choice.randbytes(1 << 20)
        count = 0
        while not os.path.exists(stop):
            count += 1
            if count == 10:
                open(stop + ".begun", "w").close()
            length = choice.choice((512, 4096, 4096, 12288, 65536, 200704))
            offset = choice.randrange((size - length) // 512 + 1) * 512
            kind = choice.randrange(6) if writes == "1" else 0
            if kind < 3:
                done = os.preadv(disk, [view[:length]], offset)
                if done != length or view[:length] != model[offset:offset + length]:
                    bad = next((i for i in range(length) if view[i] != model[offset + i]), -1)
                    sys.exit("step %d: %d of %d bytes at %d, the first wrong one at %d"
                             % (count, done, length, offset, bad))
            elif kind < 5:
                start = choice.randrange((len(pool) - length) // 512 + 1) * 512
                view[:length] = pool[start:start + length] if kind == 3 else bytes(length)
                os.pwritev(disk, [view[:length]], offset)
                model[offset:offset + length] = view[:length]
            elif count % 8 == 0:
                os.fsync(disk)
        if writes == "1":
            os.fsync(disk)
        open(model_path, "wb").write(model)
        print(count)
        """

    private let process: RunningProgram
    private let stop: String

    /// Starts it on a file whose content is that of the file `model`.
    init(_ stage: Stage, on disk: MountedDisk, model: String, isWriting: Bool, seed: Int = 1) throws {
        stop = model + ".stop"
        unsafe unlink(stop)
        unsafe unlink(stop + ".begun")
        process = try stage.start(
            "python3", "-c", Self.program, disk.file, model, stop, "\(seed)", isWriting ? "1" : "0")
        // One that has ended already has found a mistake, and says so in the end.
        expectEventually { unsafe access(stop + ".begun", F_OK) == 0 || !isRunning(process.pid) }
    }

    /// Lets it end, and expects that it has seen what it wrote.
    func end(_ sourceLocation: SourceLocation = #_sourceLocation) throws {
        try writeFile(stop, "")
        let result = try process.wait()
        #expect(
            result.status == 0 && (Int(result.outputText.filter { $0 != "\n" }) ?? 0) > 0,
            "\(result.outputText)\(result.errorText)", sourceLocation: sourceLocation)
    }
}

extension MountedDisk {
    /// The images of it, the top one first, as the daemon says.
    func images() throws -> [String] {
        let program = """
            import json, sys
            for mount in json.load(sys.stdin):
                if mount["mountpoint"] == sys.argv[1]:
                    print(*[image["path"] for image in mount["images"]], sep="\\n")
            """
        let list = try tool(Programs.vdmount, "--list", "--json")
        let said = try Subprocess.run(["python3", "-c", program, mountpoint], input: Array(list.utf8))
        return said.outputText.split(separator: "\n").map(String.init)
    }

    /// How many descriptors its daemon has open.
    func descriptorCount() throws -> Int { try tool("ls", "/proc/\(pid)/fd").split(separator: "\n").count }

    /// Its control socket.
    func controlSocket() throws -> String {
        try tool("sh", "-c", "ls /run/vdmount/*-\(pid).control").split(separator: "\n").map(String.init)[0]
    }
}

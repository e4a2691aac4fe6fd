import DiskStorage
import DiskTesting
import Testing

/// What the kernel is asked for by a program that says that its work is on stable storage.
struct StableStorageTests {
    /// A way to make an image, and what it is called.
    struct Target: Sendable, CustomTestStringConvertible {
        let name: String
        let options: [String]
        var testDescription: String { ([name] + options).joined(separator: " ") }
    }

    static let targets = [
        Target(name: "new.raw", options: ["--to", "raw"]),
        Target(name: "new.vmdk", options: []),
        Target(name: "new.vmdk", options: ["--variant", "split"]),
        Target(name: "new.vmdk", options: ["--variant", "fixed"]),
        Target(name: "new.vmdk", options: ["--variant", "stream"]),
        Target(name: "new.vdi", options: []),
        Target(name: "new.vhd", options: []),
        Target(name: "new.vhd", options: ["--variant", "fixed"]),
        Target(name: "new.vhdx", options: []),
        Target(name: "new.qed", options: []),
        Target(name: "new.qcow2", options: []),
        Target(name: "new.qcow2", options: ["--compress"]),
    ]

    @Test(arguments: targets) func everythingThatIsWrittenIsSynced(_ target: Target) throws {
        let folder = try TemporaryFolder()
        let unsynced = try convert(target, [], in: folder)
        #expect(unsynced.written > 0)
        #expect(unsynced.left == [])
    }

    @Test(arguments: targets) func nothingIsWaitedForIfThatIsAsked(_ target: Target) throws {
        let folder = try TemporaryFolder()
        #expect(try convert(target, ["--no-sync"], in: folder).syncs == 0)
    }

    /// Files that were written to, those of them that were changed after they were synced last, and how often any was.
    private func convert(
        _ target: Target, _ options: [String], in folder: TemporaryFolder
    ) throws -> (written: Int, left: Set<String>, syncs: Int) {
        let source = folder.file("source.raw")
        var generator = SeededGenerator(seed: 3)
        let file = try FileStorage(creating: source)
        for place in 0..<6 {
            let bytes = RandomPool(seed: 3).bytes(1 << 20, using: &generator)
            try file.write(bytes, at: UInt64(place) << 21, for: .guestData)
        }
        try file.setLength(12 << 20)
        let log = folder.file("calls")
        let calls = "pwrite64,ftruncate,fallocate,copy_file_range,fdatasync,fsync"
        let result = try Subprocess.run(
            ["strace", "-f", "-y", "-s", "0", "-e", "trace=\(calls)", "-o", log, Programs.vdimg, "convert", "--quiet"]
                + options + ["--format", "raw"] + target.options + [source, folder.file(target.name)])
        #expect(result.status == 0, "\(result.errorText)")
        var written: Set<String> = []
        var left: Set<String> = []
        var syncs = 0
        var underWay: [Substring: String] = [:]
        // 4711  pwrite64(5</tmp/new.vmdk>, ""..., 512, 0) = 512; a call during which another thread calls is two lines:
        // 4711  pwrite64(5</tmp/new.vmdk>, ""..., 512, 0 <unfinished ...> and 4711  <... pwrite64 resumed>) = 512.
        // A sync is sure of what had been written when it began, and a write is over when it ends.
        for line in try Subprocess.run(["cat", log]).outputText.split(separator: "\n") {
            guard let thread = line.split(separator: " ").first else { continue }
            if line.contains("<... ") {
                guard let path = underWay.removeValue(forKey: thread) else { continue }
                left.insert(path)
                continue
            }
            guard let open = line.firstRange(of: "</")?.lowerBound, let close = line[open...].firstIndex(of: ">") else {
                continue
            }
            let path = String(line[line.index(after: open)..<close])
            if line.contains("sync(") {
                left.remove(path)
                syncs += 1
            } else {
                written.insert(path)
                if line.hasSuffix("<unfinished ...>") { underWay[thread] = path } else { left.insert(path) }
            }
        }
        return (written.count, left, syncs)
    }
}

import DiskPartitions
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// The free space of ext4: what is dropped is what was free, and nothing else, by the judgement of e2fsck.
@Suite(.serialized) struct FreeSpaceTests {
    /// How a file system is made.
    struct Making: Sendable, CustomTestStringConvertible {
        let options: [String]
        var program = "mkfs.ext4"
        var testDescription: String { ([program] + options).joined(separator: " ") }
    }

    static let makings = [
        Making(options: []), Making(options: ["-O", "^64bit"]), Making(options: ["-O", "bigalloc", "-C", "65536"]),
        Making(options: ["-O", "meta_bg,^resize_inode"]), Making(options: ["-O", "^metadata_csum"]),
        Making(options: ["-O", "^metadata_csum,uninit_bg"]), Making(options: ["-O", "^metadata_csum,^uninit_bg"]),
        Making(options: ["-b", "1024"]), Making(options: ["-b", "1024", "-O", "meta_bg,^resize_inode"]),
        Making(options: ["-b", "2048", "-O", "^flex_bg"]), Making(options: ["-O", "sparse_super2"]),
        Making(options: ["-O", "metadata_csum_seed"]),
        Making(options: ["-b", "1024", "-O", "bigalloc", "-C", "16384"]),
        Making(options: ["-O", "^has_journal"]), Making(options: [], program: "mkfs.ext2"),
        Making(options: [], program: "mkfs.ext3"),
    ]

    private static let size = 200 << 20

    /// A file system with files, some of which are deleted again; answers their checksums.
    private func makeFileSystem(_ making: Making, in folder: TemporaryFolder) throws -> (path: String, sums: String) {
        let path = folder.file("fs.raw")
        try Peer.run("truncate", "-s", "\(Self.size)", path)
        try Self.makeFileSystem([making.program, "-E", "lazy_itable_init=0"] + making.options, path)
        let place = folder.file("mnt")
        try Peer.run("mkdir", place)
        try Peer.run("mount", "-o", "loop", path, place)
        var sums = ""
        do {
            defer { _ = try? Subprocess.run(["umount", place]) }
            let script = """
                cd "$1"
                for i in $(seq 1 60); do
                    head -c $((i * 40000)) /dev/urandom > keep$i
                    head -c 1500000 /dev/urandom > gone$i 2>/dev/null || true
                done
                sync
                rm -f gone*
                sha256sum keep*
                """
            sums = try Peer.run("sh", "-c", script, "sh", place)
        }
        return (path, sums)
    }

    private static func makeFileSystem(_ command: [String], _ path: String) throws {
        let result = try Subprocess.run(command + ["-q", "-F", path])
        try #require(result.status == 0, "\(command): \(result.errorText)")
    }

    private func freeBytes(_ path: String) throws -> UInt64 {
        let text = try Peer.run("dumpe2fs", "-h", path)
        func number(_ name: String) -> UInt64 {
            let line = text.split(separator: "\n").first { $0.hasPrefix(name) } ?? ""
            return UInt64(line.split(separator: " ").last ?? "") ?? 0
        }
        return number("Free blocks:") * number("Block size:")
    }

    @Test(arguments: makings) func dropsWhatIsFree(_ making: Making) throws {
        let folder = try TemporaryFolder()
        let made = try makeFileSystem(making, in: folder)
        let image = folder.file("disk.vmdk")
        try Peer.run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", made.path, image)
        let free = try freeBytes(made.path)
        // What the reader finds is what the file system says.
        let raw = try Disk.open(made.path, options: DiskOptions(format: "raw"))
        let found = try FreeSpace.find(in: raw)
        #expect(found.fileSystems.count == 1 && found.notes.isEmpty, "\(making): \(found.notes)")
        var sum: UInt64 = 0
        var end: UInt64 = 0
        for fileSystem in found.fileSystems {
            try fileSystem.forEachFreeRun(in: raw) { run in
                #expect(run.lowerBound >= end && !run.isEmpty && run.upperBound <= UInt64(Self.size))
                end = run.upperBound
                sum += run.upperBound - run.lowerBound
            }
        }
        try raw.close()
        // (Groups that were never used are counted by what the layout says; where that is not sure they are left out.)
        #expect(sum <= free && sum >= free / 10 * 9, "\(making): \(sum) of \(free) bytes")
        var options = ImageCompaction.Options()
        options.dropsFreeSpace = true
        let result = try ImageCompaction.run(image, compaction: options)
        #expect(result.notes.isEmpty, "\(making): \(result.notes)")
        #expect(result.freeBytes > free / 2, "\(making): \(result.freeBytes) of \(free)")
        #expect(result.after.allocatedBytes < result.before.allocatedBytes / 3 * 2, "\(making): \(result)")
        #expect(result.after.allocatedBytes < UInt64(Self.size) - free + (24 << 20), "\(making): \(result)")
        try expectIntact(image, made.sums, folder, "\(making)")
    }

    /// The file system is clean, and all its files are what they were.
    private func expectIntact(
        _ image: String, _ sums: String, _ folder: TemporaryFolder, _ context: String
    ) throws {
        let flat = folder.file("flat.raw")
        try Peer.run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, flat)
        let check = try Subprocess.run(["e2fsck", "-fn", flat])
        #expect(check.status == 0, "\(context): \(check.outputText)\(check.errorText)")
        let place = folder.file("mnt")
        try Peer.run("mount", "-o", "loop,ro", flat, place)
        defer { _ = try? Subprocess.run(["umount", place]) }
        #expect(try Peer.run("sh", "-c", "cd \"$1\"; sha256sum keep*", "sh", place) == sums, "\(context)")
    }

    /// A file system in a partition; and one that is left alone, for each reason that there is.
    @Test func leavesOthersAlone() throws {
        let folder = try TemporaryFolder()
        let made = try makeFileSystem(Making(options: []), in: folder)
        for (name, change) in [
            ("journal", { (bytes: inout [UInt8]) in bytes[96] |= 4 }),
            ("mounted", { (bytes: inout [UInt8]) in bytes[58] = 0 }),
            ("errors", { (bytes: inout [UInt8]) in bytes[58] = 3 }),
            ("unknown", { (bytes: inout [UInt8]) in bytes[99] |= 0x40 }),
            ("unknown ro", { (bytes: inout [UInt8]) in bytes[103] |= 0x40 }),
            ("checksum", { (bytes: inout [UInt8]) in bytes[120] ^= 1 }),
        ] as [(String, (inout [UInt8]) -> Void)] {
            let copy = folder.file("copy.raw")
            try Peer.run("cp", "--sparse=always", made.path, copy)
            let file = try FileStorage(path: copy, isWritable: true)
            var block = try file.bytes(at: 1024, count: 1024, for: .header, "the superblock")
            change(&block)
            try file.write(block, at: 1024, for: .header)
            var options = ImageCompaction.Options()
            options.dropsFreeSpace = true
            let result = try ImageCompaction.run(copy, options: DiskOptions(format: "raw"), compaction: options)
            #expect(result.freeBytes == 0 && result.notes.count == 2, "\(name): \(result.notes)")
            // (The other note is that a raw image keeps its blocks.)
            unsafe unlink(copy)
        }
    }

    /// Bytes that lie: no trap, no endless loop, and nothing that a checksum covers is believed.
    @Test func hostileBytes() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("fs.raw")
        var generator = SeededGenerator(seed: 77)
        for options in [["-b", "1024"], ["-b", "1024", "-O", "^metadata_csum,^uninit_bg"]] {
            try Peer.run("truncate", "-s", "20M", path)
            try Self.makeFileSystem(["mkfs.ext4"] + options, path)
            let file = try FileStorage(path: path, isWritable: true)
            let bytes = try file.bytes(at: 0, count: 1 << 20, for: .header, "the file system")
            for round in 0..<2000 {
                var copy = bytes
                // The superblock, the descriptors, and what follows.
                for _ in 0..<Int.random(in: 1...4, using: &generator) {
                    let place =
                        round % 3 == 0
                        ? Int.random(in: 1024..<2048, using: &generator)
                        : Int.random(in: 2048..<16_384, using: &generator)
                    copy[place] = UInt8.random(in: 0...255, using: &generator)
                }
                let source = try StorageSource(MemoryStorage(copy), size: 20 << 20)
                guard let found = try? FreeSpace.find(in: source) else { continue }
                for fileSystem in found.fileSystems {
                    try? fileSystem.forEachFreeRun(in: source) { run in
                        #expect(run.upperBound <= 20 << 20 && !run.isEmpty)
                    }
                }
            }
            unsafe unlink(path)
        }
    }
}

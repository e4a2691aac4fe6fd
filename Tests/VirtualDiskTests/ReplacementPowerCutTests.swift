import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// The power fails while an image is made anew in its place: the file system, when it is mounted again, has the old
/// image or the new one under the image's name, every byte of it; once the call has returned, the new one.
///
/// What a disk holds when the power fails is a clone of the file in which the file system lies: the kernel makes it in
/// one step between two writes of the loop device.
@Suite(.serialized) struct ReplacementPowerCutTests {
    /// A file system and the file that it lies in, on another one that can clone files.
    private final class CutDisk: Sendable {
        let type: String
        let folder: TemporaryFolder
        let outer: LoopFileSystem
        let inner: LoopFileSystem
        private let cuts = Locked(0)

        init(_ type: String) throws {
            self.type = type
            folder = try TemporaryFolder()
            outer = try LoopFileSystem("xfs", in: folder, name: "outer", size: 2 << 30)
            do {
                let size: UInt64 = type == "ext4" ? 64 << 20 : 320 << 20
                inner = try LoopFileSystem(type, in: TemporaryFolder(existing: outer.path), name: "inner", size: size)
            } catch {
                outer.unmount()
                throw error
            }
        }

        /// What the disk holds at this moment; answers the file with it.
        func cut() throws -> String {
            let number = cuts.withLock { count in
                count += 1
                return count
            }
            let path = "\(outer.path)/cut-\(number)"
            let source = try FileStorage(path: inner.file, isWritable: false)
            let clone = try FileStorage(creating: path)
            let transfer = RangeTransfer(from: source, to: clone)
            guard try transfer?.transfer(from: 0, to: 0, length: source.length()) == true else {
                throw DiskError(.unsupported, "the file system's file cannot be cloned")
            }
            return path
        }

        /// Mounts what a cut has left, and looks into it.
        func examine(_ cut: String, _ body: (String) throws -> Void) throws {
            let system = try LoopFileSystem(existing: type, file: cut, at: "\(outer.path)/examined")
            let result = Result { try body(system.path) }
            try unmount(system)
            try result.get()
        }

        private func unmount(_ system: LoopFileSystem) throws {
            try system.detach()
            // It is known by its UUID, which all cuts have.
            if type == "btrfs" { try Peer.run("btrfs", "device", "scan", "--forget") }
        }

        /// Ends what goes on on the disk.
        func unmount() throws { try unmount(inner) }

        deinit {
            _ = try? Subprocess.run(["umount", "-q", inner.path])
            outer.unmount()
        }
    }

    /// Moments, and the states of the image that may be found there.
    private struct Cut {
        let file: String
        let allowed: [[UInt8]]
        let name: String
    }

    private static let size = (5 << 20) + 3 * 512
    /// Cuts that are looked into of those made during one conversion.
    private static let examinedCuts = 8

    /// What the image is made, one after the other; nil: the same again, without what it does not need.
    private static let formats: [String?] = [
        nil, "qcow2", nil, "vmdk", "vhdx", "vhd", nil, "vdi", "qed", "raw", "vmdk",
    ]

    @Test(arguments: ["ext4", "xfs", "btrfs"]) func oldOrNew(_ type: String) throws {
        let disk = try CutDisk(type)
        let path = "\(disk.inner.path)/disk.img"
        let (model, first) = try Self.makeImage(path)
        try Peer.run("sync", "-f", path)
        var before = first
        var cuts: [Cut] = []
        var isRaw = false
        for (number, format) in Self.formats.enumerated() {
            let name = "\(type), step \(number), \(format ?? "the same format")"
            let atRest = try disk.cut()
            var replacement = ImageReplacement(path, options: DiskOptions(format: isRaw ? "raw" : nil))
            replacement.format = format
            let (files, ended) = try Self.cutWhile(disk) { [replacement] in try replacement.run() }
            isRaw = format == "raw"
            let after = try Self.content(path)
            #expect(format == nil || after != before, "\(name): nothing was replaced")
            cuts.append(Cut(file: atRest, allowed: [before], name: "\(name), before"))
            // (To mount them all would take long.)
            for file in files.shuffled().prefix(Self.examinedCuts) {
                cuts.append(Cut(file: file, allowed: [before, after], name: "\(name), during"))
            }
            cuts.append(Cut(file: ended, allowed: [after], name: "\(name), after"))
            before = after
        }
        try Self.expect(model, path)
        try disk.unmount()
        for cut in cuts { try Self.verify(cut, disk) }
    }

    /// That the cuts show what was not made durable: a new file that is renamed over the old one without a flush.
    @Test func cutsShowWhatIsNotDurable() throws {
        let disk = try CutDisk("xfs")
        let path = "\(disk.inner.path)/disk.img"
        let (_, before) = try Self.makeImage(path)
        try Peer.run("sync", "-f", path)
        let new = [UInt8](repeating: 7, count: before.count)
        try FileStorage(creating: path + ".new").write(new, at: 0, for: .guestData)
        #expect(unsafe rename(path + ".new", path) == 0)
        // The name is durable then.
        let folder = unsafe open(disk.inner.path, O_RDONLY | O_DIRECTORY)
        #expect(fsync(folder) == 0)
        close(folder)
        let cut = try disk.cut()
        try disk.unmount()
        try disk.examine(cut) { path in
            let found = try Self.content("\(path)/disk.img")
            #expect(found != before && found != new)
        }
    }

    /// An image with things in it that a new one does not need; answers what its disk shows and its file's bytes.
    private static func makeImage(_ path: String) throws -> (DiskModel, [UInt8]) {
        var model = DiskModel(size: size)
        var image = NewImage(path: path)
        (image.format, image.size) = ("vdi", UInt64(size))
        try image.create()
        let pool = RandomPool(seed: 5)
        var generator = SeededGenerator(seed: 5)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        for offset in [0, 1_500_000, size - 700_000] {
            let bytes = pool.bytes(700_000, using: &generator)
            try disk.write(bytes, at: UInt64(offset))
            model.write(bytes, at: offset)
        }
        try disk.write([UInt8](repeating: 0, count: 400_000), at: 100_000)
        model.zero(100_000..<500_000)
        try disk.close()
        return (model, try content(path))
    }

    private static func expect(_ model: DiskModel, _ path: String) throws {
        let disk = try Disk.open(path)
        #expect(try model.mistake(of: disk, in: 0..<size) == nil)
        try disk.close()
    }

    private static func content(_ path: String) throws -> [UInt8] {
        let file = try FileStorage(path: path, isWritable: false)
        return try file.availableBytes(at: 0, count: Int(file.length()), for: .guestData)
    }

    /// Cuts the power again and again while `body` runs, and once more when it is over.
    private static func cutWhile(
        _ disk: CutDisk, _ body: @escaping @Sendable () throws -> Void
    ) throws -> (during: [String], after: String) {
        let isOver = Locked(false)
        let during = Locked<[String]>([])
        let failures = Locked<[any Error]>([])
        onThreads(2) { number in
            do {
                if number == 0 {
                    defer { isOver.withLock { $0 = true } }
                    try body()
                } else {
                    while !isOver.withLock({ $0 }) {
                        let file = try disk.cut()
                        during.withLock { $0.append(file) }
                    }
                }
            } catch {
                failures.withLock { $0.append(error) }
            }
        }
        if let error = failures.withLock({ $0.first }) { throw error }
        return (during.withLock { $0 }, try disk.cut())
    }

    private static func verify(_ cut: Cut, _ disk: CutDisk) throws {
        try disk.examine(cut.file) { path in
            let found = try content("\(path)/disk.img")
            #expect(
                cut.allowed.contains(found),
                "\(cut.name): \(found.count) bytes, neither the old image (\(cut.allowed[0].count)) nor the new one")
        }
        unsafe unlink(cut.file)
    }
}

import DiskStorage
import DiskTesting
import Glibc

/// A file system in a file, mounted.
final class LoopFileSystem: Sendable {
    /// Where it is mounted.
    let path: String
    /// The file that it is in.
    let file: String
    private let options: String

    /// Makes a new one, in a file of that name and size.
    init(_ type: String, in folder: TemporaryFolder, name: String = "system", size: UInt64 = 1 << 30) throws {
        file = folder.file("\(name).img")
        path = folder.file("\(name).mounted")
        options = "loop"
        try FileStorage(creating: file).setLength(size)
        try Peer.run("mkfs.\(type)", "-q", file)
        try Peer.run("mkdir", "-p", path)
        try mount()
    }

    /// Mounts the one in a file: after a power cut, its journal is replayed then.
    init(existing type: String, file: String, at path: String) throws {
        (self.file, self.path) = (file, path)
        options = type == "xfs" ? "loop,nouuid" : "loop"
        try Peer.run("mkdir", "-p", path)
        try mount()
    }

    private func mount() throws { try Peer.run("mount", "-o", options, file, path) }

    /// Bytes that are in use, once everything has its place.
    func usedBytes() throws -> UInt64 {
        try Peer.run("sync", "-f", path)
        var status = statvfs()
        guard unsafe statvfs(path, &status) == 0 else { throw DiskError.system(errno, "examine the file system") }
        return (UInt64(status.f_blocks) - UInt64(status.f_bfree)) * UInt64(status.f_frsize)
    }

    /// Stops an XFS as a power cut does: nothing more is written to the device, not even what waits in memory.
    func cutPower() throws { try Peer.run("xfs_io", "-x", "-c", "shutdown", path) }

    /// Mounts it again, as it is on the device.
    func restart() throws {
        try detach()
        try mount()
    }

    /// Unmounts it. (Programs that other tests start at the same moment have, until they run, files of it open.)
    func detach() throws {
        var result = try Subprocess.run(["umount", path])
        for _ in 0..<100 where result.status == 32 {
            usleep(20_000)
            result = try Subprocess.run(["umount", path])
        }
        guard result.status == 0 else { throw DiskError(.system, "umount: \(result.errorText)") }
    }

    func unmount() { try? detach() }
}

import DiskStorage
import DiskTesting
import Glibc

/// A file system in a file, mounted.
final class LoopFileSystem: Sendable {
    let path: String
    private let file: String

    init(_ type: String, in folder: TemporaryFolder) throws {
        file = folder.file("\(type).img")
        path = folder.file("mounted")
        try FileStorage(creating: file).setLength(1 << 30)
        try Peer.run("mkfs.\(type)", "-q", file)
        try Peer.run("mkdir", path)
        try mount()
    }

    private func mount() throws { try Peer.run("mount", "-o", "loop", file, path) }

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
        try Peer.run("umount", path)
        try mount()
    }

    func unmount() { _ = try? Subprocess.run(["umount", path]) }
}

import DiskStorage
import DiskTesting
import Glibc
import Testing

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
        unmount()
        try mount()
    }

    /// A process that another test starts has all descriptors of this one, until it runs its program.
    func unmount() {
        for _ in 0..<100 {
            if let result = try? Subprocess.run(["umount", path]), result.status == 0 { return }
            usleep(100_000)
        }
        Issue.record("\(path) cannot be unmounted")
    }
}

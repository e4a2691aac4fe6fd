internal import FuseShim
import Glibc

/// A checked place to mount at.
public struct Mountpoint: Sendable {
    /// Absolute and free of links.
    public let path: String
    /// A folder, or else a regular file.
    public let isFolder: Bool
    /// What the user should know: a dead mount that was cleared.
    public let warnings: [String]

    /// Clears a dead mount of ours at the path and refuses what cannot be mounted at. Cheap: call it before the disk
    /// is opened.
    public init(_ path: String) throws(HostError) {
        let cleared = try Unmounter.clearStale(at: path)
        warnings = cleared ? ["\(path): cleared the dead mount of a daemon that had been killed"] : []
        guard let real = SystemFiles.realPath(path) else {
            let reason =
                errno == ENOENT ? "no such folder or file: make the folder with 'mkdir \(path)'" : errorText(errno)
            throw HostError(subject: path, reason: reason)
        }
        try Self.refuseMounted(real)
        let (mode, failure) = SystemFiles.status(real)
        guard failure == 0 else { throw HostError(subject: path, action: "cannot mount here", errno: failure) }
        switch mode & S_IFMT {
        case S_IFDIR: isFolder = true
        case S_IFREG: isFolder = false
        default: throw HostError(subject: path, reason: "neither a folder nor a regular file: cannot mount here")
        }
        self.path = real
    }

    private static func refuseMounted(_ path: String) throws(HostError) {
        guard let entry = MountTable.current().top(at: path), entry.isOurs else { return }
        throw HostError(
            subject: path, reason: "\(entry.source) is mounted here already: unmount it with 'vdumount \(path)'")
    }

    /// Runs `body`, which mounts, while no other vdmount does so at the same place.
    ///
    /// The place itself is locked with flock(2): what lies under the mount, and once something is mounted the mount's
    /// root, where it is seen that one came too late. Who may not open the place, or finds it locked by somebody for
    /// long, goes on without.
    func alone<Result>(_ body: () throws(HostError) -> Result) throws(HostError) -> Result {
        let descriptor = SystemFiles.openFile(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        defer { if descriptor >= 0 { close(descriptor) } }
        var waited = 0
        while descriptor >= 0, waited < 10_000, flock(descriptor, LOCK_EX | LOCK_NB) != 0, errno == EWOULDBLOCK {
            SystemFiles.sleep(milliseconds: 5)
            waited += 5
        }
        try Self.refuseMounted(path)
        return try body()
    }
}

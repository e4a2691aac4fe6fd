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
        if let entry = MountTable.current().top(at: real), entry.isOurs {
            throw HostError(
                subject: path, reason: "\(entry.source) is mounted here already: unmount it with 'vdumount \(path)'")
        }
        let (mode, failure) = SystemFiles.status(real)
        guard failure == 0 else { throw HostError(subject: path, action: "cannot mount here", errno: failure) }
        switch mode & S_IFMT {
        case S_IFDIR: isFolder = true
        case S_IFREG: isFolder = false
        default: throw HostError(subject: path, reason: "neither a folder nor a regular file: cannot mount here")
        }
        self.path = real
    }
}

internal import CLinux
internal import DiskImage
public import DiskStorage
internal import Glibc

/// A file that was opened to be passed to another process: ``PassedFiles``. It is closed with this object.
public final class PassableFile: Sendable {
    /// What a descriptor is for.
    enum Use: Sendable {
        case reading
        /// Reading too.
        case writing
    }

    /// Its real path.
    public let path: String
    public let identity: FileIdentity
    /// One for each use.
    public let descriptors: [Int32]

    /// Opens the file at a real path, which must be the one of that identity.
    ///
    /// A file that may be read but not written (an extent that is read-only) is passed for reading alone.
    init(_ path: String, _ identity: FileIdentity, _ uses: [Use], canBeReadOnly: Bool = false) throws(DiskError) {
        self.path = path
        self.identity = identity
        var opened: [Int32] = []
        do throws(DiskError) {
            for use in uses {
                let mode = use == .writing ? O_RDWR : O_RDONLY
                // Nothing happens to a file that took the place of the image's, not even a wait.
                let descriptor = unsafe clinux_open(path, mode | O_NOFOLLOW | O_NONBLOCK, 0)
                if descriptor < 0 {
                    if canBeReadOnly, use == .writing, [EACCES, EPERM, EROFS].contains(-descriptor) { continue }
                    throw .system(
                        descriptor, use == .writing ? "open the file for writing" : "open the file", image: path)
                }
                opened.append(descriptor)
                guard try PassedFiles.examine(descriptor).identity == identity else {
                    throw DiskError(.brokenLink, "was replaced while it was being opened: try again", image: path)
                }
                _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) & ~O_NONBLOCK)
            }
        } catch {
            for descriptor in opened { close(descriptor) }
            throw error.about(path)
        }
        descriptors = opened
    }

    /// Replaces the file, and opens the new one: first the descriptor that has its lock.
    init(_ path: String, replacing file: FileIdentity, with bytes: [UInt8], isLocked: Bool) throws(DiskError) {
        let locked = try FileStorage.replace(file, at: path, with: bytes, isLocked: isLocked)
        self.path = path
        var opened = [locked]
        for mode in Self.severalTimes.map({ $0 == .writing ? O_RDWR : O_RDONLY }) {
            let descriptor = unsafe clinux_open(path, mode | O_NOFOLLOW | O_NONBLOCK, 0)
            if descriptor >= 0 { opened.append(descriptor) }
        }
        descriptors = opened
        do throws(DiskError) {
            identity = try PassedFiles.examine(locked).identity
        } catch {
            for descriptor in opened { close(descriptor) }
            throw error
        }
    }

    /// For whoever opens it again and again.
    private static let severalTimes =
        Array(repeating: Use.writing, count: PassedFiles.openings)
        + Array(repeating: Use.reading, count: PassedFiles.openings)

    deinit { for descriptor in descriptors { close(descriptor) } }

    /// All files of an image, to be opened several times for writing and for reading.
    static func all(of layer: Layer) throws(DiskError) -> [PassableFile] {
        let finder = FileFinder()
        var files: [PassableFile] = []
        for path in layer.backend.files {
            guard let found = try finder.file(at: path) else {
                throw DiskError(.notFound, "there is no such file any more", image: path)
            }
            files.append(
                try PassableFile(path, found.identity, severalTimes, canBeReadOnly: !files.isEmpty))
        }
        return files
    }
}

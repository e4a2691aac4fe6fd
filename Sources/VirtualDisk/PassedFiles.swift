internal import CLinux
public import DiskStorage
internal import Glibc

/// Files that another process has opened for one that cannot: a confined daemon, whose chain of images is changed.
///
/// As long as this process may open files (``isSole`` is not set), it is only noted which file is where. From then on a
/// file is opened by a descriptor that was passed (``take(_:)``), and only if it is the very file that this process had
/// open under that path, by device and inode, or one that was introduced as part of a new image.
///
/// A file is passed by several descriptors for reading and several for writing, each of an opening of its own: what is
/// only read is read through one that can do no more, and each time that the file is opened here one of them is used
/// up, since image locks belong to an opening (an open file description), and pass from one to the next.
public final class PassedFiles: Sendable {
    /// How an image calls one of its files.
    private struct Name: Hashable {
        let image: String
        let name: String
    }

    private struct OpenFile {
        weak var storage: FileStorage?
    }

    /// The descriptors of a file.
    private struct Descriptors {
        var forReading: [Int32] = []
        var forWriting: [Int32] = []
    }

    /// How many times a file is opened in one mode, at most, while the chain is changed once.
    public static let openings = 6

    private struct State {
        var isSole = false
        /// A file may be open more than once: as what an image is, and while its header is looked at.
        var open: [String: [OpenFile]] = [:]
        var companions: [Name: String] = [:]
        var introduced: [String: FileIdentity] = [:]
        var passed: [FileIdentity: Descriptors] = [:]
        var replacer: Replacer?

        func file(at path: String) -> FileStorage? { open[path]?.reversed().lazy.compactMap(\.storage).first }

        func identity(at path: String) -> FileIdentity? { file(at: path)?.identity }
    }

    /// Replaces the content of a file as `FileReplacer.replace(_:with:isLocked:)` says, and answers more descriptors
    /// than that: first the one for writing which has the lock, then others of the same file.
    public typealias Replacer = @Sendable (FileIdentity, [UInt8], Bool) throws(DiskError) -> [Int32]

    private let state = Locked(State())

    public init() {}

    deinit { forget() }

    /// Whether files are opened by nothing but descriptors that were passed.
    public var isSole: Bool {
        get { state.withLock { $0.isSole } }
        set { state.withLock { $0.isSole = newValue } }
    }

    // MARK: - What is passed

    /// Takes over a descriptor, and closes it if it is of no use; answers the file's identity.
    ///
    /// `DiskError.Kind.refused` for what is neither a regular file nor a block device, or can only be written.
    @discardableResult
    public func take(_ descriptor: Int32) throws(DiskError) -> FileIdentity {
        let found: (identity: FileIdentity, isWritable: Bool)
        do throws(DiskError) {
            found = try Self.examine(descriptor)
        } catch {
            close(descriptor)
            throw error
        }
        let isWanted = state.withLock { state in
            var descriptors = state.passed[found.identity] ?? Descriptors()
            defer { state.passed[found.identity] = descriptors }
            guard (found.isWritable ? descriptors.forWriting : descriptors.forReading).count < Self.openings else {
                return false
            }
            if found.isWritable {
                descriptors.forWriting.append(descriptor)
            } else {
                descriptors.forReading.append(descriptor)
            }
            return true
        }
        if !isWanted { close(descriptor) }
        return found.identity
    }

    /// Which file a descriptor leads to, and whether it can be written by it.
    public static func examine(_ descriptor: Int32) throws(DiskError) -> (identity: FileIdentity, isWritable: Bool) {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0 else { throw .system(clinux_errno(), "examine what was passed") }
        guard [S_IFREG, S_IFBLK].contains(status.st_mode & S_IFMT) else {
            throw DiskError(.refused, "what was passed is neither a regular file nor a block device")
        }
        let flags = fcntl(descriptor, F_GETFL)
        // O_PATH counts as for reading, and reads nothing.
        guard flags >= 0, flags & O_ACCMODE != O_WRONLY, flags & Int32(clinux_O_PATH) == 0 else {
            throw DiskError(.refused, "what was passed cannot be read")
        }
        return (
            FileIdentity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino)), flags & O_ACCMODE == O_RDWR
        )
    }

    /// Says that a passed file belongs to a new image: at `path`, and, unless it is the image itself, under the name
    /// that the image has for it.
    public func introduce(_ identity: FileIdentity, at path: String, as name: String? = nil, of image: String? = nil) {
        state.withLock { state in
            state.introduced[path] = identity
            if let name, let image { state.companions[Name(image: image, name: name)] = path }
        }
    }

    /// Closes what was passed and is not in use. What was opened with it stays.
    public func forget() {
        let descriptors = state.withLock { state in
            defer {
                state.passed = [:]
                state.introduced = [:]
            }
            return state.passed.values.flatMap { $0.forReading + $0.forWriting }
        }
        for descriptor in descriptors { close(descriptor) }
    }

    /// The way to whoever replaces files; nil: they are written over.
    public var replacer: Replacer? {
        get { state.withLock { $0.replacer } }
        set { state.withLock { $0.replacer = newValue } }
    }

    // MARK: - What is open

    /// Which file this process has open at a path; nil: none.
    public func identity(of path: String) -> FileIdentity? {
        state.withLock { $0.identity(at: path) }
    }

    /// The file that this process has open at a path, the one that was opened last; nil: none.
    func file(at path: String) -> FileStorage? { state.withLock { $0.file(at: path) } }

    /// Whether this process has a file open, at whatever path.
    public func hasOpen(_ identity: FileIdentity) -> Bool {
        state.withLock { state in
            state.open.values.joined().contains { $0.storage?.identity == identity }
        }
    }

    /// The names that an image has for its other files, with their paths.
    func companions(of image: String) -> [(name: String, path: String)] {
        state.withLock { state in
            state.companions.filter { $0.key.image == image }.map { ($0.key.name, $0.value) }.sorted { $0.1 < $1.1 }
        }
    }

    /// Notes a file that was opened.
    func note(_ file: FileStorage, at path: String) {
        state.withLock { state in
            for known in state.open.keys {
                state.open[known]?.removeAll { $0.storage == nil }
                if state.open[known]?.isEmpty == true { state.open[known] = nil }
            }
            state.open[path, default: []].append(OpenFile(storage: file))
        }
    }

    /// Notes how an image calls a file.
    func note(_ name: String, of image: String, isAt path: String) {
        state.withLock { $0.companions[Name(image: image, name: name)] = path }
    }

    /// The path of what an image calls by one of these names.
    func path(of names: [String], in image: String) -> String? {
        let known = state.withLock { $0.companions }
        return names.lazy.compactMap { known[Name(image: image, name: $0)] }.first
    }

    /// A descriptor of the file at a path, which is the caller's.
    func descriptor(at path: String, isWritable: Bool) throws(DiskError) -> (descriptor: Int32, file: FileIdentity) {
        let found = state.withLock { state -> (Int32, FileIdentity)? in
            guard let identity = state.introduced[path] ?? state.identity(at: path) else { return nil }
            let descriptor =
                isWritable ? state.passed[identity]?.forWriting.popLast() : state.passed[identity]?.forReading.popLast()
            return descriptor.map { ($0, identity) }
        }
        guard let found else {
            throw DiskError(
                .refused, "was not passed to this process, which opens no files itself any more", image: path)
        }
        return found
    }
}

extension PassedFiles: FileReplacer {
    public var isInCharge: Bool { isSole }

    public func replace(_ file: FileIdentity, with bytes: [UInt8], isLocked: Bool) throws(DiskError) -> Int32? {
        guard let replacer else { return nil }
        var left = try replacer(file, bytes, isLocked)
        defer { for descriptor in left { close(descriptor) } }
        guard let first = left.first else { throw DiskError(.refused, "no new file was passed") }
        let made = try Self.examine(first)
        for descriptor in left {
            guard try Self.examine(descriptor).identity == made.identity else {
                throw DiskError(.refused, "several files were passed in the place of one")
            }
        }
        guard made.isWritable else { throw DiskError(.refused, "the new file was passed for reading alone") }
        left.removeFirst()
        while let passed = left.popLast() { _ = try? take(passed) }  // they were examined
        return first
    }
}

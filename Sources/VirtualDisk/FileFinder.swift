internal import CLinux
internal import DiskImage
internal import DiskStorage
internal import Glibc
internal import SystemPackage

/// The only thing that opens files which an image names: parents and extents.
///
/// Whatever an image says, only regular files (and, where the folder was allowed, block devices) are opened that lie,
/// after all links are resolved, in the folder of the image that names them or below it, in the folder above a
/// `Snapshots` folder, or in a folder that the user allowed. A file is first opened as a mere path (`O_PATH`: nothing
/// happens to it), then its true place is asked of the kernel, and only then is that very file opened for real.
struct FileFinder: CompanionOpener {
    /// Folders that the user allowed, as given.
    let allowedFolders: [String]
    /// Put round every storage.
    let wrap: (@Sendable (any Storage) -> any Storage)?
    /// Whether files are locked against other processes.
    let locks: Bool
    /// Whether other writers are suffered beside this process.
    var isShareable = false
    /// Whether files will be read from their beginning to their end.
    var isSequential = false
    /// Open files of this process whose locks pass to those that are opened now, if they are the same files.
    var predecessors: [FileStorage] = []
    /// The files that were locked, and of which nobody has taken charge yet.
    let locked = Locked<[FileStorage]>([])
    /// The files that were opened, in that order, if they are wanted: what a block cache is bound to.
    private(set) var opened: Locked<[OpenedFile]>?
    /// Files made by ``createCompanion(_:of:)``, to be removed if the image does not come about.
    let created = Locked<[String]>([])
    /// Files that another process opens for this one.
    var passed: PassedFiles?
    /// Opens what is no file.
    let provider: (any StorageProvider)?
    /// The addresses that were opened, by the names under which they are shown.
    let addresses = Locked<[String: String]>([:])

    init(
        allowedFolders: [String] = [], locks: Bool = false, notesFiles: Bool = false,
        wrap: (@Sendable (any Storage) -> any Storage)? = nil, provider: (any StorageProvider)? = nil
    ) {
        self.allowedFolders = allowedFolders
        self.provider = provider
        opened = notesFiles ? Locked([]) : nil
        self.locks = locks
        self.wrap = wrap
    }

    /// Lets go of the files that were opened, which stay open as long as they are known here.
    mutating func stopNotingFiles() { opened = nil }

    /// A file that was found: its real path and a descriptor that stands for it.
    struct Found: ~Copyable {
        let path: String
        fileprivate let descriptor: Int32
        /// Nil for a regular file or a block device; else what it is, for people: opening that could block, or act on a
        /// device.
        fileprivate let obstacle: StaticString?
        let identity: FileIdentity
        let isRegular: Bool
        deinit { close(descriptor) }
    }

    // MARK: - The file that the user named

    /// Opens a file, or another storage, that the user named.
    func open(
        _ path: String, isWritable: Bool
    ) throws(DiskError) -> (storage: any Storage, path: String, identity: FileIdentity) {
        if let provider, provider.recognizes(path) { return try openAddress(path, provider, isWritable: isWritable) }
        if let passed, passed.isSole { return try open(path, passedIn: passed, isWritable: isWritable) }
        guard let found = try resolve(path) else {
            throw DiskError(.notFound, "there is no such file", image: path)
        }
        let opened = try open(found, isWritable: isWritable, name: path)
        return (opened, found.path, found.identity)
    }

    /// Whether something is at a path that the user named.
    func exists(_ path: String) throws(DiskError) -> Bool { try resolve(path) != nil }

    /// Which file is at a path, and whether it is one that can be removed with its image: no device. Nil: none is
    /// there.
    func file(at path: String) throws(DiskError) -> (identity: FileIdentity, isRegular: Bool)? {
        if let passed, passed.isSole { return passed.identity(of: path).map { ($0, true) } }
        guard let found = try resolve(path) else { return nil }
        return (found.identity, found.isRegular)
    }

    /// Which file the paths lead to that an image stores of its parent; nil: to none that may be opened.
    func parentIdentity(_ names: [String], of imagePath: String) -> FileIdentity? {
        guard let found = try? find(names, of: imagePath, what: "the parent") else { return nil }
        return found.identity
    }

    private func open(_ found: borrowing Found, isWritable: Bool, name: String) throws(DiskError) -> any Storage {
        if let obstacle = found.obstacle {
            throw DiskError(.refused, "is \(obstacle), and no disk image: not opened", image: name)
        }
        let descriptor = clinux_reopen(found.descriptor, isWritable ? O_RDWR : O_RDONLY)
        guard descriptor >= 0 else {
            throw .system(descriptor, isWritable ? "open the file for writing" : "open the file", image: name)
        }
        return try take(descriptor, at: found.path, isWritable: isWritable, name: name)
    }

    /// Opens a file that was passed.
    private func open(
        _ path: String, passedIn passed: PassedFiles, isWritable: Bool
    ) throws(DiskError) -> (storage: any Storage, path: String, identity: FileIdentity) {
        let (descriptor, identity) = try passed.descriptor(at: path, isWritable: isWritable)
        return (try take(descriptor, at: path, isWritable: isWritable, name: path), path, identity)
    }

    /// Takes over the descriptor of the file at a path.
    private func take(
        _ descriptor: Int32, at path: String, isWritable: Bool, name: String
    ) throws(DiskError) -> any Storage {
        let file = try FileStorage(adopting: descriptor, name: name, isWritable: isWritable, replacer: passed)
        if isSequential { file.expectSequentialReads() }
        if locks {
            let predecessor = predecessors.first { $0.identity == file.identity }
            try file.lockImage(isShared: isShareable, takingOverFrom: predecessor)
            locked.withLock { $0.append(file) }
        }
        // Before a byte of it is read, and after no other process writes to it any more that minds locks.
        let stamp = opened.map { _ in FileStamp(file) }
        if let stamp { opened?.withLock { $0.append(OpenedFile(path: path, file: file, stamp: stamp)) } }
        passed?.note(file, at: path)
        return wrap?(file) ?? file
    }

    /// Finds what a path leads to without opening it; nil if nothing is there.
    private func resolve(_ path: String) throws(DiskError) -> Found? {
        let descriptor = unsafe clinux_open(path, Int32(clinux_O_PATH), 0)
        guard descriptor >= 0 else {
            if [ENOENT, ENOTDIR, ENAMETOOLONG].contains(-descriptor) { return nil }
            throw .system(descriptor, "reach the file", image: path)
        }
        var status = stat()
        var target = [UInt8](repeating: 0, count: Int(PATH_MAX))
        let count = unsafe target.withUnsafeMutableBytes {
            unsafe $0.baseAddress.map { unsafe readlink("/proc/self/fd/\(descriptor)", unsafe $0, Int(PATH_MAX)) } ?? -1
        }
        guard unsafe fstat(descriptor, &status) == 0, count > 0 else {
            close(descriptor)
            throw .system(clinux_errno(), "examine the file", image: path)
        }
        return Found(
            path: String(decoding: target.prefix(count), as: UTF8.self), descriptor: descriptor,
            obstacle: Self.obstacle(status.st_mode),
            identity: FileIdentity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino)),
            isRegular: status.st_mode & S_IFMT == S_IFREG)
    }

    /// A path that cannot be walked is like one that leads nowhere: another candidate may do. What this process lacks
    /// is no such thing.
    private func resolveCandidate(_ path: String) throws(DiskError) -> Found? {
        do throws(DiskError) {
            return try resolve(path)
        } catch {
            if [EMFILE, ENFILE, ENOMEM].contains(error.errno) { throw error }
            return nil
        }
    }

    /// Why a file of that kind is not opened.
    private static func obstacle(_ mode: mode_t) -> StaticString? {
        switch mode & S_IFMT {
        case S_IFREG, S_IFBLK: nil
        case S_IFDIR: "a folder"
        case S_IFIFO: "a named pipe (FIFO)"
        case S_IFSOCK: "a socket"
        case S_IFCHR: "a character device"
        default: "neither a regular file nor a block device"
        }
    }

    // MARK: - Files that an image names

    func openCompanion(
        _ name: String, of imagePath: String, isWritable: Bool, what: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        let opened = try openNamed([name], of: imagePath, isWritable: isWritable, what: what)
        return (opened.storage, opened.path)
    }

    /// Opens a parent by the paths that its child stores.
    func openParent(
        _ names: [String], of imagePath: String, isWritable: Bool = false
    ) throws(DiskError) -> (storage: any Storage, path: String, identity: FileIdentity) {
        try openNamed(names, of: imagePath, isWritable: isWritable, what: "the parent")
    }

    private func openNamed(
        _ names: [String], of imagePath: String, isWritable: Bool, what: String
    ) throws(DiskError) -> (storage: any Storage, path: String, identity: FileIdentity) {
        if let passed, passed.isSole {
            guard let path = passed.path(of: names, in: imagePath) else {
                throw DiskError(.refused, "\(what) was not passed to this process", image: imagePath)
            }
            return try open(path, passedIn: passed, isWritable: isWritable)
        }
        let remote = try openRemote(names, of: imagePath, isWritable: isWritable)
        if let opened = remote.opened { return opened }
        do throws(DiskError) {
            // An address is no path: a file that has the name of its last part is another one.
            let found = try find(names.filter { !isAddress($0) }, of: imagePath, what: what)
            let storage = try open(found, isWritable: isWritable, name: found.path)
            if let name = names.first { passed?.note(name, of: imagePath, isAt: found.path) }
            return (storage, found.path, found.identity)
        } catch {
            guard let refused = remote.refused, error.kind == .notFound else { throw error }
            throw DiskError(
                .notFound,
                "\(what) of this image is said to be at \(refused.printable(limit: 200)): not connected to, since an "
                    + "image alone does not decide that; if it is to be trusted, say --allow-url with that address, or "
                    + "with its folder's", image: imagePath)
        }
    }

    /// Tries the stored paths as they are, then by their last component beside the image and in the allowed folders.
    private func find(_ names: [String], of imagePath: String, what: String) throws(DiskError) -> Found {
        var refused: String?
        var obstacle: (path: String, kind: StaticString)?
        for candidate in candidates(names, imagePath) {
            guard let found = try resolveCandidate(candidate) else { continue }
            guard try isAllowed(found.path, for: imagePath) else {
                refused = refused ?? found.path
                continue
            }
            if let kind = found.obstacle {
                obstacle = obstacle ?? (found.path, kind)
                continue
            }
            return found
        }
        let name = (names.first ?? "").printable(limit: 200)
        let image = FilePath(imagePath).lastComponent?.string ?? imagePath
        if let obstacle {
            throw DiskError(
                .refused,
                "\(what) '\(name)' of \(image) is \(obstacle.path), \(obstacle.kind): only regular files and block "
                    + "devices are opened", image: imagePath)
        }
        if let refused {
            throw DiskError(
                .refused,
                "\(what) '\(name)' of \(image) is \(refused), outside the image's folder: not opened; "
                    + "if it is to be trusted, give its folder with --allow-dir", image: imagePath)
        }
        let folders = searchFolders(of: imagePath)
        // What stands for bytes that are no text, in a path that the kernel gave.
        if folders.contains(where: { $0.unicodeScalars.contains("\u{FFFD}") }) {
            throw DiskError(
                .notFound,
                "\(what) '\(name)' of \(image) is not found, since the name of a folder on the way there is no UTF-8, "
                    + "and such names are not supported: rename the folder", image: imagePath)
        }
        let places = folders.isEmpty ? "" : ": looked in " + folders.joined(separator: ", ")
        throw DiskError(
            .notFound,
            "\(what) '\(name)' of \(image) is missing\(places); "
                + "if it lives elsewhere, give that folder with --allow-dir", image: imagePath)
    }

    private func candidates(_ names: [String], _ imagePath: String) -> [String] {
        let folder = Self.folder(of: imagePath)
        let isFile = !isRemote(imagePath)
        var result: [String] = []
        for name in names where !name.isEmpty && name.utf8.count < Int(PATH_MAX) && !name.utf8.contains(0) {
            if isFile || name.hasPrefix("/") { result.append(FilePath(folder).pushing(FilePath(name)).string) }
            let slashed = name.contains("\\") ? String(name.map { $0 == "\\" ? "/" : $0 }) : name
            if isFile, slashed != name, !Self.hasDriveLetter(slashed) {
                result.append(FilePath(folder).pushing(FilePath(slashed)).string)
            }
            guard let last = FilePath(slashed).lastComponent, last.kind == .regular else { continue }
            for place in searchFolders(of: imagePath) { result.append(FilePath(place).appending(last).string) }
        }
        return result
    }

    private static func hasDriveLetter(_ path: String) -> Bool {
        let units = Array(path.utf8.prefix(2))
        return units.count == 2 && units[1] == UInt8(ascii: ":")
    }

    /// The folders in which files of an image are looked for by name or UUID, in order.
    func searchFolders(of imagePath: String) -> [String] {
        // An image that is no file lies in no folder.
        if isRemote(imagePath) { return allowedFolders }
        let folder = FilePath(Self.folder(of: imagePath))
        var folders = [folder.string]
        if folder.lastComponent?.string == "Snapshots" { folders.append(folder.removingLastComponent().string) }
        for allowed in allowedFolders where !folders.contains(allowed) { folders.append(allowed) }
        return folders
    }

    /// Whether a real path lies where files of this image may lie.
    private func isAllowed(_ path: String, for imagePath: String) throws(DiskError) -> Bool {
        let path = FilePath(path)
        for folder in searchFolders(of: imagePath) {
            guard let found = try resolveCandidate(folder) else { continue }
            if path.starts(with: FilePath(found.path)) { return true }
        }
        return false
    }

    /// The paths of all regular files in the folders of an image, for a search by UUID.
    func neighbours(of imagePath: String) -> [String] {
        var paths: [String] = []
        for folder in searchFolders(of: imagePath) {
            guard let stream = unsafe opendir(folder) else { continue }
            defer { unsafe closedir(stream) }
            while let entry = unsafe readdir(stream), paths.count < 65_536 {
                let name = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                    unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
                }
                let path = FilePath(folder).appending(name).string
                var status = stat()
                if unsafe stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG { paths.append(path) }
            }
        }
        return paths.sorted()
    }

    /// The folder that holds a path.
    static func folder(of path: String) -> String {
        let folder = FilePath(path).removingLastComponent().string
        return folder.isEmpty ? "." : folder
    }

    /// The folder that holds a path, with all links resolved.
    static func realFolder(of path: String) -> String {
        let folder = folder(of: path)
        guard let found = try? FileFinder().resolve(folder) else { return folder }
        return found.path
    }

    // MARK: - New files

    func createCompanion(_ name: String, of imagePath: String) throws(DiskError) -> (storage: any Storage, path: String)
    {
        if let passed, passed.isSole {
            throw DiskError(
                .unsupported,
                "the file \(name.printable(limit: 200)) would have to be made, which this process does "
                    + "not: close the disk first", image: imagePath)
        }
        let path = FilePath(Self.folder(of: imagePath)).appending(name).string
        let file = try FileStorage(creating: path)
        created.withLock { $0.append(path) }
        return (wrap?(file) ?? file, FilePath(Self.realFolder(of: imagePath)).appending(name).string)
    }

    func removeCompanion(_ name: String, of imagePath: String) throws(DiskError) {
        let path = FilePath(Self.folder(of: imagePath)).pushing(FilePath(name)).string
        guard let found = try resolve(path) else { return }
        guard found.isRegular, try isAllowed(found.path, for: imagePath) else {
            throw DiskError(.refused, "is not removed: it is no regular file in the image's folder", image: path)
        }
        guard unsafe unlink(found.path) == 0 else { throw .system(clinux_errno(), "remove the file", image: path) }
        if found.path != path { unsafe unlink(path) }  // a link to it, that leads nowhere now
    }

    /// Creates a file that the user named, readable by its owner alone.
    func create(_ path: String) throws(DiskError) -> any Storage {
        let file = try FileStorage(creating: path, mode: 0o600)
        created.withLock { $0.append(path) }
        return wrap?(file) ?? file
    }

    /// The files that were locked since this was asked last: those of the image that was opened last.
    func takeLocked() -> [FileStorage] {
        locked.withLock { files in
            defer { files = [] }
            return files
        }
    }

    /// Removes all files that were created: their image did not come about.
    func removeCreated() {
        created.withLock { paths in
            for path in paths { unsafe unlink(path) }
            paths = []
        }
    }
}

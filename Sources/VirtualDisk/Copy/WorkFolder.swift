internal import DiskStorage
internal import Glibc
internal import SystemPackage

/// A folder beside a file in which its successor is made, under the file's own name, to take its place at the end.
final class WorkFolder {
    /// Where the successor is made.
    let file: String
    private let place: String
    private let folder: String
    private let descriptor: Int32

    /// Makes the folder; what a run that was killed has left in it goes. `DiskError.Kind.locked` while another run is
    /// at it.
    init(for place: String) throws(DiskError) {
        let path = FilePath(place)
        let name = path.lastComponent?.string ?? "image"
        self.place = place
        folder = FilePath(FileFinder.folder(of: place)).appending(".\(name).new").string
        file = FilePath(folder).appending(name).string
        guard unsafe mkdir(folder, 0o700) == 0 || errno == EEXIST else {
            throw .system(errno, "make a folder for the new image", image: folder)
        }
        descriptor = unsafe Glibc.open(folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
        guard descriptor >= 0 else { throw .system(errno, "open the folder for the new image", image: folder) }
        guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
            throw DiskError(.locked, "another process is making a new image here", image: folder)
        }
        removeFiles()
    }

    deinit { close(descriptor) }

    private func files() -> [String] {
        guard let stream = unsafe opendir(folder) else { return [] }
        defer { unsafe closedir(stream) }
        var names: [String] = []
        while let entry = unsafe readdir(stream) {
            let name = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
            if name != ".", name != ".." { names.append(name) }
        }
        return names
    }

    private func removeFiles() {
        for name in files() { unsafe unlink(FilePath(folder).appending(name).string) }
    }

    /// Throws unless the new image is one file.
    func expectOneFile() throws(DiskError) {
        let names = files()
        guard names.count == 1 else {
            throw DiskError(
                .unsupported,
                "the new image would have \(names.count) files, which cannot take an image's place in one step: "
                    + "convert it to another name", image: place)
        }
    }

    /// Gives the new image the old one's name, mode and owner; durable when it returns.
    func putInPlace() throws(DiskError) {
        var status = stat()
        guard unsafe stat(place, &status) == 0 else { throw .system(errno, "examine the file", image: place) }
        guard unsafe chmod(file, status.st_mode & 0o7777) == 0 else {
            throw .system(errno, "give the new image its mode", image: file)
        }
        // (Who may not give files away keeps it.)
        _ = unsafe chown(file, status.st_uid, status.st_gid)
        try Self.sync(file)
        guard unsafe rename(file, place) == 0 else {
            throw .system(errno, "put the new image in place", image: place)
        }
        try Self.sync(FileFinder.folder(of: place))
    }

    private static func sync(_ path: String) throws(DiskError) {
        let descriptor = unsafe Glibc.open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { throw .system(errno, "open", image: path) }
        defer { close(descriptor) }
        guard fsync(descriptor) == 0 || errno == EINVAL else { throw .system(errno, "flush", image: path) }
    }

    /// Removes the folder with what is in it.
    func remove() {
        removeFiles()
        unsafe rmdir(folder)
    }
}

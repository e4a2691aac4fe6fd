internal import DiskImage
internal import DiskStorage
internal import Glibc

/// The files of images that go away.
struct ImageFiles: Sendable {
    private struct File: Sendable {
        let path: String
        let identity: FileIdentity
    }

    private var files: [File] = []

    /// None.
    init() {}

    /// All files of `layers` that are regular ones and none of which belongs to one of `others` too: of an image that
    /// lies on a device, nothing is removed but its descriptor.
    init(
        of layers: some Sequence<Layer>, but others: some Sequence<Layer>, by finder: FileFinder = FileFinder()
    ) throws(DiskError) {
        var kept: Set<FileIdentity> = []
        for layer in others {
            for path in layer.backend.files {
                if let file = try finder.file(at: path) { kept.insert(file.identity) }
            }
        }
        for layer in layers {
            for path in layer.backend.files {
                guard let file = try finder.file(at: path), file.isRegular, !kept.contains(file.identity) else {
                    continue
                }
                kept.insert(file.identity)
                files.append(File(path: path, identity: file.identity))
            }
        }
    }

    /// Their paths.
    var paths: [String] { files.map(\.path) }

    /// Opens each by one descriptor: for writing too, if that is wanted.
    func open(isWritable: Bool) throws(DiskError) -> [PassableFile] {
        var opened: [PassableFile] = []
        for file in files {
            opened.append(try PassableFile(file.path, file.identity, isWritable ? [.writing] : [.reading]))
        }
        return opened
    }

    /// Removes those that are still the same files; one that is gone already is no error.
    func remove() throws(DiskError) {
        let finder = FileFinder()
        for file in files {
            guard let found = try finder.file(at: file.path), found.identity == file.identity else { continue }
            guard unsafe unlink(file.path) == 0 || errno == ENOENT else {
                throw .system(errno, "remove the file, which is not needed any more", image: file.path)
            }
        }
    }
}

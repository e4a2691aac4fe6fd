internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import Glibc

extension DiskOptions {
    /// How the top image is opened: not for writing where an overlay takes the writes.
    var mode: OpenMode { isWritable && overlay == nil ? .readWrite : .readOnly }
}

extension Disk {
    /// Opens the disk that the image in `storage` is the top of.
    ///
    ///     let disk = try Disk.open(storage: MemoryStorage(bytes, name: "disk.qcow2"))
    ///
    /// A storage may be anything: a file, memory, something behind a network, a wrapper of another storage. Each holds
    /// one image as a whole; an image whose data is in files beside it is refused. The caller keeps others from writing
    /// to the storages: they are not locked here. They are kept until the disk is let go, and not closed.
    ///
    /// - Parameters:
    ///   - storage: The top image.
    ///   - parents: The images below the top one, the nearest first; read, never written. Each is checked to be the
    ///     parent of the one above it. All that the chain needs must be there, and no more.
    ///   - options: ``DiskOptions/format`` is the top image's. Names are not looked for, so allowed folders and the
    ///     provider of storages do not matter.
    public static func open(
        storage: any Storage, parents: [any Storage] = [], options: DiskOptions = DiskOptions()
    ) throws(DiskError) -> Disk {
        guard options.snapshot == nil || !options.isWritable || options.overlay != nil else {
            throw DiskError(
                .invalidArgument, "an internal snapshot cannot be written; with an overlay its disk can",
                image: storage.name)
        }
        guard options.mode != .readWrite || storage.traits.isWritable else {
            throw .system(EROFS, "open it for writing", image: storage.name)
        }
        let opener = ChainOpener(options: options)
        let layers = try opener.open([storage] + parents)
        return try make(layers, topFiles: opener.finder.opened == nil ? 0 : 1, opener, options)
    }
}

extension ChainOpener {
    /// Opens the images in these storages, the top one first.
    fileprivate func open(_ storages: [any Storage]) throws(DiskError) -> [Layer] {
        guard storages.count <= options.depthLimit else {
            throw DiskError(.brokenLink, "the chain of parents is longer than \(options.depthLimit) images")
        }
        var layers: [Layer] = []
        for storage in storages {
            let name = storage.name
            finder.opened?.withLock { $0.append(OpenedFile(path: name, file: nil, stamp: Self.stamp(storage))) }
            let wrapped = options.wrapStorage?(storage) ?? storage
            guard let child = layers.last else {
                let driver = try driver(for: wrapped, path: name, mode: options.mode)
                layers.append(
                    try openLayer(
                        driver, wrapped, name, options.mode, shownAs: name, snapshot: options.snapshot,
                        companions: NoCompanions()))
                continue
            }
            guard let link = child.backend.parentLink else {
                throw DiskError(
                    .brokenLink, "has no parent, and \(name) is given as one", image: child.path)
            }
            let driver = try parentDriver(link, wrapped, name, of: child.path)
            let parent = try openLayer(
                driver, wrapped, name, .readOnly, shownAs: name, companions: NoCompanions())
            do throws(DiskError) {
                try child.backend.checkLink(to: parent.backend)
            } catch {
                throw error.about(child.path)
            }
            layers.append(parent)
        }
        guard let last = layers.last, last.backend.parentLink != nil else { return layers }
        throw DiskError(.notFound, "has a parent, for which no storage is given", image: last.path)
    }

    /// Nothing shows whether a storage was changed, unless it is a file.
    private static func stamp(_ storage: any Storage) -> FileStamp {
        if let file = storage as? FileStorage { return FileStamp(file) }
        return FileStamp(length: (try? storage.length()) ?? 0, version: nil)
    }
}

/// For images that lie in no folder.
private struct NoCompanions: CompanionOpener {
    func openCompanion(
        _ name: String, of imagePath: String, isWritable: Bool, what: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        throw DiskError(
            .unsupported,
            "\(what) '\(name.printable(limit: 200))' is a file of its own: only images that are one file can be opened "
                + "as a storage", image: imagePath)
    }

    func createCompanion(
        _ name: String, of imagePath: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        throw DiskError(.unsupported, "no file can be made beside it", image: imagePath)
    }

    func removeCompanion(_ name: String, of imagePath: String) throws(DiskError) {
        throw DiskError(.unsupported, "there are no files beside it that could be removed", image: imagePath)
    }
}

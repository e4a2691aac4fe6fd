internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import SystemPackage

extension Disk {
    /// Opens the disk that the image at `path` is the top of: finds, opens, locks and checks its parents.
    ///
    /// The parents are opened read-only. Throws ``DiskError``: ``DiskError/Kind/brokenLink`` where a parent does not
    /// belong to its child, ``DiskError/Kind/notFound`` and ``DiskError/Kind/refused`` where one cannot be opened,
    /// ``DiskError/Kind/locked`` where another process is in the way.
    public static func open(_ path: String, options: DiskOptions = DiskOptions()) throws(DiskError) -> Disk {
        let opener = ChainOpener(options: options)
        guard options.snapshot == nil || !options.isWritable || options.overlay != nil else {
            throw DiskError(
                .invalidArgument, "an internal snapshot cannot be written; with an overlay its disk can",
                image: opener.finder.shownName(path))
        }
        var topFiles = 0
        let layers = try opener.open(path, mode: options.mode, withParents: true) {
            topFiles = opener.finder.opened?.withLock { $0.count } ?? 0
        }
        return try make(layers, topFiles: topFiles, opener, options)
    }

    /// The disk of these images, all of whose files are open; `topFiles` of them belong to the top one.
    static func make(
        _ images: [Layer], topFiles: Int, _ opener: ChainOpener, _ options: DiskOptions
    ) throws(DiskError) -> Disk {
        var layers = images
        let mode = options.mode
        if mode == .readWrite {
            do throws(DiskError) { try layers[0].backend.prepareForUse() } catch { throw error.about(layers[0].path) }
        }
        // All files of the images are open now, and none of anything else.
        let files = opener.finder.opened?.withLock { $0 } ?? []
        if let overlay = options.overlay { layers.insert(try opener.open(overlay, over: layers[0]), at: 0) }
        return Disk(
            chain: try opener.makeChain(layers, mode == .readWrite ? files[topFiles...] : files[...]),
            cache: opener.cache, lockedFiles: opener.finder.locked.withLock { $0 },
            isWritable: options.isWritable || options.overlay != nil, lazyFlushInterval: options.lazyFlushInterval)
    }
}

/// Opens images and follows their links downwards.
struct ChainOpener {
    let options: DiskOptions
    let cache: TableCache
    let finder: FileFinder
    /// The images, counted from the one that is named, that are opened for writing although they are not on top.
    var writableLayers: Set<Int> = []
    /// Whether writes leave alone what children compare: ``OpenRequest/keepsIdentity``.
    var keepsIdentity = false

    init(options: DiskOptions) {
        self.options = options
        cache = TableCache(capacity: options.tableCacheSize)
        finder = FileFinder(
            allowedFolders: options.allowedFolders, locks: options.locksImages, notesFiles: options.cache != nil,
            wrap: options.wrapStorage, provider: options.storageProvider)
    }

    /// Opens the image at `path` and, if asked, everything below it; the top one first. `topIsOpen` is called when that
    /// is and no other.
    func open(
        _ path: String, mode: OpenMode, withParents: Bool, topIsOpen: () -> Void = {}
    ) throws(DiskError) -> [Layer] {
        let file = try finder.open(path, isWritable: mode == .readWrite)
        let path = finder.shownName(path)
        let driver = try driver(for: file.storage, path: path, mode: mode)
        if let snapshot = options.snapshot, !driver.capabilities.contains(.snapshots) {
            throw DiskError(
                .unsupported, "has no internal snapshot '\(snapshot)': the format \(driver.name) stores none",
                image: path)
        }
        var layers = [
            try openLayer(driver, file.storage, file.path, mode, shownAs: path, snapshot: options.snapshot)
        ]
        topIsOpen()
        var seen = [file.identity: path]
        while withParents, let link = layers[layers.count - 1].backend.parentLink {
            let child = layers[layers.count - 1]
            guard layers.count < options.depthLimit else {
                throw DiskError(
                    .brokenLink, "the chain of parents is longer than \(options.depthLimit) images", image: path)
            }
            let parentMode: OpenMode = writableLayers.contains(layers.count) ? .readWrite : .readOnly
            let parent = try openParent(link, of: child, mode: mode == .information ? .information : parentMode)
            if let first = seen[parent.identity] {
                throw DiskError(
                    .brokenLink, "the chain of parents goes in a circle: \(child.path) leads back to \(first)",
                    image: path)
            }
            seen[parent.identity] = parent.layer.path
            do throws(DiskError) {
                try child.backend.checkLink(to: parent.layer.backend)
            } catch {
                throw error.about(child.path)
            }
            layers.append(parent.layer)
        }
        return layers
    }

    func openLayer(
        _ driver: any ImageDriver, _ storage: any Storage, _ path: String, _ mode: OpenMode, shownAs name: String,
        snapshot: String? = nil, companions: (any CompanionOpener)? = nil
    ) throws(DiskError) -> Layer {
        let request = OpenRequest(
            storage: storage, path: path, mode: mode, cache: cache, companions: companions ?? finder,
            formatOptions: options.formatOptions, snapshot: snapshot, keepsIdentity: keepsIdentity)
        do throws(DiskError) {
            return Layer(try driver.open(request), path: name)
        } catch {
            throw error.about(name)
        }
    }

    /// The driver for the file that the user named.
    func driver(for storage: any Storage, path: String, mode: OpenMode) throws(DiskError) -> any ImageDriver {
        if let name = options.format { return try Formats.all.driver(named: name) }
        if let driver = try Formats.all.probe(storage) { return driver }
        // Whoever can write to a raw disk could make it look like another format that names files of the host: for
        // writing, the user must have said that it is raw.
        guard mode != .readWrite else {
            throw DiskError(
                .unknownFormat,
                "no known format recognises it; to write to it as a raw disk, say --format raw", image: path)
        }
        return try Formats.all.driver(named: "raw")
    }

    private func openParent(
        _ link: ParentLink, of child: Layer, mode: OpenMode
    ) throws(DiskError) -> (layer: Layer, identity: FileIdentity) {
        let childPath = try realPath(of: child)
        var failure: DiskError?
        if !link.paths.isEmpty {
            do throws(DiskError) {
                let file = try finder.openParent(link.paths, of: childPath, isWritable: mode == .readWrite)
                let driver = try parentDriver(link, file.storage, file.path, of: childPath)
                let layer = try openLayer(driver, file.storage, file.path, mode, shownAs: file.path)
                return (layer, file.identity)
            } catch {
                failure = error
            }
        }
        // Where no path leads to it: the image with that UUID among those beside the child.
        if let failure, failure.kind != .notFound { throw failure }
        if link.hasIdentity, let found = try search(for: link, of: child, at: childPath, mode) { return found }
        if let failure { throw failure }
        let folders = finder.searchFolders(of: childPath).joined(separator: ", ")
        throw DiskError(
            .notFound,
            "the parent is known by its UUID \((link.uuid ?? link.modificationUUID)?.description ?? "(none)") alone, "
                + "and no image in \(folders) has it; "
                + "if it lives elsewhere, give that folder with --allow-dir", image: child.path)
    }

    private func realPath(of layer: Layer) throws(DiskError) -> String { layer.backend.files.first ?? layer.path }

    func parentDriver(
        _ link: ParentLink, _ storage: any Storage, _ path: String, of childPath: String
    ) throws(DiskError) -> any ImageDriver {
        if let name = link.format { return try Formats.all.driver(named: name) }
        if let driver = try Formats.all.probe(storage) { return driver }
        // Raw, if anything: whether the child is one of a parent that has no identity, the child is asked afterwards.
        let raw = try Formats.all.driver(named: "raw")
        let suffix = FilePath(path).extension?.lowercased() ?? ""
        guard !link.mustBeRecognized || raw.fileExtensions.contains(suffix) else {
            throw DiskError(
                .unknownFormat,
                "no known format recognises this parent of \(childPath), which does not record that it is raw; "
                    + "if it is, give it a name that ends in .raw, or record it "
                    + "('qemu-img rebase -u -F raw -b PARENT CHILD')", image: path)
        }
        return raw
    }

    /// Looks at the headers of all images beside `childPath`: of several with that UUID, copies of one another, the
    /// one that the child says was its parent is taken.
    private func search(
        for link: ParentLink, of child: Layer, at childPath: String, _ mode: OpenMode
    ) throws(DiskError) -> (layer: Layer, identity: FileIdentity)? {
        var quiet = options
        quiet.locksImages = false
        let probe = ChainOpener(options: quiet)
        var failure: DiskError?
        for path in finder.neighbours(of: childPath) {
            guard path != childPath, let file = try? probe.finder.open(path, isWritable: false),
                let driver = try? Formats.all.probe(file.storage),
                let layer = try? probe.openLayer(driver, file.storage, file.path, .information, shownAs: path),
                link.matches(layer.backend.identity)
            else { continue }
            do throws(DiskError) {
                try child.backend.checkLink(to: layer.backend)
                let found = try finder.openParent([path], of: childPath, isWritable: mode == .readWrite)
                let opened = try openLayer(driver, found.storage, found.path, mode, shownAs: found.path)
                guard link.matches(opened.backend.identity) else { continue }
                return (opened, found.identity)
            } catch {
                // It may have been changed since, or be damaged; there may be a copy that is not.
                failure = failure ?? error.about(child.path)
            }
        }
        if let failure { throw failure }
        return nil
    }
}

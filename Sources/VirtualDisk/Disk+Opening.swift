internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import Glibc
internal import SystemPackage

extension Disk {
    /// Opens the disk that the image at `path` is the top of: finds, opens, locks and checks its parents.
    ///
    /// The parents are opened read-only. Throws `DiskError`: `DiskError.Kind.brokenLink` where a parent does not
    /// belong to its child, `DiskError.Kind.notFound` and `DiskError.Kind.refused` where one cannot be opened,
    /// `DiskError.Kind.locked` where another process is in the way.
    public static func open(_ path: String, options: DiskOptions = DiskOptions()) throws(DiskError) -> Disk {
        do throws(DiskError) {
            return try openAsAsked(options) { (opener, mode, topIsOpen) throws(DiskError) in
                try opener.open(path, mode: mode, withParents: true, topIsOpen: topIsOpen)
            }
        } catch {
            guard options.allowsReadOnlyFallback, options.isWritable, options.overlay == nil,
                [EROFS, EACCES, EPERM].contains(error.errno)
            else { throw error.about(FileFinder(provider: options.storageProvider).shownName(path)) }
            var options = options
            options.isWritable = false
            return try open(path, options: options)
        }
    }

    /// The file of an image, and its format where that is not to be detected.
    public struct ImageFile: Sendable {
        public var path: String
        public var format: String?

        public init(_ path: String, format: String? = nil) {
            self.path = path
            self.format = format
        }
    }

    /// Opens a disk image by image, from the base up, wherever the files lie: what the images say of their parents'
    /// places does not count, but each must have been made over the one before (`DiskError.Kind.brokenLink`).
    ///
    /// The last one is the top; ``DiskOptions/format`` does not count.
    public static func open(images: [ImageFile], options: DiskOptions = DiskOptions()) throws(DiskError) -> Disk {
        guard let top = images.last else { throw DiskError(.invalidArgument, "a disk has at least one image") }
        do throws(DiskError) {
            return try openAsAsked(options) { (opener, mode, topIsOpen) throws(DiskError) in
                try opener.open(images, mode: mode, topIsOpen: topIsOpen)
            }
        } catch {
            throw error.about(top.path)
        }
    }

    private static func openAsAsked(
        _ options: DiskOptions,
        _ openLayers: (ChainOpener, OpenMode, () -> Void) throws(DiskError) -> [Layer]
    ) throws(DiskError) -> Disk {
        let opener = ChainOpener(options: options)
        guard options.snapshot == nil || !options.isWritable || options.overlay != nil else {
            throw DiskError(
                .invalidArgument, "an internal snapshot cannot be written; with an overlay its disk can")
        }
        var topFiles = 0
        let layers = try openLayers(opener, options.mode) {
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
        if options.isShareable, mode == .readWrite { try expectFixed(layers[0]) }
        if mode == .readWrite {
            do throws(DiskError) { try layers[0].backend.prepareForUse() } catch { throw error.about(layers[0].path) }
        }
        // All files of the images are open now, and none of anything else.
        let files = opener.finder.opened?.withLock { $0 } ?? []
        if let overlay = options.overlay { layers.insert(try opener.open(overlay, over: layers[0]), at: 0) }
        let chain = try opener.makeChain(layers, mode == .readWrite ? files[topFiles...] : files[...])
        // An image that a change of the chain takes out is not to stay open.
        var later = opener
        later.stopNotingFiles()
        return Disk(
            chain: chain, cache: opener.cache, opener: later, lockedFiles: opener.finder.takeLocked(),
            isWritable: options.isWritable || options.overlay != nil, lazyFlushInterval: options.lazyFlushInterval)
    }
}

/// Who shares an image with other writers may not allocate: all its space must be taken.
private func expectFixed(_ layer: Layer) throws(DiskError) {
    try LayerRun([layer]).forEachPart(of: 0..<layer.backend.virtualSize) { (piece, holding) throws(DiskError) in
        guard holding == .data else {
            throw DiskError(
                .unsupported,
                "is to be shared with other writers, and does not hold all its blocks: only a fixed image can",
                image: layer.path, offset: piece.lowerBound)
        }
        return true
    }
}

/// Opens images and follows their links downwards.
struct ChainOpener {
    var options: DiskOptions
    let cache: TableCache
    private(set) var finder: FileFinder
    /// The images, counted from the one that is named, that are opened for writing although they are not on top.
    var writableLayers: Set<Int> = []
    /// Whether writes leave alone what children compare: ``OpenRequest/keepsIdentity``.
    var keepsIdentity = false

    /// Whether files are locked against other processes.
    var locksImages: Bool {
        get { finder.locks }
        set { finder = Self.finder(options, locks: newValue) }
    }

    /// Open files whose locks pass to those that are opened now, if they are the same files.
    var predecessors: [FileStorage] {
        get { finder.predecessors }
        set { finder.predecessors = newValue }
    }

    mutating func stopNotingFiles() { finder.stopNotingFiles() }

    private static func finder(_ options: DiskOptions, locks: Bool) -> FileFinder {
        var finder = FileFinder(
            allowedFolders: options.allowedFolders, locks: locks, notesFiles: options.cache != nil,
            wrap: options.wrapStorage, provider: options.storageProvider)
        finder.isShareable = options.isShareable
        finder.isSequential = options.isSequential
        finder.passed = options.passedFiles
        return finder
    }

    init(options: DiskOptions) {
        self.options = options
        cache = TableCache(capacity: options.tableCacheSize)
        finder = Self.finder(options, locks: options.locksImages)
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

    /// Opens these images, the base first, without a look for others; answers them with the top one first.
    func open(
        _ images: [Disk.ImageFile], mode: OpenMode, topIsOpen: () -> Void
    ) throws(DiskError) -> [Layer] {
        var layers: [Layer] = []
        var seen: Set<FileIdentity> = []
        for (number, image) in images.enumerated().reversed() {
            let mode = layers.isEmpty ? mode : .readOnly
            let file = try finder.open(image.path, isWritable: mode == .readWrite)
            guard seen.insert(file.identity).inserted else {
                throw DiskError(.brokenLink, "is named twice", image: image.path)
            }
            var opener = self
            opener.options.format = image.format
            let driver = try opener.driver(for: file.storage, path: image.path, mode: mode)
            let layer = try openLayer(driver, file.storage, file.path, mode, shownAs: image.path)
            if layers.isEmpty { topIsOpen() }
            guard (layer.backend.parentLink == nil) == (number == 0) else {
                throw DiskError(
                    .brokenLink,
                    number == 0
                        ? "was made over another image, and is named as the base"
                        : "is a base, and is named over another image",
                    image: image.path)
            }
            if let child = layers.last {
                do throws(DiskError) { try child.backend.checkLink(to: layer.backend) } catch {
                    throw error.about(child.path)
                }
            }
            layers.append(layer)
        }
        return layers
    }

    func openLayer(
        _ driver: any ImageDriver, _ storage: any Storage, _ path: String, _ mode: OpenMode, shownAs name: String,
        snapshot: String? = nil, companions: (any CompanionOpener)? = nil
    ) throws(DiskError) -> Layer {
        let request = OpenRequest(
            storage: storage, path: path, mode: mode, cache: cache, companions: companions ?? finder,
            skipsConsistencyChecks: options.skipsConsistencyChecks && mode != .readWrite,
            formatOptions: options.formatOptions, snapshot: snapshot, keepsIdentity: keepsIdentity)
        do throws(DiskError) {
            return Layer(try driver.open(request), path: name, lockedFiles: finder.takeLocked())
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
        quiet.passedFiles = nil
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

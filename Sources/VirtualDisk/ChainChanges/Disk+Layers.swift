internal import DiskFormats
internal import DiskImage
public import DiskStorage

/// Changes of the chain of an open disk, which others may read and write meanwhile.
extension Disk {
    /// Puts an image on top that was made over the top one: from now on writes go there, and the one below is read
    /// only.
    ///
    /// The disk must show the same size through it. The one below is closed cleanly: whatever becomes of this process,
    /// it is a complete image. `DiskError.Kind.brokenLink` where the image does not belong to the top one,
    /// `DiskError.Kind.unsupported` for a disk with an overlay, or an image whose blocks are larger than any that
    /// this disk had when it was opened.
    public func push(_ path: String, format: String? = nil) throws(DiskError) {
        try checkChangeable(withOverlay: false)
        let opener = try imageOpener(format: format)
        let mode: OpenMode = isWritable ? .readWrite : .readOnly
        let child = try opener.open(path, mode: mode, withParents: false)[0]
        do throws(DiskError) {
            try expectFitting(child)
            try changing.withLock { (_) throws(DiskError) in
                try current.change(locks) { (chain) throws(DiskError) in
                    try child.backend.checkLink(to: chain.layers[0].backend)
                    if isWritable {
                        try child.backend.prepareForUse()
                        try settle(&chain, at: 0, as: .readOnly)
                    }
                    chain = makeChain([child] + chain.layers, after: chain, keepsCached: false)
                }
            }
        } catch {
            try? child.backend.close()  // nothing was written to it
            child.unlock()
            throw error.about(path)
        }
    }

    /// Makes a new image over the top one and puts it on top (``push(_:format:)``); answers its path. Of `image`, all
    /// but the parent counts; without a path it gets ``ImageSnapshot/suggestedPath(for:fileExtension:)``.
    public func makeSnapshot(_ image: NewImage = NewImage(path: "")) throws(DiskError) -> String {
        try checkChangeable(withOverlay: false)
        let top = current.chain.layers[0]
        var snapshot = ImageSnapshot(of: top.backend.files.first ?? top.path, image: image)
        snapshot.format = top.backend.format
        if image.allowedFolders.isEmpty { snapshot.image.allowedFolders = opener?.options.allowedFolders ?? [] }
        snapshot.image.size = size
        var path = ""
        try whileWaiting { () throws(DiskError) in path = try snapshot.create(over: top.backend.format) }
        do throws(DiskError) {
            try push(path, format: snapshot.image.format)
        } catch {
            if let layers = try? ChainOpener(options: DiskOptions()).open(path, mode: .information, withParents: false)
            {
                try? ImageFiles(of: layers, but: []).remove()
            }
            throw error
        }
        return path
    }

    /// Runs `body`, which makes a new image over the top one, to be put on top with ``push(_:format:)``. Requests wait
    /// meanwhile: who makes it reads the file of the top one.
    public func whileWaiting(toMakeSnapshot body: () throws(DiskError) -> Void) throws(DiskError) {
        try current.change(locks) { (chain) throws(DiskError) in
            if isWritable {
                // From its first write on, an image keeps what children record of it; before it, that may yet change.
                try chain.beginWriting()
                try chain.flush()
            }
            try body()
        }
    }

    /// Takes the top image away: the disk shows what the one below does, which is opened as the top one was. Its files
    /// are removed if they shall be. The one below must have a disk of the same size.
    public func popTop(deletingFiles: Bool = false) throws(DiskError) {
        try checkChangeable(withOverlay: false)
        try changing.withLock { (_) throws(DiskError) in
            var files = ImageFiles()
            try current.change(locks) { (chain) throws(DiskError) in
                guard chain.layers.count > 1 else {
                    throw DiskError(.invalidArgument, "is the only image of the disk", image: chain.layers[0].path)
                }
                let top = chain.layers[0]
                guard chain.layers[1].backend.virtualSize == size else {
                    throw DiskError(
                        .unsupported,
                        "its disk has \(chain.layers[1].backend.virtualSize) bytes, the one that is open \(size)",
                        image: chain.layers[1].path)
                }
                if deletingFiles { files = try ImageFiles(of: [top], but: chain.layers[1...]) }
                if isWritable { try settle(&chain, at: 1, as: .readWrite) }
                do throws(DiskError) {
                    try closeImage(of: &chain, at: 0)
                } catch {
                    if isWritable { try? settle(&chain, at: 1, as: .readOnly) }  // the first failure is told
                    throw error
                }
                top.unlock()
                chain = makeChain(Array(chain.layers[1...]), after: chain, keepsCached: false)
            }
            try files.remove()
        }
    }

    // MARK: - What every change needs

    var policy: WritePolicy { opener?.options.writePolicy ?? WritePolicy() }

    /// The way to open images, for a disk whose chain can change.
    private func imageOpener(format: String?) throws(DiskError) -> ChainOpener {
        guard var opener else {
            throw DiskError(
                .unsupported, "the chain of a disk that was made of open images does not change",
                image: current.chain.layers[0].path)
        }
        opener.options.format = format
        return opener
    }

    /// Refuses where the chain cannot change. `withOverlay`: images below an overlay can, as far as it is right about
    /// them afterwards.
    func checkChangeable(withOverlay: Bool) throws(DiskError) {
        let path = current.chain.layers[0].path
        let opener = try imageOpener(format: nil)
        guard opener.options.snapshot == nil else {
            throw DiskError(.unsupported, "shows an internal snapshot: close the disk first", image: path)
        }
        guard withOverlay || opener.options.overlay == nil else {
            throw DiskError(
                .unsupported,
                "is an overlay, which keeps the image below it from being written: close the disk, and open it "
                    + "without", image: path)
        }
        guard !hasUncertainLink.withLock({ $0 }) else {
            throw DiskError(
                .unsupported,
                "the last change of the chain failed while an image was being told of another parent: close the disk "
                    + "and open it again", image: path)
        }
    }

    private func expectFitting(_ child: Layer) throws(DiskError) {
        guard child.backend.virtualSize == size else {
            throw DiskError(
                .brokenLink, "its disk has \(child.backend.virtualSize) bytes, the one that is open \(size)")
        }
        guard child.backend.blockSize <= locks.regionSize else {
            throw DiskError(
                .unsupported,
                "has blocks of \(child.backend.blockSize) bytes; an open disk is locked by regions of "
                    + "\(locks.regionSize): close the disk, or make the image with smaller blocks")
        }
    }

    /// Closes image `index` of the chain and opens it anew in another mode; for who has the disk for itself. If that
    /// fails, the image goes on as it was, or every request to it fails.
    ///
    /// The locks pass from the old descriptors to the new ones without a gap.
    func settle(
        _ chain: inout Chain, at index: Int, as mode: OpenMode, keepingIdentity: Bool = false, isResized: Bool = false
    ) throws(DiskError) {
        let old = chain.layers[index]
        try closeImage(of: &chain, at: index, isResized: isResized)
        do throws(DiskError) {
            chain = replacing(index, of: chain, with: try reopen(old, as: mode, keepingIdentity))
        } catch {
            chain = replacing(index, of: chain, with: asItWas(old, isTop: index == 0))
            throw error
        }
    }

    /// Closes image `index` of the chain. Where that fails it goes on as it was, or every request to it fails.
    ///
    /// - Parameter isResized: It has another size than when it was opened: nothing but closing it can be done.
    func closeImage(of chain: inout Chain, at index: Int, isResized: Bool = false) throws(DiskError) {
        let layer = chain.layers[index]
        // What cannot be made durable is in memory, and stays there: as long as nothing is closed, nothing is lost.
        if layer.backend.isWritable, !isResized {
            if index == 0 { chain.earlyWriteback?.wait() }
            do throws(DiskError) { try layer.backend.flush() } catch { throw error.about(layer.path) }
        }
        do throws(DiskError) {
            try layer.backend.close()
        } catch {
            chain = replacing(index, of: chain, with: asItWas(layer, isTop: index == 0))
            throw error.about(layer.path)
        }
    }

    /// An image that was closed, open again in the mode that it had.
    private func asItWas(_ layer: Layer, isTop: Bool) -> Layer {
        do throws(DiskError) {
            return try reopen(layer, as: layer.backend.isWritable ? .readWrite : .readOnly, !isTop)
        } catch {
            return Layer(FailedImage(layer.backend, error), path: layer.path, lockedFiles: layer.lockedFiles)
        }
    }

    private func replacing(_ index: Int, of chain: Chain, with layer: Layer) -> Chain {
        var layers = chain.layers
        layers[index] = layer
        return makeChain(layers, after: chain, dirty: chain.dirty, writing: index == 0 ? nil : chain.writing)
    }

    /// The chain of these images, instead of another one.
    ///
    /// - Parameter keepsCached: Whether what lies below the image that is written shows the same as before.
    func makeChain(
        _ layers: [Layer], after chain: Chain, dirty: DirtyRegions? = nil, writing: WritingState? = nil,
        keepsCached: Bool = true
    ) -> Chain {
        hasChangedChain.withLock { $0 = true }
        let firstCached = isWritable ? 1 : 0
        let isCached = firstCached < layers.count
        let cache = chain.cache.map { cache in
            BlockCache(
                // Where nothing is cached it is not asked; images that are not part of the disk are not kept for it.
                cache, source: Chain(topFirst: Array(isCached ? layers[firstCached...] : layers[...])),
                keepsContent: isCached && keepsCached)
        }
        return Chain(
            topFirst: layers, cache: cache, firstCached: isCached ? firstCached : .max, isWritable: isWritable,
            dirty: dirty, writing: writing, policy: policy)
    }

    /// Closes the block cache, if there is one, for the images as they are now; they are closed and still locked.
    func closeCache(of chain: Chain) {
        guard let cache = chain.cache else { return }
        guard hasChangedChain.withLock({ $0 }), let opener else { return cache.close() }
        let cached = chain.layers[min(isWritable ? 1 : 0, chain.depth)...]
        let files = openedFiles(of: cached, opener.options)
        cache.close(as: CacheIdentity(cached, files[...], opener.options))
    }

    /// What is known now of all files of these images. Without all of them a cache is of other images, and is emptied
    /// when it is opened again.
    private func openedFiles(of layers: ArraySlice<Layer>, _ options: DiskOptions) -> [OpenedFile] {
        let paths = layers.flatMap(\.backend.files)
        if let passed = options.passedFiles, passed.isSole {
            // No other file can have the number of one that is open: one that took its place is noticed.
            return paths.compactMap { path in
                passed.file(at: path).map { OpenedFile(path: path, file: $0, stamp: FileStamp($0)) }
            }
        }
        var options = options
        options.locksImages = false
        let finder = ChainOpener(options: options).finder
        for path in paths { _ = try? finder.open(path, isWritable: false) }
        return finder.opened?.withLock { $0 } ?? []
    }

    private func reopen(_ layer: Layer, as mode: OpenMode, _ keepsIdentity: Bool) throws(DiskError) -> Layer {
        var opener = try imageOpener(format: layer.backend.format)
        opener.keepsIdentity = keepsIdentity
        let path = layer.backend.files.first ?? layer.path
        guard mode == .readWrite else {
            for file in layer.lockedFiles { file.keepReaderLocks() }
            opener.locksImages = false
            let new = try opener.open(path, mode: mode, withParents: false)[0]
            return Layer(new.backend, path: layer.path, lockedFiles: layer.lockedFiles)
        }
        opener.predecessors = layer.lockedFiles
        do throws(DiskError) {
            let new = try opener.open(path, mode: mode, withParents: false)[0]
            do throws(DiskError) {
                try new.backend.prepareForUse()
            } catch {
                takeBackLocks(layer, from: new.lockedFiles)
                throw error.about(layer.path)
            }
            layer.unlock()
            return Layer(new.backend, path: layer.path, lockedFiles: new.lockedFiles)
        } catch {
            takeBackLocks(layer, from: opener.finder.takeLocked())
            throw error
        }
    }

    /// An image that was to be opened anew keeps its locks: before those who have taken them over give them up.
    private func takeBackLocks(_ layer: Layer, from files: [FileStorage]) {
        for file in layer.lockedFiles { file.resumeImageLock() }
        for file in files { file.unlockImage() }
    }
}

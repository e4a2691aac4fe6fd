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
    /// `DiskError.Kind.unsupported` for a disk with a block cache, or an image whose blocks are larger than any that
    /// this disk had when it was opened.
    public func push(_ path: String, format: String? = nil) throws(DiskError) {
        let opener = try changeableOpener(format: format)
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
                    chain = Chain(topFirst: [child] + chain.layers, isWritable: isWritable, policy: policy)
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
        // From its first write on, an image keeps what children record of it; before it, that may yet change.
        if isWritable {
            try beginWriting()
            try flush()
        }
        let top = current.chain.layers[0]
        var snapshot = ImageSnapshot(of: top.backend.files.first ?? top.path, image: image)
        snapshot.format = top.backend.format
        if image.allowedFolders.isEmpty { snapshot.image.allowedFolders = opener?.options.allowedFolders ?? [] }
        snapshot.image.size = size
        let path = try snapshot.create(over: top.backend.format)
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

    /// Takes the top image away: the disk shows what the one below does, which is opened as the top one was. Its files
    /// are removed if they shall be. The one below must have a disk of the same size.
    public func popTop(deletingFiles: Bool = false) throws(DiskError) {
        _ = try changeableOpener()
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
                do throws(DiskError) { try top.backend.close() } catch { throw error.about(top.path) }
                top.unlock()
                chain = Chain(topFirst: Array(chain.layers[1...]), isWritable: isWritable, policy: policy)
            }
            try files.remove()
        }
    }

    // MARK: - What every change needs

    var policy: WritePolicy { opener?.options.writePolicy ?? WritePolicy() }

    /// The way to open images, for a disk whose chain can change.
    func changeableOpener(format: String? = nil) throws(DiskError) -> ChainOpener {
        let path = current.chain.layers[0].path
        guard var opener else {
            throw DiskError(
                .unsupported, "the chain of a disk that was made of open images does not change", image: path)
        }
        guard opener.options.cache == nil else {
            throw DiskError(
                .unsupported, "is read through a block cache, which is bound to its images: close the disk first",
                image: path)
        }
        guard opener.options.snapshot == nil else {
            throw DiskError(.unsupported, "shows an internal snapshot: close the disk first", image: path)
        }
        guard opener.options.overlay == nil else {
            throw DiskError(.unsupported, "is shown through an overlay: close the disk first", image: path)
        }
        opener.options.format = format
        return opener
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
    /// fails, the image is opened as it was before the error is thrown.
    ///
    /// A writer that becomes a reader keeps its locks, but for those that readers do not have. A reader that becomes a
    /// writer gives its own back first, since locks of one process on two descriptors exclude each other: if another
    /// process is quicker then, the image stays what it was.
    func settle(
        _ chain: inout Chain, at index: Int, as mode: OpenMode, keepingIdentity: Bool = false
    ) throws(DiskError) {
        let old = chain.layers[index]
        let wasWritable = old.backend.isWritable
        do throws(DiskError) { try old.backend.close() } catch { throw error.about(old.path) }
        do throws(DiskError) {
            chain = replacing(index, of: chain, with: try reopen(old, as: mode, keepingIdentity))
        } catch {
            // As it was. Where that fails too, every request will say so.
            if let again = try? reopen(old, as: wasWritable ? .readWrite : .readOnly, false) {
                chain = replacing(index, of: chain, with: again)
            }
            throw error
        }
    }

    private func replacing(_ index: Int, of chain: Chain, with layer: Layer) -> Chain {
        var layers = chain.layers
        layers[index] = layer
        return Chain(
            topFirst: layers, isWritable: isWritable, dirty: chain.dirty, writing: index == 0 ? nil : chain.writing,
            policy: policy)
    }

    private func reopen(_ layer: Layer, as mode: OpenMode, _ keepsIdentity: Bool) throws(DiskError) -> Layer {
        var opener = try changeableOpener(format: layer.backend.format)
        opener.keepsIdentity = keepsIdentity
        let path = layer.backend.files.first ?? layer.path
        guard mode == .readWrite else {
            for file in layer.lockedFiles { file.keepReaderLocks() }
            opener.locksImages = false
            let new = try opener.open(path, mode: mode, withParents: false)[0]
            return Layer(new.backend, path: layer.path, lockedFiles: layer.lockedFiles)
        }
        layer.unlock()
        let new = try opener.open(path, mode: mode, withParents: false)[0]
        do throws(DiskError) { try new.backend.prepareForUse() } catch { throw error.about(layer.path) }
        return Layer(new.backend, path: layer.path, lockedFiles: new.lockedFiles)
    }
}

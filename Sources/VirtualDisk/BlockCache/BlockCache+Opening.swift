internal import DiskFormats
internal import DiskStorage

extension BlockCache {
    /// Opens or makes a cache for images. Nil, and the user is told, where there cannot be one now; throws only where
    /// the named file is something else, which must not be overwritten.
    static func open(
        _ options: CacheOptions, _ opener: ChainOpener, source: Chain, identity: CacheIdentity
    ) throws(DiskError) -> BlockCache? {
        let storage: any Storage
        do throws(DiskError) {
            storage = try openFile(options.path, opener.finder)
        } catch {
            // Of these the user has to choose another file; the others may be gone the next time.
            if error.kind == .refused || error.kind == .invalidArgument { throw error.about(options.path) }
            options.warn("\(error.about(options.path)); the disk goes on without a block cache")
            return nil
        }
        do throws(DiskError) {
            let found = try CacheFile(storage, path: options.path)
            return try make(found, storage, options, source: source, identity: identity)
        } catch {
            if error.kind == .invalidArgument { throw error.about(options.path) }
            options.warn("\(error.about(options.path)); the disk goes on without a block cache")
            return nil
        }
    }

    private static func openFile(_ path: String, _ finder: FileFinder) throws(DiskError) -> any Storage {
        // What the cache holds nobody may read who may not read the images.
        if try !finder.exists(path) { _ = try finder.create(path) }
        // What is no cache is not even locked, which it may be already: it may be one of the images.
        _ = try CacheFile(FileFinder().open(path, isWritable: false).storage, path: path)
        return try finder.open(path, isWritable: true).storage
    }

    private static func make(
        _ found: CacheFile, _ storage: any Storage, _ options: CacheOptions, source: Chain, identity: CacheIdentity
    ) throws(DiskError) -> BlockCache {
        let layout = try found.layout(size: options.size)
        if let size = options.size, found.isThere, layout.size != (try VCILayout(bytes: size)).size {
            options.note(
                "\(options.path): is there already and has \(layout.size * VCILayout.blockSize) bytes: its size stays")
        }
        let type = found.header?.type ?? .dynamic
        let index = CacheIndex(slotCount: Int(layout.slotCount))
        var isStale = true
        switch try found.state(storage, identity, diskSize: source.size) {
        case .new: try VCIFile.makeEmpty(storage, layout, type: type)
        case .fits(let contents):
            isStale = false
            index.fill(contents, layout)
        case .isEmpty: isStale = false
        case .other:
            options.note("\(options.path): was the block cache of another disk, or this one was changed: emptied")
        case .unclean: options.note("\(options.path): the block cache was not closed cleanly: emptied")
        case .broken(let error): options.warn("\(error.about(options.path)): the block cache is emptied")
        }
        return BlockCache(
            storage, layout, type, index: index, isStale: isStale, source: source, identity: identity, options)
    }
}

extension CacheOptions {
    fileprivate func warn(_ text: String) { report(CacheNotice(isWarning: true, text: text)) }
    fileprivate func note(_ text: String) { report(CacheNotice(isWarning: false, text: text)) }
}

/// What is in a cache's file when it is opened.
struct CacheFile {
    /// Whether there is anything.
    let isThere: Bool
    /// Nil: it cannot be read.
    let header: VCIHeader?
    private let failure: DiskError?

    /// What to do with it.
    enum State {
        /// It is to be made.
        case new
        case fits(VCIContents)
        /// Nothing is cached.
        case isEmpty
        /// It is of other images, or of these in another state.
        case other
        case unclean
        case broken(DiskError)
    }

    /// Throws `DiskError.Kind.invalidArgument` for a file that is no cache.
    init(_ storage: any Storage, path: String) throws(DiskError) {
        let bytes = try storage.availableBytes(at: 0, count: VCIHeader.byteCount, for: .header)
        // One that was being made when the power failed may have the length of its header and nothing in it.
        isThere = try storage.length() > UInt64(VCIHeader.byteCount) || bytes.contains { $0 != 0 }
        if isThere, !VCIHeader.hasSignature(bytes) {
            throw DiskError(.invalidArgument, "is there already and is no block cache (VCI): name another file")
        }
        do throws(DiskError) {
            header = try VCIHeader(parsing: bytes)
            failure = nil
        } catch {
            header = nil
            failure = error
        }
    }

    /// The file's layout; of one that has none, the one of that size.
    func layout(size: UInt64?) throws(DiskError) -> VCILayout {
        if let header, let layout = VCILayout(size: header.size) { return layout }
        return try VCILayout(bytes: size ?? CacheOptions.defaultSize)
    }

    func state(
        _ storage: any Storage, _ identity: CacheIdentity, diskSize: UInt64
    ) throws(DiskError) -> State {
        guard isThere else { return .new }
        guard let header else { return .broken(failure ?? DiskError(.invalidImage, "the header cannot be read")) }
        if header.isUnclean { return .unclean }
        let isOurs = identity.isReliable && header.modificationUUID == identity.modificationUUID
        guard isOurs, header.imageUUID == identity.uuid else {
            return header.modificationUUID.isNull && header.imageUUID.isNull ? .isEmpty : .other
        }
        do throws(DiskError) {
            let contents = try VCIContents(storage, header)
            try contents.checkFits(header, diskSize: diskSize)
            return .fits(contents)
        } catch {
            // Also where it cannot be read at all: the first change will tell.
            return .broken(error)
        }
    }
}

extension VCIContents {
    /// Whether all lies where this program puts it; another one's cache need not.
    fileprivate func checkFits(_ header: VCIHeader, diskSize: UInt64) throws(DiskError) {
        let other = DiskError(.unsupported, "the block cache is laid out as another program does it")
        guard let layout = VCILayout(size: header.size), header.rootAddress == layout.rootAddress,
            header.mapAddress == VCIHeader(layout, type: header.type).mapAddress, map.managed == layout.size
        else { throw other }
        let end = diskSize.dividedRoundingUp(by: VCILayout.blockSize)
        for extent in extents {
            guard extent.first % layout.chunkBlocks == 0, extent.first < end,
                UInt64(extent.blocks) == min(layout.chunkBlocks, end - extent.first),
                layout.slot(at: extent.address) != nil
            else { throw other }
        }
    }
}

extension CacheIndex {
    /// Takes over what a file of this layout holds: whose extents do not overlap, so that no slot and no chunk is twice
    /// among them.
    fileprivate func fill(_ contents: VCIContents, _ layout: VCILayout) {
        fill(
            contents.order.lazy.compactMap { number in
                let extent = contents.extents[Int(number)]
                return layout.slot(at: extent.address).map { (Int32($0), extent.first / layout.chunkBlocks) }
            })
    }
}

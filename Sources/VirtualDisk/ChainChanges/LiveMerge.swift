internal import DiskFormats
internal import DiskImage
internal import DiskStorage

/// The steps of a merge on an open disk; numbers are those of the chain when it began, which no step changes but the
/// last.
struct LiveMerge {
    private let disk: Disk
    private let source: Int
    private let target: Int

    /// Parts of the disk that may be copied while all requests wait.
    private static let lastParts = 4
    /// After so many rounds requests wait, however much was written meanwhile.
    private static let rounds = 12

    init(_ disk: Disk, _ source: Int, _ target: Int) throws(DiskError) {
        self.disk = disk
        self.source = source
        self.target = target
        let layers = disk.current.chain.layers
        guard layers.indices.contains(source), layers.indices.contains(target), source != target else {
            throw DiskError(
                .invalidArgument,
                "images \(source) and \(target) are not two of the disk's, which are 0 to \(layers.count - 1)",
                image: layers[0].path)
        }
    }

    private var isDownwards: Bool { source < target }
    private var goers: Range<Int> { isDownwards ? source..<target : target + 1..<source + 1 }
    /// The image that is told of another parent.
    private var relinked: Int? {
        let child = isDownwards ? source - 1 : target
        // An overlay without a name is opened over no image again.
        return child < 0 || child == 0 && hasTemporaryOverlay ? nil : child
    }
    private var newParent: Int? {
        isDownwards ? target : (source + 1 < disk.current.chain.layers.count ? source + 1 : nil)
    }
    /// Whether the guest's writes count: downwards, what is copied may be written to meanwhile; upwards, what the
    /// target got may be given up again, because the images that go away say so too.
    private var isActive: Bool { disk.isWritable && (isDownwards ? source == 0 : target == 0) }
    /// Whether the disk writes to an image, which is then open for writing without our doing.
    private func isWritten(_ index: Int) -> Bool { index == 0 && disk.isWritable }
    /// Whether no image lies over it, but an overlay may.
    private func isTopImage(_ index: Int) -> Bool { index == disk.topImage }

    private var overlay: DiskOverlay? { disk.opener?.options.overlay }
    private var hasTemporaryOverlay: Bool { if case .temporary? = overlay { true } else { false } }

    // MARK: - What can be known before anything is changed

    func check() throws(DiskError) {
        let layers = disk.current.chain.layers
        try checkOverlay(layers)
        let sizes = (source: layers[source].backend.virtualSize, target: layers[target].backend.virtualSize)
        if isDownwards, sizes.source > sizes.target || isTopImage(source) && sizes.source < sizes.target,
            !(layers[target].backend is any EditableBackend)
        {
            throw DiskError(
                .unsupported, "the format \(layers[target].backend.format) cannot give its disk another size",
                image: layers[target].path)
        }
        guard let child = relinked, let parent = newParent else { return }
        guard let backend = layers[child].backend as? any RelinkableBackend else {
            throw DiskError(
                .unsupported, "the format \(layers[child].backend.format) cannot name another parent",
                image: layers[child].path)
        }
        let description = NewImage.describe(layers[parent...], for: backend.files.first ?? layers[child].path)
        do throws(DiskError) { try backend.checkParent(description) } catch {
            throw error.about(layers[child].path)
        }
    }

    /// An overlay keeps the images below it from showing anything else: it goes into none of them. One with a name
    /// records the image right below it, by what that image's format has, or else by when its file was changed.
    private func checkOverlay(_ layers: [Layer]) throws(DiskError) {
        guard let overlay else { return }
        guard source > 0, target > 0 else {
            throw DiskError(
                .unsupported,
                "is an overlay, which keeps the images below it as they are: they can be merged with one another",
                image: layers[0].path)
        }
        guard case .file = overlay else { return }
        // While the overlay names it, an image that it knows by its time of change keeps that time.
        let isRecorded = layers[1].backend.identity != ImageIdentity()
        let changesFirst =
            isDownwards && source == 1 && layers[1].backend.virtualSize > layers[target].backend.virtualSize
        guard isRecorded || target > 1 && relinked != 1 && !changesFirst else {
            throw DiskError(
                .unsupported,
                "is an overlay with a name, and records \(layers[1].path) by when it was changed last, which would not "
                    + "be so any more: it would not be opened again; images below that one can be merged",
                image: layers[0].path)
        }
    }

    // MARK: - All steps

    func run(
        _ control: OperationControl, keepsFiles: Bool, _ whenDetached: () -> Void
    ) throws(DiskError) -> ChainMerge.Outcome {
        let before = disk.current.chain.layers
        let files = try ImageFiles(
            of: before[goers], but: Array(before[..<goers.lowerBound] + before[goers.upperBound...]),
            by: disk.opener?.finder ?? FileFinder())
        let dirty = isActive ? DirtyRegions(size: disk.size, regionSize: disk.locks.regionSize) : nil
        do throws(DiskError) {
            try disk.current.change(disk.locks) { (chain) throws(DiskError) in
                if !isWritten(target) {
                    try disk.settle(&chain, at: target, as: .readWrite, keepingIdentity: true)
                }
            }
            try grow()
            if let dirty {
                try disk.current.change(disk.locks) { (chain) throws(DiskError) in
                    chain = disk.makeChain(chain.layers, after: chain, dirty: dirty, writing: chain.writing)
                }
            }
            let copy = try copyAll(dirty, control)
            try cutOff(copy.target)
            // As much of this as can be while requests go on; the disk's own top image is looked after by its flushes.
            if target > 0 { try disk.finishRelocating(in: copy.target, isClosing: false) }
            try finish(copy, dirty) {
                // Over a target that is written to they would show what the disk never did. What fails shows below.
                if isActive, !keepsFiles { try? files.remove() }
                whenDetached()
            }
        } catch {
            restore()
            throw error
        }
        if !keepsFiles { try files.remove() }
        return ChainMerge.Outcome(
            source: before[source].path, target: before[target].path, obsoleteFiles: files.paths)
    }

    // MARK: - Room

    /// Downwards: makes the target's disk as large as the source's.
    private func grow() throws(DiskError) {
        let layers = disk.current.chain.layers
        let end = layers[source].backend.virtualSize
        let start = layers[target].backend.virtualSize
        guard isDownwards, end > start else { return }
        // Where the target ends, zeros are shown; larger, it would show what lies below it there.
        let showsMore = layers[(target + 1)...].contains { $0.backend.virtualSize > start }
        if showsMore { try mask(start..<end) }
        try disk.current.change(disk.locks) { (chain) throws(DiskError) in
            if showsMore {
                // What was discarded since is masked again, while nobody writes.
                let upper = Chain(
                    topFirst: Array(chain.layers[source...]), isWritable: true,
                    writing: source == 0 ? chain.writing : nil)
                try mask(start..<end, in: upper)
                try upper.flush()
                if !isWritten(source) { try disk.settle(&chain, at: source, as: .readOnly) }
            }
            try resize(&chain, to: end, opened: .readWrite, keepingIdentity: true)
        }
    }

    /// Has the source say that it is zeros where the target will not hide any more what lies below it, as far as no
    /// image says anything there; region by region, while the disk is used.
    private func mask(_ range: Range<UInt64>) throws(DiskError) {
        if !isWritten(source) {
            try disk.current.change(disk.locks) { (chain) throws(DiskError) in
                try disk.settle(&chain, at: source, as: .readWrite, keepingIdentity: true)
            }
        }
        let chain = disk.current.chain
        let upper =
            source == 0 && disk.isWritable
            ? chain : Chain(topFirst: Array(chain.layers[source...]), isWritable: true)
        try forEachRegion(of: range) { (part) throws(DiskError) in try mask(part, in: upper) }
        try upper.flush()
    }

    private func mask(_ range: Range<UInt64>, in upper: Chain) throws(DiskError) {
        let below = Chain(topFirst: Array(upper.layers[(target - source + 1)...]))
        try LayerRun(upper.layers[..<(target - source)]).forEachPart(of: range) { (part, holding) throws(DiskError) in
            guard holding == .nothing else { return true }
            try upper.beginWriting()
            try upper.maskZeros(part, over: below)
            return true
        }
    }

    /// Gives the target's disk another size, and opens the image again: translations do not change while one is open.
    private func resize(
        _ chain: inout Chain, to size: UInt64, opened mode: OpenMode, keepingIdentity keepsIdentity: Bool = false
    ) throws(DiskError) {
        let layer = chain.layers[target]
        guard let backend = layer.backend as? any EditableBackend else {
            preconditionFailure("an image was looked at before it was merged")
        }
        var failure: DiskError?
        do throws(DiskError) { try backend.resize(to: size) } catch { failure = error.about(layer.path) }
        try disk.settle(
            &chain, at: target, as: mode, keepingIdentity: keepsIdentity, isResized: true)
        if let failure { throw failure }
        let now = chain.layers[target].backend.virtualSize
        guard now == size else {
            throw DiskError(
                .unsupported, "its disk was to have \(size) bytes, and has \(now)", image: layer.path)
        }
    }

    /// What the target has behind the end of the source's disk does not show, and may not when the source is gone.
    private func cutOff(_ upper: Chain) throws(DiskError) {
        let start = disk.current.chain.layers[source].backend.virtualSize
        guard isDownwards, start < upper.size else { return }
        try upper.beginWriting()
        try forEachRegion(of: start..<upper.size) { (part) throws(DiskError) in
            try upper.discardLocked(part.lowerBound, part.upperBound - part.lowerBound)
        }
        try upper.flush()
    }

    /// Calls `body` with the parts of a range that lie in one region each, which is locked meanwhile.
    private func forEachRegion(
        of range: Range<UInt64>, _ body: (Range<UInt64>) throws(DiskError) -> Void
    ) throws(DiskError) {
        let locks = disk.locks
        var next = range.lowerBound
        while next < range.upperBound {
            let start = next
            let length = min(range.upperBound - start, locks.regionSize - start % locks.regionSize)
            next += length
            locks.lockExclusive(start, length)
            defer { locks.unlockExclusive(start, length) }
            try body(start..<start + length)
        }
    }

    // MARK: - Copying

    private func copyAll(_ dirty: DirtyRegions?, _ control: OperationControl) throws(DiskError) -> LayerCopy {
        let chain = disk.current.chain
        // The disk's own where that is the target's: what it allocates must be known there.
        let upper = target == 0 ? chain : Chain(topFirst: Array(chain.layers[target...]), isWritable: true)
        let lower = chain.layers[(goers.upperBound + (isDownwards ? 1 : 0))...]
        let copy = LayerCopy(
            isDownwards ? .downwards : .upwards, of: chain.layers[goers], into: upper,
            below: lower.isEmpty ? nil : Chain(topFirst: Array(lower)), locks: disk.locks)
        try copy.run(control)
        guard let dirty else { return copy }
        for _ in 0..<Self.rounds {
            let parts = dirty.take()
            if parts.count <= Self.lastParts {
                for part in parts { dirty.note(part.lowerBound, part.upperBound - part.lowerBound) }
                break
            }
            for part in parts {
                try control.checkCancelled()
                try copy.copyPart(part)
            }
            try copy.target.flush()
        }
        return copy
    }

    // MARK: - The end

    /// Puts the images in their new order, while all requests wait.
    private func finish(
        _ copy: LayerCopy, _ dirty: DirtyRegions?, _ whenDetached: () -> Void
    ) throws(DiskError) {
        try disk.current.change(disk.locks) { (chain) throws(DiskError) in
            if let dirty {
                for part in dirty.take() { try copy.copyPartLocked(part) }
                try copy.target.flush()
            }
            if !isWritten(target) { try copy.target.fillHoles() }
            try settleTarget(&chain)
            try relink(&chain)
            let goers = goers
            for layer in chain.layers[goers] {
                // Nothing of it is needed any more.
                try? layer.backend.close()
                layer.unlock()
            }
            chain = disk.makeChain(
                Array(chain.layers[..<goers.lowerBound] + chain.layers[goers.upperBound...]), after: chain,
                writing: source == 0 ? nil : chain.writing,
                // Images that are not written show the same; the one that is has taken something from them, or given.
                keepsCached: !disk.isWritable || source > 0 && target > 0)
            whenDetached()
        }
    }

    /// Closes the target, and opens it as it will be used; one that is about to get another parent stays as it is.
    private func settleTarget(_ chain: inout Chain) throws(DiskError) {
        guard isDownwards else { return }
        let mode: OpenMode = source == 0 && disk.isWritable ? .readWrite : .readOnly
        // What had the top image's place has its size.
        if isTopImage(source), chain.layers[target].backend.virtualSize > disk.size {
            return try resize(&chain, to: disk.size, opened: mode)
        }
        try disk.settle(&chain, at: target, as: mode)
    }

    /// Tells the image above of its new parent. From then on nothing can fail that would have to be taken back.
    private func relink(_ chain: inout Chain) throws(DiskError) {
        guard let relinked else { return }
        if !chain.layers[relinked].backend.isWritable {
            try disk.settle(&chain, at: relinked, as: .readWrite, keepingIdentity: true)
        }
        let layer = chain.layers[relinked]
        guard let backend = layer.backend as? any RelinkableBackend else {
            preconditionFailure("an image was looked at before it was merged")
        }
        let path = layer.backend.files.first ?? layer.path
        let parent =
            newParent.map { .image(NewImage.describe(chain.layers[$0...], for: path)) }
            ?? ImageChanges.ParentChange.none
        var failure: DiskError?
        do throws(DiskError) { try backend.relink(to: parent) } catch { failure = error.about(layer.path) }
        if let failure {
            // It may name either parent now, and shows the same over both. What is in memory is what is in the file
            // again after this; if not, requests fail.
            disk.hasUncertainLink.withLock { $0 = true }
            // An overlay is not opened twice; what it says of its image is read from the file no more.
            if relinked >= disk.topImage {
                try? disk.settle(&chain, at: relinked, as: isWritten(relinked) ? .readWrite : .readOnly)
            }
            throw failure
        }
        // The top image goes on as what it is for the guest. One that cannot be opened to be read stays open for
        // writing.
        if !isWritten(relinked) { try? disk.settle(&chain, at: relinked, as: .readOnly) }
    }

    /// After a failure: images are read again, if nobody but the merge writes to them. One that cannot be opened so
    /// stays open for writing, which nobody does.
    private func restore() {
        try? disk.current.change(disk.locks) { (chain) throws(DiskError) in
            for index in [source, target] where !isWritten(index) && chain.layers[index].backend.isWritable {
                try? disk.settle(&chain, at: index, as: .readOnly)
            }
            // What the top image hides below it may be another than before.
            chain = disk.makeChain(chain.layers, after: chain, writing: chain.writing, keepsCached: !isActive)
        }
    }
}

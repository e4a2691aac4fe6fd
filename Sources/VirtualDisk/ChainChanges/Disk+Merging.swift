internal import DiskImage
public import DiskStorage

/// Merging images of an open disk, which others may read and write meanwhile.
extension Disk {
    /// Merges one image of the disk into another: ``ChainMerge``, on an open disk. Requests go on; they wait for the
    /// region that is being copied, and at the end for the moment in which the images change places.
    ///
    /// Where the top image is merged downwards while it is written to, what is written is copied again, until little
    /// enough is left to be copied while requests wait.
    ///
    /// On `DiskError.Kind.cancelled` and every other error the disk goes on with the images that it had.
    /// `DiskError.Kind.unsupported` where the images' disks are not of one size: that is for a closed disk.
    public func merge(
        _ source: Int, into target: Int, keepsFiles: Bool = false, control: OperationControl = OperationControl()
    ) throws(DiskError) -> ChainMerge.Outcome {
        _ = try changeableOpener()
        var outcome: ChainMerge.Outcome?
        try changing.withLock { (_) throws(DiskError) in
            let merge = try LiveMerge(self, source, target)
            outcome = try merge.run(control, keepsFiles: keepsFiles)
        }
        guard let outcome else { preconditionFailure("a merge that did not fail has an outcome") }
        return outcome
    }
}

/// The steps of a merge on an open disk; numbers are those of the chain when it began, which no step changes but the
/// last.
private struct LiveMerge {
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
        for layer in layers[min(source, target)...max(source, target)] where layer.backend.virtualSize != disk.size {
            throw DiskError(
                .unsupported,
                "its disk has \(layer.backend.virtualSize) bytes, the one that is open \(disk.size): "
                    + "images of several sizes are merged when the disk is closed", image: layer.path)
        }
        if let child = relinked, let parent = newParent {
            guard layers[child].backend is any EditableBackend else {
                throw DiskError(
                    .unsupported, "the format \(layers[child].backend.format) cannot name another parent",
                    image: layers[child].path)
            }
            let link = layers[child].backend.parentLink
            guard link?.paths.isEmpty != true || layers[parent].backend.identity.uuid != nil else {
                throw DiskError(
                    .unsupported, "knows its parent by a UUID alone, and \(layers[parent].path) has none",
                    image: layers[child].path)
            }
        }
    }

    private var isDownwards: Bool { source < target }
    private var goers: Range<Int> { isDownwards ? source..<target : target + 1..<source + 1 }
    private var relinked: Int? { isDownwards ? (source > 0 ? source - 1 : nil) : target }
    private var newParent: Int? {
        isDownwards ? target : (source + 1 < disk.current.chain.layers.count ? source + 1 : nil)
    }
    /// Whether what is copied may be written to meanwhile.
    private var isActive: Bool { isDownwards && source == 0 && disk.isWritable }

    func run(_ control: OperationControl, keepsFiles: Bool) throws(DiskError) -> ChainMerge.Outcome {
        let before = disk.current.chain.layers
        let files = try ImageFiles(
            of: before[goers], but: Array(before[..<goers.lowerBound] + before[goers.upperBound...]))
        let dirty = isActive ? DirtyRegions(size: disk.size, regionSize: disk.locks.regionSize) : nil
        try disk.current.change(disk.locks) { (chain) throws(DiskError) in
            if target > 0 || !disk.isWritable {
                try disk.settle(&chain, at: target, as: .readWrite, keepingIdentity: true)
            }
            if let dirty {
                chain = Chain(
                    topFirst: chain.layers, isWritable: true, dirty: dirty, writing: chain.writing,
                    policy: disk.policy)
            }
        }
        do throws(DiskError) {
            let copy = try copyAll(dirty, control)
            // As much of this as can be while requests go on; the disk's own top image is looked after by its flushes.
            if target > 0 { try disk.finishRelocating(in: copy.target, isClosing: false) }
            try finish(copy, dirty)
        } catch {
            try? restore()  // the first failure is the one to be told
            throw error
        }
        if !keepsFiles { try files.remove() }
        return ChainMerge.Outcome(
            source: before[source].path, target: before[target].path, obsoleteFiles: files.paths)
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
    private func finish(_ copy: LayerCopy, _ dirty: DirtyRegions?) throws(DiskError) {
        try disk.current.change(disk.locks) { (chain) throws(DiskError) in
            if let dirty {
                for part in dirty.take() { try copy.copyPartLocked(part) }
                try copy.target.flush()
            }
            if target > 0 || !disk.isWritable { try copy.target.fillHoles() }
            try settleTarget(&chain)
            try relink(&chain)
            let goers = goers
            for layer in chain.layers[goers] {
                // Nothing of it is needed any more.
                try? layer.backend.close()
                layer.unlock()
            }
            chain = Chain(
                topFirst: Array(chain.layers[..<goers.lowerBound] + chain.layers[goers.upperBound...]),
                isWritable: disk.isWritable, writing: source == 0 ? nil : chain.writing,
                policy: disk.policy)
        }
    }

    /// Closes the target, and opens it as it will be used; one that is about to get another parent stays as it is.
    private func settleTarget(_ chain: inout Chain) throws(DiskError) {
        guard relinked != target else { return }
        let isTop = source == 0
        try disk.settle(&chain, at: target, as: isTop && disk.isWritable ? .readWrite : .readOnly)
    }

    private func relink(_ chain: inout Chain) throws(DiskError) {
        guard let relinked else { return }
        let isOpen = chain.layers[relinked].backend.isWritable
        if !isOpen { try disk.settle(&chain, at: relinked, as: .readWrite, keepingIdentity: true) }
        let layer = chain.layers[relinked]
        guard let backend = layer.backend as? any EditableBackend else {
            preconditionFailure("an image was looked at before it was merged")
        }
        var changes = ImageChanges()
        let path = layer.backend.files.first ?? layer.path
        changes.parent =
            newParent.map { .image(NewImage.describe(chain.layers[$0...], for: path)) }
            ?? ImageChanges.ParentChange.none
        var failure: DiskError?
        do throws(DiskError) { try backend.apply(changes) } catch { failure = error.about(layer.path) }
        // The top image goes on as what it is for the guest.
        if relinked > 0 || !disk.isWritable { try disk.settle(&chain, at: relinked, as: .readOnly) }
        if let failure { throw failure }
    }

    /// After a failure: the target is read again, if nobody but the merge writes to it.
    private func restore() throws(DiskError) {
        try disk.current.change(disk.locks) { (chain) throws(DiskError) in
            if target > 0 || !disk.isWritable, chain.layers[target].backend.isWritable {
                try disk.settle(&chain, at: target, as: .readOnly)
            }
            chain = Chain(
                topFirst: chain.layers, isWritable: disk.isWritable, writing: chain.writing,
                policy: disk.policy)
        }
    }
}

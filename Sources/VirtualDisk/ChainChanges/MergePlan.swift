internal import DiskFormats
internal import DiskImage
internal import DiskStorage

/// The steps of a merge, each of which leaves a chain that shows what it did.
struct MergePlan {
    private let top: String
    private let options: DiskOptions
    /// What is known of the images without having them open.
    private let layers: [Layer]
    private let source: Int
    private let target: Int

    /// The files that nobody needs afterwards; known after ``copy(_:)``.
    private(set) var obsolete = ImageFiles()

    init(_ top: String, _ layers: [Layer], from source: Int, to target: Int, _ options: DiskOptions) throws(DiskError) {
        self.top = top
        self.layers = layers
        self.source = source
        self.target = target
        self.options = options
        try checkFormats()
    }

    private var isDownwards: Bool { source < target }
    /// The images that go away.
    private var goers: Range<Int> { isDownwards ? source..<target : target + 1..<source + 1 }
    /// The image that gets another parent; nil: there is none.
    private var relinked: Int? { isDownwards ? (source > 0 ? source - 1 : nil) : target }
    /// The image that it lies over afterwards; nil: it becomes a base.
    private var newParent: Int? { isDownwards ? target : (source + 1 < layers.count ? source + 1 : nil) }

    var sourcePath: String { path(source) }
    var targetPath: String { path(target) }

    private func path(_ index: Int) -> String { layers[index].backend.files.first ?? layers[index].path }
    private func size(_ index: Int) -> UInt64 { layers[index].backend.virtualSize }

    // MARK: - What can be known before anything is changed

    private func checkFormats() throws(DiskError) {
        if isDownwards { try checkOverlay() }
        if let relinked, !(layers[relinked].backend is any EditableBackend) {
            throw DiskError(
                .unsupported, "the format \(layers[relinked].backend.format) cannot name another parent",
                image: layers[relinked].path)
        }
        if isDownwards, size(source) > size(target) || relinked == nil && size(source) < size(target),
            !(layers[target].backend is any EditableBackend)
        {
            throw DiskError(
                .unsupported, "the format \(layers[target].backend.format) cannot give its disk another size",
                image: layers[target].path)
        }
        guard let relinked, let newParent, let backend = layers[relinked].backend as? any EditableBackend else {
            return
        }
        let parent = NewImage.describe(layers[newParent...], for: path(relinked))
        do throws(DiskError) { try backend.checkParent(parent) } catch { throw error.about(path(relinked)) }
    }

    /// An overlay knows an image that has no identity by the time of its last change: written to, it would not be that
    /// image any more, and a merge that was stopped would leave a chain that does not open.
    private func checkOverlay() throws(DiskError) {
        let above = layers[target - 1].backend
        let identity = layers[target].backend.identity
        guard above.format == OverlayDriver().name, identity == ImageIdentity() else { return }
        throw DiskError(
            .unsupported,
            "is an overlay over an image that nothing but its time of change tells from another: it cannot be merged "
                + "into that; 'vdimg convert' copies what it shows", image: layers[target - 1].path)
    }

    /// - Parameter known: A child that somebody else looks after.
    func refuseOtherChildren(but known: FileIdentity? = nil) throws(DiskError) {
        let endangered = Set(isDownwards ? source..<target + 1 : goers)
        try OtherChildren(of: endangered, in: layers, but: known, options).refuse("is to be merged")
    }

    /// An image that is removed takes its internal snapshots with it.
    func refuseSnapshots() throws(DiskError) {
        for index in goers {
            let count = layers[index].backend.snapshots.count
            guard count == 0 else {
                throw DiskError(
                    .losesData,
                    "has \(count) internal snapshots, which would be removed with it: delete them first "
                        + "('qemu-img snapshot -d'), or say --keep to leave the file or --force if they are not needed "
                        + "any more", image: path(index))
            }
        }
    }

    // MARK: - Room

    /// Downwards: makes the target's disk as large as the source's.
    func grow() throws(DiskError) {
        guard isDownwards, size(source) > size(target) else { return }
        // Where the target ends, zeros are shown; larger, it would show what lies below it there.
        let showsMore = layers[(target + 1)...].contains { $0.backend.virtualSize > size(target) }
        let chain = try OpenedChain(top, options, writable: showsMore ? [source, target] : [target])
        try chain.use { () throws(DiskError) in
            let backend = try chain.editable(target, to: "make its disk larger")
            if showsMore, let upper = chain.chain(from: source, isWritable: true) {
                let below = chain.chain(from: target + 1)
                try LayerRun(chain.layers[source..<target]).forEachPart(of: size(target)..<size(source)) {
                    (piece, holding) throws(DiskError) in
                    guard holding == .nothing else { return true }
                    try upper.beginWriting()
                    try upper.maskZeros(piece, over: below)
                    return true
                }
                try upper.flush()
            }
            do throws(DiskError) { try backend.resize(to: size(source)) } catch { throw error.about(path(target)) }
        }
    }

    // MARK: - Content

    /// Copies what the target must hold; durable when it returns.
    mutating func copy(_ control: OperationControl) throws(DiskError) {
        let chain = try OpenedChain(top, options, writable: [target])
        try expectSame(chain.layers)
        obsolete = try ImageFiles(
            of: chain.layers[goers], but: Array(chain.layers[..<goers.lowerBound] + chain.layers[goers.upperBound...]))
        try chain.use { () throws(DiskError) in
            guard let upper = chain.chain(from: target, isWritable: true) else { return }
            let locks = RegionLocks(blockSize: upper.blockSize)
            let copy = LayerCopy(
                isDownwards ? .downwards : .upwards, of: chain.layers[goers], into: upper,
                below: chain.chain(from: goers.upperBound + (isDownwards ? 1 : 0)), locks: locks)
            try copy.run(control)
            if isDownwards, size(source) < upper.size { try cutOff(upper, locks) }
            try upper.fillHoles()
        }
    }

    /// What the target has beyond the end of the source's disk does not show, and may not when it lies alone.
    private func cutOff(_ target: Chain, _ locks: RegionLocks) throws(DiskError) {
        try target.beginWriting()
        var position = size(source)
        while position < target.size {
            let end = min(target.size, position + (locks.regionSize - position % locks.regionSize))
            try target.discardLocked(position, end - position)
            position = end
        }
        try target.flush()
        guard relinked == nil else { return }
        guard let backend = target.layers[0].backend as? any EditableBackend else {
            throw DiskError(
                .unsupported, "the format \(target.layers[0].backend.format) cannot make its disk smaller",
                image: targetPath)
        }
        do throws(DiskError) { try backend.resize(to: size(source)) } catch { throw error.about(targetPath) }
    }

    /// Between the look and the opening nobody may have changed the chain.
    private func expectSame(_ opened: [Layer]) throws(DiskError) {
        guard opened.map(\.backend.files.first) == layers.map(\.backend.files.first) else {
            throw DiskError(.brokenLink, "the chain was changed while it was being looked at: try again", image: top)
        }
    }

    // MARK: - Links

    /// Tells the image above of its new parent, durably.
    func relink() throws(DiskError) {
        guard let relinked else { return }
        let chain = try OpenedChain(top, options, writable: [relinked])
        try expectSame(chain.layers)
        try chain.use { () throws(DiskError) in
            let backend = try chain.editable(relinked, to: "name another parent")
            var changes = ImageChanges()
            changes.parent =
                newParent.map {
                    .image(NewImage.describe(chain.layers[$0...], for: path(relinked)))
                } ?? ImageChanges.ParentChange.none
            do throws(DiskError) { try backend.apply(changes) } catch { throw error.about(path(relinked)) }
        }
    }
}

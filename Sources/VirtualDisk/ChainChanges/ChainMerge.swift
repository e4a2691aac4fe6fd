internal import DiskImage
public import DiskStorage

/// Merges an image of a chain into another one of it: what the one and all images between the two hold is written into
/// the other, the image above is told of its new parent, and the images that are not needed any more are removed.
///
/// *Into a lower image* (backwards; "commit"): the target gets all that the images above it up to the source hold, and
/// shows what the source did. *Into a higher one* (forwards; "stream"): the target gets what it does not hold itself,
/// and shows what it did, over the image below the source.
///
/// The disk shows the same bytes before, meanwhile and afterwards, also if the program or the machine dies at any
/// moment. What was stopped is begun again with the same call, and goes on where it was. What children compare (VMDK's
/// CID, modification UUIDs, VHDX's DataWriteGuid) is left as it is in the target, so that no moment comes in which the
/// chain does not belong together.
public struct ChainMerge: Sendable {
    /// How an image of the chain is named.
    public enum Image: Sendable, Equatable {
        /// By its number: 0 is the top one, 1 its parent, and so on.
        case number(Int)
        /// By its file.
        case path(String)
    }

    /// The top image of the chain.
    public var top: String
    /// The image that is merged.
    public var source = Image.number(0)
    /// The image that it is merged into; nil: its parent.
    public var target: Image?
    /// How the images are opened; whether for writing is decided here.
    public var options = DiskOptions()
    /// Whether the files of images that are not needed any more are left.
    public var keepsFiles = false
    /// Whether it is done although something would be lost: other images that are made over images which change or go
    /// away, or internal snapshots of images that go away.
    public var ignoresOtherChildren = false

    /// Whether images with internal snapshots may be removed.
    var ignoresSnapshots: Bool { keepsFiles || ignoresOtherChildren }

    public init(top: String) { self.top = top }

    /// What was done.
    public struct Outcome: Sendable, Equatable {
        /// The image that was merged.
        public let source: String
        /// The image that has all now.
        public let target: String
        /// The files that are not needed any more, and are removed unless they were to be kept.
        public let obsoleteFiles: [String]

        public init(source: String, target: String, obsoleteFiles: [String]) {
            self.source = source
            self.target = target
            self.obsoleteFiles = obsoleteFiles
        }
    }

    /// Merges. On `DiskError.Kind.cancelled` and other errors the chain shows what it did, and can be merged again.
    ///
    /// `DiskError.Kind.refused` where an image was found that is not in the chain, and is made over an image that
    /// changes or goes away; `DiskError.Kind.losesData` where one that goes away has internal snapshots;
    /// `DiskError.Kind.unsupported` where a format cannot do its part.
    public func run(_ control: OperationControl = OperationControl()) throws(DiskError) -> Outcome {
        var options = options
        options.isWritable = false
        options.overlay = nil
        options.cache = nil
        options.snapshot = nil
        let layers = try Self.look(at: top, options)
        guard let from = try index(of: source, in: layers) else { return try finish(layers, options, control) }
        var plan = try MergePlan(top, layers, from: from, to: targetIndex(in: layers, from: from), options)
        if !ignoresOtherChildren { try plan.refuseOtherChildren() }
        if !ignoresSnapshots { try plan.refuseSnapshots() }
        try plan.grow()
        try plan.copy(control)
        try plan.relink()
        if !keepsFiles { try plan.obsolete.remove() }
        return Outcome(source: plan.sourcePath, target: plan.targetPath, obsoleteFiles: plan.obsolete.paths)
    }

    /// The images of the chain, unlocked and without their extents: to find out what is to be done.
    static func look(at top: String, _ options: DiskOptions) throws(DiskError) -> [Layer] {
        var options = options
        options.locksImages = false
        return try ChainOpener(options: options).open(top, mode: .information, withParents: true)
    }

    /// The number of an image that is named; nil: a file that is none of the chain's.
    func index(of image: Image, in layers: [Layer]) throws(DiskError) -> Int? {
        switch image {
        case .number(let number):
            guard layers.indices.contains(number) else {
                throw DiskError(
                    .invalidArgument, "has no image number \(number): its images are 0 to \(layers.count - 1)",
                    image: top)
            }
            return number
        case .path(let path):
            let finder = FileFinder()
            guard let file = try finder.file(at: path) else {
                throw DiskError(.notFound, "there is no such file", image: path)
            }
            for (number, layer) in layers.enumerated() {
                if try finder.file(at: layer.backend.files.first ?? layer.path)?.identity == file.identity {
                    return number
                }
            }
            return nil
        }
    }

    func targetIndex(in layers: [Layer], from source: Int) throws(DiskError) -> Int {
        guard let target else {
            guard source + 1 < layers.count else {
                throw DiskError(
                    .invalidArgument, "is a base: there is no parent to merge it into", image: layers[source].path)
            }
            return source + 1
        }
        guard let number = try index(of: target, in: layers) else {
            throw DiskError(.invalidArgument, "is none of the images below \(top)", image: Self.name(target))
        }
        guard number != source else {
            throw DiskError(.invalidArgument, "cannot be merged into itself", image: layers[number].path)
        }
        return number
    }

    private static func name(_ image: Image) -> String {
        switch image {
        case .number(let number): "image \(number)"
        case .path(let path): path
        }
    }

    // MARK: - What was almost done

    /// The image that is to be merged is not in the chain: if it was merged into the target by a call that ended before
    /// it had removed the file, it lies over the target and shows what that does, byte by byte. Then it is removed.
    private func finish(
        _ layers: [Layer], _ options: DiskOptions, _ control: OperationControl
    ) throws(DiskError) -> Outcome {
        let path = Self.name(source)
        let refusal = DiskError(
            .invalidArgument,
            "is none of the images below \(top); if it was merged before, and its file was left, that can be removed",
            image: path)
        guard let target, let number = try index(of: target, in: layers) else { throw refusal }
        let targetPath = layers[number].backend.files.first ?? layers[number].path
        var own = options
        own.format = nil
        guard let above = try? Self.look(at: path, own),
            let place = try ChainMerge(top: path).index(of: .path(targetPath), in: above), place > 0
        else { throw refusal }
        let others = try OtherChildren(of: Set(0..<place), in: above + layers[..<number], own)
        if !ignoresOtherChildren { try others.refuse("was merged, and its file left") }
        let chain = try OpenedChain(path, own, writable: [])
        var obsolete = try ImageFiles(of: above[..<place], but: above[place...] + layers)
        if keepsFiles { obsolete = ImageFiles() }
        let paths = obsolete.paths
        try chain.use { () throws(DiskError) in
            guard let whole = chain.chain(from: 0), let below = chain.chain(from: place),
                try whole.shows(the: below, where: LayerRun(chain.layers[..<place]), control)
            else { throw refusal }
        } beforeUnlocking: { () throws(DiskError) in
            try obsolete.remove()
        }
        return Outcome(source: above[0].path, target: targetPath, obsoleteFiles: paths)
    }
}

internal import DiskFormats
internal import DiskImage
public import DiskStorage

/// Gives an image another parent, or none.
///
/// The disk shows the same bytes as before: where the new parent shows others than the old one, the image gets those
/// that the old one shows. Only after that, and durably, the new parent is recorded; so the disk shows the same, and
/// belongs to its old parent, whenever it is stopped before, and what was copied need not be copied again.
///
/// With ``isUnsafe`` nothing but the name of the parent is changed: for a parent that was moved or renamed, or is a
/// copy of the old one. Then the old one need not be there.
public struct ChainRebase: Sendable {
    /// The image.
    public var path: String
    /// The new parent; nil: none, the image becomes a base.
    public var parent: String?
    /// The new parent's format; nil: detected.
    public var parentFormat: String?
    /// Whether only the link is changed, whatever the two parents show.
    public var isUnsafe = false
    /// How the images are opened; whether for writing is decided here.
    public var options = DiskOptions()

    public init(_ path: String, parent: String?) {
        self.path = path
        self.parent = parent
    }

    /// Does it. On `DiskError.Kind.cancelled` and other errors the image has its old parent, and shows what it did.
    public func run(_ control: OperationControl = OperationControl()) throws(DiskError) {
        var options = options
        options.isWritable = false
        options.overlay = nil
        options.cache = nil
        options.snapshot = nil
        try refuseCircle(options)
        let upper = try OpenedChain(path, options, writable: [0], withParents: !isUnsafe)
        try upper.use { () throws(DiskError) in
            try checkParent(upper, options)
            if !isUnsafe { try copyDifferences(upper, options, control) }
        }
        try relink(options)
    }

    /// Refuses, before anything is changed, a parent that the image cannot have.
    private func checkParent(_ upper: OpenedChain, _ options: DiskOptions) throws(DiskError) {
        let backend = try upper.editable(0, to: "name another parent")
        guard let parent else { return }
        var options = options
        options.format = parentFormat
        options.locksImages = false
        let lower = try ChainOpener(options: options).open(parent, mode: .information, withParents: true)
        let description = NewImage.describe(lower[...], for: backend.files.first ?? path)
        do throws(DiskError) { try backend.checkParent(description) } catch { throw error.about(path) }
    }

    /// The new parent with all below it.
    private func openParent(_ options: DiskOptions) throws(DiskError) -> OpenedChain? {
        guard let parent else { return nil }
        var options = options
        options.format = parentFormat
        return try OpenedChain(parent, options, writable: [])
    }

    // MARK: - Content

    private func copyDifferences(
        _ upper: OpenedChain, _ options: DiskOptions, _ control: OperationControl
    ) throws(DiskError) {
        let lower = try openParent(options)
        let shared = try Self.sharedImages(upper.layers[1...], lower?.layers[...] ?? [])
        guard let target = upper.chain(from: 0, isWritable: true) else { return }
        let copy = DifferenceCopy(
            target: target, old: upper.chain(from: 1), new: lower?.chain(from: 0),
            oldRun: LayerRun(upper.layers[1..<(upper.layers.count - shared)]),
            newRun: LayerRun(lower.map { $0.layers[..<($0.layers.count - shared)] } ?? []))
        do throws(DiskError) {
            try copy.run(control)
        } catch {
            try? lower?.use { () throws(DiskError) in }  // the first failure is the one to be told
            throw error
        }
        try lower?.use { () throws(DiskError) in }
    }

    /// How many images, from the base up, both chains have.
    private static func sharedImages(
        _ a: ArraySlice<Layer>, _ b: ArraySlice<Layer>
    ) throws(DiskError) -> Int {
        let finder = FileFinder()
        var count = 0
        for (first, second) in zip(a.reversed(), b.reversed()) {
            guard first.backend.format == second.backend.format,
                let one = try finder.file(at: first.backend.files.first ?? first.path)?.identity,
                try finder.file(at: second.backend.files.first ?? second.path)?.identity == one
            else { break }
            count += 1
        }
        return count
    }

    private func refuseCircle(_ options: DiskOptions) throws(DiskError) {
        guard let parent else { return }
        let finder = FileFinder()
        guard let own = try finder.file(at: path)?.identity else {
            throw DiskError(.notFound, "there is no such file", image: path)
        }
        var options = options
        options.format = parentFormat
        options.locksImages = false
        for layer in try ChainOpener(options: options).open(parent, mode: .information, withParents: true) {
            guard try finder.file(at: layer.backend.files.first ?? layer.path)?.identity == own else { continue }
            throw DiskError(
                .invalidArgument, "cannot be the parent of \(path): it is that image, or lies over it", image: parent)
        }
    }

    // MARK: - The link

    private func relink(_ options: DiskOptions) throws(DiskError) {
        let lower = try openParent(options)
        let upper = try OpenedChain(path, options, writable: [0], withParents: false)
        var failure: DiskError?
        do throws(DiskError) {
            try upper.use { () throws(DiskError) in
                let backend = try upper.editable(0, to: "name another parent")
                let own = upper.layers[0].backend.files.first ?? path
                var changes = ImageChanges()
                changes.parent =
                    lower.map { .image(NewImage.describe($0.layers[...], for: own)) } ?? ImageChanges.ParentChange.none
                do throws(DiskError) { try backend.apply(changes) } catch { throw error.about(path) }
            }
        } catch {
            failure = error
        }
        try lower?.use { () throws(DiskError) in if let failure { throw failure } }
        if let failure { throw failure }
    }
}

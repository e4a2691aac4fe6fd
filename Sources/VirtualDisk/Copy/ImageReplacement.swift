internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import Glibc
internal import SystemPackage

/// Makes an image anew, in another format or variant or without the space that it does not need, and puts the new one
/// in its place: in one step, when it is complete and durable.
///
/// Until then the old one is untouched. The new one is made in a folder beside it, `.NAME.new`; what a run that was
/// killed left there is removed by the next. Its parents stay its parents; its UUIDs, its comment and its geometry are
/// kept as far as the new format stores them, so that children of an image that keeps its format fit as before.
public struct ImageReplacement: Sendable {
    /// The image.
    public var path: String
    /// How it is opened.
    public var options: DiskOptions
    /// The new format; nil: as it is, with all that makes the image what it is (block size, variant, options).
    public var format: String?
    /// The format's name for the kind of image; nil: its usual one. One that consists of several files cannot be put in
    /// place in one step, and is refused.
    public var variant: String?
    /// The unit of allocation in bytes; nil: the usual one.
    public var blockSize: UInt64?
    /// What the format alone understands.
    public var formatOptions: [String: String] = [:]
    /// Whether blocks are compressed.
    public var compresses = false
    /// Whether files may share blocks on their medium.
    public var sharesBlocks = true
    /// Whether the new image is read back and compared before it takes the place of the old.
    public var verifies = false

    public init(_ path: String, options: DiskOptions = DiskOptions()) {
        self.path = path
        self.options = options
    }

    /// Does it. If it fails, is cancelled or killed, the old image is there.
    public func run(_ control: OperationControl = OperationControl()) throws(DiskError) {
        var options = options
        options.isWritable = false
        (options.overlay, options.cache, options.snapshot) = (nil, nil, nil)
        let disk = try Disk.open(path, options: options)
        do throws(DiskError) {
            let layers = disk.current.chain.layers
            let old = layers[0]
            // Where it really is: what is replaced is the file, not a link to it.
            let place = old.backend.files.first ?? path
            try expectReplaceable(old.backend, at: place)
            let work = try WorkFolder(for: place)
            defer { work.remove() }
            let others = try ImageFiles(of: [old], but: layers.dropFirst())
            let new = try target(for: layers, at: work.file, finally: place)
            try fill(new, from: disk, work, control)
            try control.checkCancelled()
            try work.putInPlace()
            // What is still the old image's: its further files.
            try others.remove()
        } catch {
            try? disk.close()  // it was read alone
            throw error
        }
        try disk.close()
    }

    /// Throws where the new image cannot take the old one's place, or would not have what that holds beside its disk.
    private func expectReplaceable(_ old: any ImageBackend, at place: String) throws(DiskError) {
        guard let file = try FileFinder().file(at: place), file.isRegular else {
            throw DiskError(
                .unsupported, "is no regular file, which another could take the place of: convert it to another name",
                image: place)
        }
        let count = old.snapshots.count
        guard count == 0 else {
            throw DiskError(
                .losesData,
                "it has \(count) internal snapshots, which a new image would not have: delete them first "
                    + "('qemu-img snapshot -d'), or convert it to another name", image: place)
        }
    }

    private func target(for layers: [Layer], at path: String, finally place: String) throws(DiskError) -> NewImage {
        let old = layers[0].backend
        var new = NewImage(path: path)
        new.recordedPath = place
        new.format = format ?? old.format
        new.size = new.format == "raw" ? old.virtualSize : NewImage.wholeSectors(old.virtualSize)
        new.allowedFolders = options.allowedFolders
        new.parentOptions = options.formatOptions
        (new.variant, new.blockSize, new.options) = (variant, blockSize, formatOptions)
        if format == nil, variant == nil {
            let settings = try old.creationSettings()
            new.variant = settings.variant
            new.options.merge(settings.options) { given, _ in given }
            new.blockSize = blockSize ?? (old.blockSize > 0 ? old.blockSize : nil)
        }
        if layers.count > 1 {
            new.parent = layers[1].backend.files.first ?? layers[1].path
            new.parentFormat = layers[1].backend.format
        }
        return new
    }

    private func fill(
        _ new: NewImage, from disk: Disk, _ work: WorkFolder, _ control: OperationControl
    ) throws(DiskError) {
        let layers = disk.current.chain.layers
        let driver = try Formats.all.driver(named: new.format ?? "")
        let compressing = driver as? any CompressingDriver
        if compresses || compressing?.isCompressed(variant: new.variant) == true {
            var conversion = ImageConversion(from: path, to: new)
            conversion.compresses = compresses
            _ = try conversion.run(disk, control)
            try work.expectOneFile()
            try verify(disk, try open(new, over: layers, isWritable: false).chain, control)
            return
        }
        _ = try new.createFiles()
        try work.expectOneFile()
        let target = try open(new, over: layers, isWritable: true)
        let task = DiskCopier.Task(
            source: disk, depth: layers.count > 1 ? 1 : disk.current.chain.depth, target: target.chain,
            isTargetEmpty: layers.count == 1, clones: sharesBlocks, length: disk.size)
        try DiskCopier(task, control).run()
        try keepIdentity(of: layers[0].backend, in: target.chain.layers[0].backend)
        control.begin("flushing", total: 0)
        try target.chain.flush()
        try verify(disk, target.chain, control)
        try target.chain.layers[0].backend.close()
        try target.files.settle()
    }

    /// The new image over the old one's parents, which are open already.
    private func open(
        _ new: NewImage, over layers: [Layer], isWritable: Bool
    ) throws(DiskError) -> (chain: Chain, files: UnsyncedFiles) {
        let files = UnsyncedFiles()
        var options = DiskOptions(isWritable: isWritable, format: new.format)
        options.formatOptions = self.options.formatOptions
        options.locksImages = false
        options.wrapStorage = files.wrap
        var opener = ChainOpener(options: options)
        opener.keepsIdentity = true
        let mode: OpenMode = isWritable ? .readWrite : .readOnly
        let top = try opener.open(new.path, mode: mode, withParents: false)[0]
        if isWritable { try top.backend.prepareForUse() }
        let chain = Chain(topFirst: [top] + layers.dropFirst(), isWritable: isWritable)
        return (chain, files)
    }

    /// What children compare, and what people have noted, goes over.
    private func keepIdentity(of old: any ImageBackend, in new: any ImageBackend) throws(DiskError) {
        guard let new = new as? any EditableBackend else { return }
        var changes = ImageChanges()
        let metadata = (old as? any EditableBackend)?.metadata ?? ImageMetadata()
        let fields = new.settableFields
        if fields.contains(.comment) { changes.metadata.comment = metadata.comment }
        if fields.contains(.uuid) { changes.metadata.uuid = old.identity.uuid }
        if fields.contains(.modificationUUID) { changes.metadata.modificationUUID = old.identity.modificationUUID }
        if fields.contains(.physicalGeometry) { changes.metadata.physicalGeometry = metadata.physicalGeometry }
        if fields.contains(.logicalGeometry) { changes.metadata.logicalGeometry = metadata.logicalGeometry }
        if old.format == new.format { changes.contentID = old.identity.contentID }
        if !changes.isEmpty { try new.apply(changes) }
    }

    private func verify(_ disk: Disk, _ chain: Chain, _ control: OperationControl) throws(DiskError) {
        guard verifies else { return }
        let copy = Disk(chain: chain, cache: disk.cache, isWritable: false, lazyFlushInterval: 0)
        let comparison = try DiskComparison.run(disk, copy, control: control)
        if let difference = comparison.firstDifference {
            throw DiskError(
                .invalidImage, "what was written reads differently: the disk's byte \(difference) is not the same",
                image: path)
        }
    }
}

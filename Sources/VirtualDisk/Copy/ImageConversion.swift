internal import DiskFormats
internal import DiskImage
public import DiskStorage

/// Makes a new image of what a disk shows, or of what its top image alone holds, in any format, variant and size.
///
///     var conversion = ImageConversion(from: "old.vmdk", to: NewImage(path: "new.vhdx"))
///     conversion.verifies = true
///     try conversion.run(OperationControl { print($0.fraction) })
///
/// On a file system with reflinks (XFS, btrfs) blocks of data are shared by both images instead of copied, wherever
/// they lie at borders of the file system's blocks in both.
public struct ImageConversion: Sendable {
    /// The image to copy: the top one of its chain.
    public var source: String
    /// How it is opened.
    public var sourceOptions: DiskOptions
    /// What is made. Without a size it has the source's; a smaller one is refused unless only zeros are cut off. With a
    /// parent, only what the source's top image holds is copied, and what it does not hold is the parent's: that must
    /// show what the source's own parent shows.
    public var target: NewImage
    /// Whether the target's blocks are compressed (QCOW2; streamOptimized VMDKs always are).
    public var compresses = false
    /// Whether ``target`` is there already (a device, an image of the right size) and is overwritten.
    public var overwritesTarget = false
    /// Whether files may share blocks on their medium.
    public var sharesBlocks = true
    /// Whether the target is read back and compared.
    public var verifies = false
    /// Whether it ends only when everything is on stable storage. Without, that is left to the system, as cp(1) does:
    /// after a power cut within the next minute the new image may be incomplete.
    public var syncs = true

    public init(from source: String, options: DiskOptions = DiskOptions(), to target: NewImage) {
        self.source = source
        sourceOptions = options
        self.target = target
    }

    /// The same for an image that comes through a pipe: ``source`` is only its name. It is read to its end into a file
    /// without a name in `folder` first, since hardly any format can be read from front to back.
    public func run(
        reading descriptor: Int32, spoolFolder folder: String, _ control: OperationControl = OperationControl()
    ) throws(DiskError) {
        let spool = try InputSpool.read(descriptor, name: source, folder: folder, control)
        var options = sourceOptions
        options.isWritable = false
        let disk = try Disk.open(storage: spool, options: options)
        _ = try run(disk, control)
        try disk.close()
    }

    /// Does it. When it returns everything is on stable storage (but see ``syncs``). If it fails or is cancelled, the
    /// new files are removed; an overwritten target has lost what it had.
    public func run(_ control: OperationControl = OperationControl()) throws(DiskError) {
        var options = sourceOptions
        options.isWritable = false
        let disk = try Disk.open(source, options: options)
        do throws(DiskError) {
            _ = try run(disk, control)
        } catch {
            try? disk.close()  // it was read alone
            throw error
        }
        try disk.close()
    }

    /// The same for a disk that is open; answers what can remove the new files.
    func run(_ disk: Disk, _ control: OperationControl) throws(DiskError) -> FileFinder {
        var target = target
        guard !overwritesTarget else {
            if target.format == nil { target.format = try formatThere(target.path) }
            target.size = try target.checkedSize(for: disk, named: source)
            try fill(target, from: disk, isEmpty: false, control)
            try verify(disk, target, control)
            return FileFinder()
        }
        let driver = try target.driver(parentFormat: disk.current.chain.layers[0].backend.format)
        target.format = driver.name
        target.size = try target.checkedSize(for: disk, named: source)
        let compressing = driver as? any CompressingDriver
        if compresses || compressing?.isCompressed(variant: target.variant) == true {
            guard let compressing else {
                throw DiskError(.unsupported, "\(driver.name) has no compressed blocks", image: target.path)
            }
            return try runCompressed(disk, target, compressing, control)
        }
        return try runPlain(disk, target, control)
    }

    /// The format in which a target that is there is written, where the caller does not say: a device is the disk
    /// itself whatever was on it before; a file is what it is recognised as.
    private func formatThere(_ path: String) throws(DiskError) -> String? {
        guard let file = try FileFinder().file(at: path), file.isRegular else { return "raw" }
        guard try ImageInformation.read(path).first?.format == "raw" else { return nil }
        guard try target.driver(parentFormat: nil).name == "raw" else {
            throw DiskError(
                .unknownFormat, "no known format recognises it; to overwrite it as a raw disk, say --to raw",
                image: path)
        }
        return "raw"
    }

    private func runCompressed(
        _ disk: Disk, _ target: NewImage, _ driver: any CompressingDriver, _ control: OperationControl
    ) throws(DiskError) -> FileFinder {
        guard target.parent == nil else {
            throw DiskError(.unsupported, "an image of compressed blocks cannot be made over a parent")
        }
        let files = UnsyncedFiles(writesBack: syncs)
        return try target.create(wrap: files.wrap) { (_, request, finder) throws(DiskError) in
            let writer = try driver.makeCompressedImage(request, companions: finder)
            try StreamCopier(disk, writer, control).run()
            control.begin("flushing", total: 0)
            if syncs { try files.settle() }
            try verify(disk, target, control)
            return finder
        }
    }

    private func runPlain(
        _ disk: Disk, _ target: NewImage, _ control: OperationControl
    ) throws(DiskError) -> FileFinder {
        let created = try target.createFiles(wrap: syncs ? nil : UnsyncedFiles(writesBack: false).wrap)
        do throws(DiskError) {
            try fill(target, from: disk, isEmpty: target.parent == nil, control)
            try verify(disk, target, control)
            return created
        } catch {
            created.removeCreated()
            throw error.about(target.path)
        }
    }

    private func fill(
        _ target: NewImage, from disk: Disk, isEmpty: Bool, _ control: OperationControl
    ) throws(DiskError) {
        let files = UnsyncedFiles(writesBack: syncs)
        var options = DiskOptions(isWritable: true, format: target.format, allowedFolders: target.allowedFolders)
        options.formatOptions = target.parentOptions
        options.storageProvider = sourceOptions.storageProvider
        options.lazyFlushInterval = 0
        if !overwritesTarget || !syncs { options.wrapStorage = files.wrap }
        let new = try Disk.open(target.path, options: options)
        do throws(DiskError) {
            guard new.size >= disk.size || target.size != nil && new.size >= target.size ?? 0 else {
                throw DiskError(
                    .invalidArgument, "the disk there has \(new.size) bytes, too few for \(disk.size)",
                    image: target.path)
            }
            let task = DiskCopier.Task(
                source: disk, depth: target.parent == nil ? disk.current.chain.depth : 1, target: new.current.chain,
                isTargetEmpty: isEmpty,
                clones: sharesBlocks, length: min(disk.size, new.size))
            try DiskCopier(task, control).run()
        } catch {
            try? new.close()  // the failure that is told is the first
            throw error
        }
        control.begin("flushing", total: 0)
        try new.close()
        if syncs { try files.settle() }
    }

    /// Reads the new image back, with its parents, and compares what it shows.
    private func verify(_ disk: Disk, _ target: NewImage, _ control: OperationControl) throws(DiskError) {
        guard verifies else { return }
        var options = DiskOptions(format: target.format, allowedFolders: target.allowedFolders)
        options.formatOptions = target.parentOptions
        let copy = try Disk.open(target.path, options: options)
        let comparison = try DiskComparison.run(disk, copy, control: control)
        try copy.close()
        if let difference = comparison.firstDifference {
            throw DiskError(
                .invalidImage, "what was written reads differently: the disk's byte \(difference) is not the same",
                image: target.path)
        }
    }
}

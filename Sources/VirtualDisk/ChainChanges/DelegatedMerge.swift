internal import DiskImage
public import DiskStorage

/// A merge that another process does, which has the disk open and can open no files
/// (``Disk/merge(_:into:keepsFiles:control:whenDetached:)``): what is decided here beforehand, the files that it needs,
/// and those that are removed afterwards.
public struct DelegatedMerge: Sendable {
    /// The numbers of the image that is merged and of the one that it is merged into.
    public let source: Int
    public let target: Int
    /// The images of the chain as they are found here, the top one first.
    public let images: [(path: String, identity: FileIdentity)]

    private let layers: [Layer]
    private let obsolete: ImageFiles

    /// Looks at the chain, which must be the one that the other process has open; nil: the image that is to be merged
    /// is none of it. Refuses what ``ChainMerge/run(_:)`` does.
    ///
    /// - Parameters:
    ///   - merge: What is merged.
    ///   - overlay: The file of the overlay that the other process has over the chain: what may happen below it, that
    ///     process decides.
    public init?(_ merge: ChainMerge, below overlay: FileIdentity? = nil) throws(DiskError) {
        var options = merge.options
        options.isWritable = false
        layers = try ChainMerge.look(at: merge.top, options)
        guard let source = try merge.index(of: merge.source, in: layers) else { return nil }
        self.source = source
        target = try merge.targetIndex(in: layers, from: source)
        let plan = try MergePlan(merge.top, layers, from: source, to: target, options)
        if !merge.ignoresOtherChildren { try plan.refuseOtherChildren(but: overlay) }
        if !merge.ignoresSnapshots { try plan.refuseSnapshots() }
        let goers = source < target ? source..<target : target + 1..<source + 1
        obsolete = try ImageFiles(
            of: layers[goers], but: Array(layers[..<goers.lowerBound] + layers[goers.upperBound...]))
        images = try Self.identify(layers)
    }

    /// The first file of each image.
    static func identify(_ layers: [Layer]) throws(DiskError) -> [(path: String, identity: FileIdentity)] {
        let finder = FileFinder()
        var images: [(path: String, identity: FileIdentity)] = []
        for layer in layers {
            let path = layer.backend.files.first ?? layer.path
            guard let file = try finder.file(at: path) else {
                throw DiskError(.unsupported, "is no file: close the disk first", image: path)
            }
            images.append((path, file.identity))
        }
        return images
    }

    public var sourcePath: String { images[source].path }
    public var targetPath: String { images[target].path }
    /// The files that nobody needs afterwards.
    public var obsoleteFiles: [String] { obsolete.paths }

    /// The images that change. The one that gets another parent: downwards the one above the source, upwards the target
    /// itself. The source, where it must say what the target did not hide until it became larger.
    private var changing: [Layer] {
        guard source < target else { return [layers[target]] }
        let grows = layers[source].backend.virtualSize > layers[target].backend.virtualSize
        return [layers[target]] + (source > 0 ? [layers[source - 1]] : []) + (grows ? [layers[source]] : [])
    }

    /// Opens the files of the images that change.
    public func openChangingFiles() throws(DiskError) -> [PassableFile] {
        var files: [PassableFile] = []
        for layer in changing { files += try PassableFile.all(of: layer) }
        return files
    }

    /// Opens the files that nobody needs afterwards.
    public func openObsoleteFiles(isWritable: Bool) throws(DiskError) -> [PassableFile] {
        try obsolete.open(isWritable: isWritable)
    }

    /// Replaces the content of one of the files that change, for the process that has it open:
    /// ``PassedFiles/replacer``.
    public func replace(
        _ file: FileIdentity, with bytes: [UInt8], isLocked: Bool
    ) throws(DiskError) -> PassableFile {
        for path in changing.flatMap(\.backend.files) {
            guard try FileFinder().file(at: path)?.identity == file else { continue }
            return try PassableFile(path, replacing: file, with: bytes, isLocked: isLocked)
        }
        throw DiskError(.refused, "a file is to be replaced that is none of those which change", image: targetPath)
    }

    /// Removes them.
    public func removeObsoleteFiles() throws(DiskError) { try obsolete.remove() }
}

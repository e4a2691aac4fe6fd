internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import SystemPackage

/// Copies all images of a chain, each for itself, to another format: the snapshots stay snapshots.
public struct ChainConversion: Sendable {
    /// The top image.
    public var source: String
    /// How the chain is opened.
    public var sourceOptions: DiskOptions
    /// The folder in which the new images go, which is there. Each is called as the old one is, with the new format's
    /// extension.
    public var folder: String
    /// The new images' format.
    public var format: String
    /// The format's name for the kind of the base; the others are of the usual kind.
    public var variant: String?
    /// The new images' unit of allocation in bytes; nil: the usual one.
    public var blockSize: UInt64?
    /// What the format alone understands.
    public var formatOptions: [String: String] = [:]
    /// Whether files may share blocks on their medium.
    public var sharesBlocks = true
    /// Whether each new image is read back and what its chain shows compared.
    public var verifies = false
    /// Whether it ends only when everything is on stable storage: ``ImageConversion/syncs``.
    public var syncs = true

    public init(from source: String, options: DiskOptions = DiskOptions(), to folder: String, format: String) {
        self.source = source
        sourceOptions = options
        self.folder = folder
        self.format = format
    }

    /// Does it, and answers the paths of the new images, the top one first. When it returns everything is on stable
    /// storage. If it fails or is cancelled, the new files are removed.
    public func run(_ control: OperationControl = OperationControl()) throws(DiskError) -> [String] {
        let driver = try Formats.all.driver(named: format)
        guard driver.capabilities.contains(.differencing) else {
            throw DiskError(.unsupported, "images of the format \(driver.name) have no parents")
        }
        var options = sourceOptions
        options.isWritable = false
        let disk = try Disk.open(source, options: options)
        let layers = disk.current.chain.layers
        let paths = try names(of: layers, driver)
        var made: [FileFinder] = []
        do throws(DiskError) {
            for index in layers.indices.reversed() {
                var target = NewImage(path: paths[index])
                target.format = driver.name
                target.blockSize = blockSize
                target.options = formatOptions
                target.variant = index == layers.count - 1 ? variant : nil
                target.parent = index == layers.count - 1 ? nil : paths[index + 1]
                target.parentFormat = driver.name
                // Each layer of the chain, seen from there down, is a disk of its own.
                let part = Disk(
                    chain: Chain(topFirst: Array(layers[index...])), cache: disk.cache,
                    isWritable: false, lazyFlushInterval: 0)
                var conversion = ImageConversion(from: layers[index].path, to: target)
                conversion.sharesBlocks = sharesBlocks
                conversion.verifies = verifies
                conversion.syncs = syncs
                made.append(try conversion.run(part, control))
            }
        } catch {
            for finder in made { finder.removeCreated() }
            try? disk.close()  // it was read alone
            throw error
        }
        try disk.close()
        return paths
    }

    /// Where each image goes; two of one name, from different folders, are told apart by a number.
    private func names(of layers: [Layer], _ driver: any ImageDriver) throws(DiskError) -> [String] {
        var taken: Set<String> = []
        return layers.map { layer in
            let stem = FilePath(layer.path).stem ?? "disk"
            let suffix = driver.fileExtensions.first ?? driver.name
            var name = "\(stem).\(suffix)"
            var number = 1
            while !taken.insert(name).inserted {
                number += 1
                name = "\(stem)-\(number).\(suffix)"
            }
            return FilePath(folder).appending(name).string
        }
    }
}

internal import DiskFormats
public import DiskImage
public import DiskStorage

/// What is known of one image without reading its disk.
public struct ImageInformation: Sendable {
    /// The path by which it was reached.
    public let path: String
    /// The format's name.
    public let format: String
    /// The size of its disk in bytes.
    public let virtualSize: UInt64
    /// The unit of allocation in bytes; 0 if everything is always allocated.
    public let blockSize: UInt64
    /// The bytes of a sector of the disk.
    public let sectorSize: UInt32
    /// All its files, the one that was named first.
    public let files: [String]
    /// The bytes that its files take on their medium.
    public let allocatedBytes: UInt64
    /// The sum of its files' lengths in bytes.
    public let fileLength: UInt64
    /// How it names its parent; nil for a base.
    public let parent: ParentLink?
    /// What children of it record.
    public let identity: ImageIdentity
    /// What it stores of itself and of its parent, in the same way for all formats.
    public let metadata: ImageMetadata
    /// What of that can be changed (``ImageEditor``).
    public let settableFields: ImageMetadata.Fields
    /// What the format tells beyond that.
    public let properties: [ImageProperty]
    /// The internal snapshots that it holds.
    public let snapshots: [InternalSnapshot]

    init(_ layer: Layer) throws(DiskError) {
        let backend = layer.backend
        path = layer.path
        format = backend.format
        virtualSize = backend.virtualSize
        blockSize = backend.blockSize
        sectorSize = backend.sectorSize
        files = backend.files
        var allocated: UInt64 = 0
        var length: UInt64 = 0
        for handle in backend.storages {
            allocated += try handle.storage.allocatedBytes()
            length += try handle.storage.length()
        }
        allocatedBytes = allocated
        fileLength = length
        parent = backend.parentLink
        identity = backend.identity
        let editable = backend as? any EditableBackend
        metadata = editable?.metadata ?? Self.metadata(of: backend)
        settableFields = editable?.settableFields ?? []
        properties = backend.properties
        snapshots = backend.snapshots
    }

    /// What is known of an image that cannot be changed.
    private static func metadata(of backend: any ImageBackend) -> ImageMetadata {
        var metadata = ImageMetadata()
        metadata.uuid = backend.identity.uuid
        metadata.modificationUUID = backend.identity.modificationUUID
        metadata.parentUUID = backend.parentLink?.uuid
        metadata.parentModificationUUID = backend.parentLink?.modificationUUID
        return metadata
    }

    /// Looks at the image at `path`, and with `wholeChain` at all its parents, the top one first. Takes no lock and
    /// needs no extents, so that it also answers for images that are in use or incomplete.
    public static func read(
        _ path: String, options: DiskOptions = DiskOptions(), wholeChain: Bool = false
    ) throws(DiskError) -> [ImageInformation] {
        var options = options
        options.isWritable = false
        options.locksImages = false
        var result: [ImageInformation] = []
        for layer in try ChainOpener(options: options).open(path, mode: .information, withParents: wholeChain) {
            result.append(try ImageInformation(layer))
        }
        return result
    }
}

extension Disk {
    /// The images of the disk, the top one first.
    public func images() throws(DiskError) -> [ImageInformation] {
        var result: [ImageInformation] = []
        try current.use { (chain) throws(DiskError) in
            for layer in chain.layers { result.append(try ImageInformation(layer)) }
        }
        return result
    }

    /// Bytes of mapping tables that are in memory, and of those that hold changes which no file has yet.
    public var tableCacheUse: (cached: Int, dirty: Int) { cache.use }

    /// Where each image really is, and its format; the top one first.
    public var layers: [(path: String, format: String)] {
        current.chain.layers.map { ($0.backend.files.first ?? $0.path, $0.backend.format) }
    }

    /// When the top image was last changed, in nanoseconds since 1970; 0 where its storage does not know.
    public var modificationTime: Int64 {
        var time: Int64?
        try? current.use { (chain) throws(DiskError) in time = try chain.layers[0].backend.modificationTime() }
        return time ?? 0
    }

    /// The bytes that all files of all images take on their medium.
    public func allocatedBytes() throws(DiskError) -> UInt64 {
        var sum: UInt64 = 0
        try current.use { (chain) throws(DiskError) in
            for layer in chain.layers {
                for handle in layer.backend.storages { sum += try handle.storage.allocatedBytes() }
            }
        }
        return sum
    }

    /// Calls `body` with the runs of a range, in order, each with where its bytes come from; `body` answers whether to
    /// go on.
    public func forEachExtent(
        offset: UInt64, length: UInt64, _ body: (DiskExtent) throws(DiskError) -> Bool
    ) throws(DiskError) {
        guard offset <= size, length <= size - offset else {
            throw DiskError(.invalidArgument, "\(length) bytes reach beyond the disk's end at \(size)", offset: offset)
        }
        try current.use { (chain) throws(DiskError) in
            try chain.forEachExtent(offset: offset, length: length, body)
        }
    }

    /// The first byte at or after `offset` that may hold data; nil if there is none.
    public func nextData(from offset: UInt64) throws(DiskError) -> UInt64? {
        var found: UInt64?
        try current.use { (chain) throws(DiskError) in found = try chain.seek(from: offset, wantsData: true) }
        return found
    }

    /// The first byte at or after `offset` that is known to be zero; the end of the disk counts as such.
    public func nextHole(from offset: UInt64) throws(DiskError) -> UInt64 {
        var found: UInt64?
        try current.use { (chain) throws(DiskError) in found = try chain.seek(from: offset, wantsData: false) }
        return found ?? size
    }
}

/// The formats of this library, for people and programs.
public enum ImageFormats {
    /// What is known of a format.
    public struct Description: Sendable {
        public let name: String
        public let title: String
        public let fileExtensions: [String]
        public let capabilities: [String]
        public let variants: [FormatVariant]
        /// The names of what ``NewImage/options`` may say.
        public let options: [String]
    }

    /// All formats.
    public static var all: [Description] {
        Formats.all.drivers.map {
            Description(
                name: $0.name, title: $0.title, fileExtensions: $0.fileExtensions, capabilities: $0.capabilities.names,
                variants: $0.variants, options: $0.optionNames)
        }
    }
}

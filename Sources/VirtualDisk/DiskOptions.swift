public import DiskStorage

/// How a disk is opened.
public struct DiskOptions: Sendable {
    /// Whether the top image is opened for writing.
    public var isWritable: Bool
    /// The top image's format; nil: detected.
    public var format: String?
    /// What one format alone understands, for all images of the chain, by name: `vhd-size` (`chs` or `current`).
    public var formatOptions: [String: String] = [:]
    /// The name or ID of the top image's internal snapshot that is shown, read-only, instead of its present state.
    public var snapshot: String?
    /// Folders from which parents and extents may come, besides those of the images that name them.
    public var allowedFolders: [String]
    /// The memory for cached mapping tables in bytes.
    public var tableCacheSize: Int
    /// Whether image files are locked against other processes.
    public var locksImages: Bool
    /// After how many seconds changes of mapping tables are written although nobody asked for it; 0: never.
    public var lazyFlushInterval: Int
    /// The most images in a chain.
    public var depthLimit: Int
    /// Where writes go instead of the named image, which is then opened read-only like those below it.
    public var overlay: DiskOverlay?
    /// A persistent cache of what the images hold: of those below the top one or the overlay, or of all where nothing
    /// is written.
    public var cache: CacheOptions?
    /// Opens images that are not files, by addresses such as `http://server/disk.vmdk`; nil: names are paths.
    public var storageProvider: (any StorageProvider)?
    /// Whether an image that is to be written is opened read-only if the system refuses to let it be written (a
    /// read-only file system, missing permission); ``Disk/isWritable`` then says so. Otherwise that is an error.
    public var allowsReadOnlyFallback = false
    /// Whether a block of zeros that is written is stored as one, by an image that would else hold nothing where zeros
    /// show anyway: so that they stay zeros whatever lies below later. Only formats that store no zeros otherwise (VDI)
    /// make a difference. VirtualBox's VD_OPEN_FLAGS_HONOR_ZEROES.
    public var honorsZeros = false
    /// Whether what is written where the top image holds nothing is stored although the images below show the same. If
    /// not, it takes no space, and costs a read. VirtualBox's VD_OPEN_FLAGS_HONOR_SAME.
    public var honorsSame = true
    /// Whether other processes may have the image open for writing as well: VirtualBox's VD_OPEN_FLAGS_SHAREABLE. They
    /// see each other's writes. Only for an image all of whose space is taken (fixed), since nobody may allocate then.
    public var isShareable = false
    /// Whether the disk will be read from its beginning to its end: a hint to the system to read ahead.
    public var isSequential = false
    /// Whether images are taken as they are although they were not closed cleanly; for reading only.
    public var skipsConsistencyChecks = false
    /// Files that another process opens for this one, when the chain of the open disk is changed.
    public var passedFiles: PassedFiles?
    /// Put round every storage that is opened: the tests' way to fail, cut, slow or record accesses.
    public var wrapStorage: (@Sendable (any Storage) -> any Storage)?

    public init(isWritable: Bool = false, format: String? = nil, allowedFolders: [String] = []) {
        self.isWritable = isWritable
        self.format = format
        self.allowedFolders = allowedFolders
        tableCacheSize = 8 << 20
        locksImages = true
        lazyFlushInterval = 5
        depthLimit = 256
    }
}

/// A scratch overlay: makes any disk writable without changing a byte of its images.
public enum DiskOverlay: Sendable, Equatable {
    /// A file without a name in that folder, gone when the disk is closed.
    case temporary(folder: String)
    /// A file that is kept. If it is there it must be an overlay of this very image; otherwise it is made.
    case file(String)
}

internal import DiskImage
internal import DiskPartitions
public import DiskStorage

/// Makes an image smaller where it lies: blocks of zeros, and blocks that are what the images below show anyway, are
/// given up, the space of their places is given back to the file system, blocks at the file's end move to the front,
/// and the file is cut off.
///
/// The disk shows the same bytes before, after, and at every moment between, also after a crash. What children record
/// of the image (VMDK's CID, modification UUIDs, VHDX's DataWriteGuid) stays, so that they still belong to it. When it
/// is stopped, or its process ends, the image is sound, and doing it again does the rest.
public struct ImageCompaction: Sendable {
    /// What is done.
    public struct Options: Sendable {
        /// Whether blocks are given up, too, that a file system in the image says are free: ext4, in a
        /// partition or on the whole disk. What the disk shows there changes to zeros, so that children of the image no
        /// longer belong to it, and the image gets a new identity as by any write.
        public var dropsFreeSpace = false
        /// Whether free space is dropped although there is an image beside this one that was made over it.
        public var ignoresOtherChildren = false

        public init() {}
    }

    /// What the image's files take.
    public struct Space: Sendable, Equatable {
        /// The sum of their lengths in bytes.
        public var fileLength: UInt64 = 0
        /// The bytes that they take on their medium.
        public var allocatedBytes: UInt64 = 0
    }

    /// What the files took before, and take now.
    public internal(set) var before = Space()
    public internal(set) var after = Space()
    /// Bytes of the disk in blocks of zeros that were given up.
    public internal(set) var zeroBytes: UInt64 = 0
    /// Bytes of the disk in blocks, not zeros, that the images below show as well, and that were given up.
    public internal(set) var sameBytes: UInt64 = 0
    /// Bytes of zeros that stay with the image, and whose space was given back: the files have holes there.
    public internal(set) var punchedBytes: UInt64 = 0
    /// Bytes that were moved to the front.
    public internal(set) var movedBytes: UInt64 = 0
    /// Bytes of the disk that a file system had as free, and that read as zeros now.
    public internal(set) var freeBytes: UInt64 = 0
    /// What a person should know: what could not be done, and why.
    public internal(set) var notes: [String] = []

    /// Compacts the image at `path`; nothing else may have it open. Its parents are opened to be read. ``DiskOptions``
    /// for writing; ``DiskOptions/overlay``, ``DiskOptions/snapshot`` and ``DiskOptions/cache`` must be nil.
    ///
    /// `DiskError.Kind.unsupported` for images that are written once (streamOptimized), with nothing changed.
    public static func run(
        _ path: String, options: DiskOptions = DiskOptions(), compaction: Options = Options(),
        control: OperationControl = OperationControl()
    ) throws(DiskError) -> ImageCompaction {
        guard options.overlay == nil, options.snapshot == nil, options.cache == nil else {
            throw DiskError(.invalidArgument, "an image is compacted alone, as it is", image: path)
        }
        var options = options
        options.isWritable = true
        options.lazyFlushInterval = 0
        var opener = ChainOpener(options: options)
        opener.keepsIdentity = !compaction.dropsFreeSpace
        let layers = try opener.open(path, mode: .readWrite, withParents: true)
        do throws(DiskError) {
            try refuseOtherImages(layers[0].backend)
            if compaction.dropsFreeSpace, !compaction.ignoresOtherChildren {
                try OtherChildren(of: [0], in: layers, options).refuse("would lose what its file system has as free")
            }
            try layers[0].backend.prepareForUse()
        } catch {
            throw error.about(layers[0].path)
        }
        let disk = Disk(
            chain: Chain(topFirst: layers, isWritable: true), cache: opener.cache,
            isWritable: true, lazyFlushInterval: 0)
        var compactor = ImageCompactor(disk, compaction, control)
        do throws(DiskError) {
            try compactor.run()
        } catch {
            // What was done so far is made whole; the first failure is the one to be told.
            compactor.stop()
            try? disk.close()
            throw error.about(path)
        }
        try disk.close()
        compactor.result.after = try disk.topSpace()
        return compactor.result
    }

    /// Images that cannot be written in place.
    private static func refuseOtherImages(_ backend: any ImageBackend) throws(DiskError) {
        let isWritten = backend.storages.isEmpty || backend.storages.contains { $0.isWritable }
        guard isWritten, !backend.isWrittenOnce else {
            throw DiskError(
                .unsupported,
                "the image is compressed and written once, and cannot be changed in place: convert it instead")
        }
    }
}

extension ImageBackend {
    /// Whether nothing but compressed blocks can be in the image.
    fileprivate var isWrittenOnce: Bool {
        format == "qcow" || properties.contains { $0.value == "streamOptimized" || $0.value == "seSparse" }
    }
}

extension Disk {
    /// What the files of the top image take.
    func topSpace() throws(DiskError) -> ImageCompaction.Space {
        var space = ImageCompaction.Space()
        for handle in current.chain.layers[0].backend.storages {
            space.fileLength += try handle.storage.length()
            space.allocatedBytes += try handle.storage.allocatedBytes()
        }
        return space
    }
}

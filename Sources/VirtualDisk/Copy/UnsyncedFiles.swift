internal import DiskStorage

/// The files of an image that is being made: nothing in between is flushed, everything at the end.
struct UnsyncedFiles: Sendable {
    private let files = Locked<[UnsyncedStorage]>([])
    private let writesBack: Bool

    /// `writesBack`: ``UnsyncedStorage/init(_:writesBack:)``.
    init(writesBack: Bool = true) { self.writesBack = writesBack }

    /// Takes in a file that is opened or created: ``DiskOptions/wrapStorage``.
    var wrap: @Sendable (any Storage) -> any Storage {
        { [files, writesBack] storage in
            guard storage.traits.isWritable else { return storage }
            let file = UnsyncedStorage(storage, writesBack: writesBack)
            files.withLock { $0.append(file) }
            return file
        }
    }

    /// Returns when everything that was written to them is on stable storage.
    func settle() throws(DiskError) {
        for file in files.withLock({ $0 }) { try file.settle() }
    }
}

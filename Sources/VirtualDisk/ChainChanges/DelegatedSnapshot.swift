internal import DiskImage
public import DiskStorage

/// A new image over the top one of a disk that another process has open, which puts it on top
/// (``Disk/push(_:format:)``) and can open no files.
public struct DelegatedSnapshot: Sendable {
    /// A file of the new image.
    public struct NewFile: Sendable {
        /// How the image calls it; nil: it is the image itself.
        public let name: String?
        public let file: PassableFile
    }

    /// The new image's real path, and its format.
    public let path: String
    public let format: String
    /// Its files, the first one first.
    public let files: [NewFile]
    /// Those of the image below it.
    public let parentFiles: [PassableFile]
    private let own: ImageFiles

    /// Makes the image; on failure nothing is left behind. Meanwhile the other process keeps requests waiting
    /// (``Disk/whileWaiting(toMakeSnapshot:)``).
    ///
    /// The new files get the owner and the mode of the image below, as far as this process may give them.
    public init(_ snapshot: ImageSnapshot, over format: String, size: UInt64) throws(DiskError) {
        var snapshot = snapshot
        snapshot.format = format
        snapshot.image.size = size
        var options = DiskOptions(format: format, allowedFolders: snapshot.image.allowedFolders)
        options.formatOptions = snapshot.image.parentOptions
        let parent = try ChainMerge.look(at: snapshot.path, options)[0]
        let created = try snapshot.create(over: format)
        var own = ImageFiles()
        do throws(DiskError) {
            var options = DiskOptions()
            let names = PassedFiles()
            options.passedFiles = names
            options.locksImages = false
            let layers = try ChainOpener(options: options).open(created, mode: .readOnly, withParents: false)
            own = try ImageFiles(of: layers, but: [])
            let backend = layers[0].backend
            path = backend.files.first ?? created
            self.format = backend.format
            let model = try FileStorage(path: parent.backend.files.first ?? parent.path, isWritable: false)
            let known = names.companions(of: path)
            var files: [NewFile] = []
            for file in try PassableFile.all(of: layers[0]) {
                try FileStorage(path: file.path, isWritable: false).copyAttributes(of: model)
                files.append(NewFile(name: known.first { $0.path == file.path }?.name, file: file))
            }
            self.files = files
            parentFiles = try PassableFile.all(of: parent)
            self.own = own
        } catch {
            try? own.remove()
            throw error.about(created)
        }
    }

    /// Removes the new image, which the other process has not taken.
    public func remove() throws(DiskError) { try own.remove() }
}

internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import SystemPackage

/// What a new image shall be.
public struct NewImage: Sendable {
    /// Where; nothing may be there yet.
    public var path: String
    /// The size of the disk in bytes; nil: the parent's.
    public var size: UInt64?
    /// The format; nil: what the file name's extension says, else the parent's, else VMDK.
    public var format: String?
    /// The format's name for the kind of image; nil: its usual one.
    public var variant: String?
    /// The image that the new one is made over.
    public var parent: String?
    /// The parent's format; nil: detected.
    public var parentFormat: String?
    /// The unit of allocation in bytes; nil: the usual one.
    public var blockSize: UInt64?
    public var comment: String?
    public var uuid: DiskUUID?
    /// What the format alone understands.
    public var options: [String: String] = [:]
    /// How the parent and those below it are opened: ``DiskOptions/formatOptions``.
    public var parentOptions: [String: String] = [:]
    /// Folders from which the parent's own parents may come.
    public var allowedFolders: [String] = []

    /// Where it will be in the end, if not at ``path``: what it records of its parent leads there from here.
    var recordedPath: String?

    public init(path: String) { self.path = path }

    /// Creates the image. On failure nothing is left behind.
    public func create() throws(DiskError) { _ = try createFiles() }

    /// The same; answers what knows the files that were made, and can remove them.
    func createFiles(wrap: (@Sendable (any Storage) -> any Storage)? = nil) throws(DiskError) -> FileFinder {
        try create(wrap: wrap) { (driver, request, finder) throws(DiskError) in
            try driver.create(request, companions: finder)
            return finder
        }
    }

    /// Has `body` create the image, in files that `wrap` has a say in. On failure nothing is left behind.
    func create<Result>(
        wrap: (@Sendable (any Storage) -> any Storage)? = nil,
        _ body: (any ImageDriver, CreateRequest, FileFinder) throws(DiskError) -> Result
    ) throws(DiskError) -> Result {
        let (driver, request) = try plan()
        let finder = FileFinder(allowedFolders: allowedFolders, wrap: wrap)
        do throws(DiskError) {
            return try body(driver, request, finder)
        } catch {
            finder.removeCreated()
            throw error.about(path)
        }
    }

    /// What makes it, and of what.
    func plan() throws(DiskError) -> (driver: any ImageDriver, request: CreateRequest) {
        var size = size
        var description: CreateRequest.ParentDescription?
        if let parent {
            let chain = try openParent(parent)
            description = Self.describe(chain[...], for: recordedPath ?? path)
            size = size ?? Self.wholeSectors(chain[0].backend.virtualSize)
        }
        guard let size else { throw DiskError(.invalidArgument, "a new image needs a size", image: path) }
        let request = CreateRequest(
            path: path, virtualSize: size, variant: variant, blockSize: blockSize, parent: description,
            comment: comment,
            uuid: uuid, options: options)
        return (try driver(parentFormat: description?.format), request)
    }

    /// The size of a disk that has all of another: most formats count in sectors, which raw files may end within.
    static func wholeSectors(_ size: UInt64) -> UInt64 { size.alignedUp(to: 512) ?? size }

    /// Opens the parent with all its parents: a child of a broken chain would be no use.
    private func openParent(_ parent: String) throws(DiskError) -> [Layer] {
        var options = DiskOptions(format: parentFormat, allowedFolders: allowedFolders)
        options.locksImages = false
        options.formatOptions = parentOptions
        return try ChainOpener(options: options).open(parent, mode: .readOnly, withParents: true)
    }

    /// What an image at `path` records of the first of these, which lies over the others.
    static func describe(_ chain: ArraySlice<Layer>, for path: String) -> CreateRequest.ParentDescription {
        guard let first = chain.first else { preconditionFailure("a parent is an image") }
        var description = describe(first, for: path)
        // Most formats do not say what their parents did.
        description.sectorSize = chain.map(\.backend.sectorSize).max() ?? 512
        return description
    }

    /// What a new image at `path` records of the one that it is made over.
    static func describe(_ parent: Layer, for path: String) -> CreateRequest.ParentDescription {
        let real = FilePath(parent.backend.files.first ?? parent.path)
        let folder = FilePath(FileFinder.realFolder(of: path))
        // Inside the child's folder by its relative path, so that the folder may move; else by its full one.
        var stored = real
        if stored.removePrefix(folder) == false { stored = real }
        return CreateRequest.ParentDescription(
            path: stored.string, relativePath: relative(real, to: folder), absolutePath: real.string,
            format: parent.backend.format, identity: parent.backend.identity,
            virtualSize: parent.backend.virtualSize, modified: try? parent.backend.modificationTime())
    }

    /// The way to a file from a folder; both are whole paths.
    private static func relative(_ file: FilePath, to folder: FilePath) -> String {
        let steps = Array(folder.components)
        let names = Array(file.components)
        let common = zip(steps, names.dropLast()).prefix { $0 == $1 }.count
        let up = Array(repeating: "..", count: steps.count - common)
        return (up + names.dropFirst(common).map(\.string)).joined(separator: "/")
    }

    func driver(parentFormat: String?) throws(DiskError) -> any ImageDriver {
        if let format { return try Formats.all.driver(named: format) }
        let suffix = FilePath(path).extension?.lowercased()
        if let driver = Formats.all.drivers.first(where: { suffix.map($0.fileExtensions.contains) ?? false }) {
            return driver
        }
        return try Formats.all.driver(named: parentFormat ?? "vmdk")
    }
}

internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import SystemPackage

/// Makes a new image over the top one of a chain, so that the disk as it is now stays: what is written from now on goes
/// to the new image, which is the one to be used.
public struct ImageSnapshot: Sendable {
    /// The image that shall stay as it is.
    public var path: String
    /// Its format; nil: detected.
    public var format: String?
    /// The new image: its file, format and kind. Without a path, ``suggestedPath(for:fileExtension:)`` is taken.
    public var image: NewImage

    public init(of path: String, image: NewImage? = nil) {
        self.path = path
        self.image = image ?? NewImage(path: "")
    }

    /// Makes it and answers its path. On failure nothing is left behind.
    ///
    /// Nobody may have the image open for writing meanwhile: `DiskError.Kind.locked`.
    public func create() throws(DiskError) -> String {
        var options = DiskOptions(format: format, allowedFolders: image.allowedFolders)
        options.formatOptions = image.parentOptions
        let chain = try OpenedChain(path, options, writable: [])
        var created = image.path
        try chain.use { () throws(DiskError) in
            created = try create(over: chain.layers[0].backend.format)
        }
        return created
    }

    /// The same over an image whose format is known, without a look at who uses it.
    func create(over parentFormat: String) throws(DiskError) -> String {
        var image = image
        image.parent = path
        image.parentFormat = image.parentFormat ?? format
        let own = image.path.isEmpty ? nil : FilePath(image.path).extension.flatMap { Self.format(ofExtension: $0) }
        let format = image.format ?? own ?? Self.childFormat(of: parentFormat)
        image.format = format
        if image.path.isEmpty {
            guard let file = try FileFinder().file(at: path), file.isRegular else {
                throw DiskError(
                    .invalidArgument,
                    "is no regular file, and no place for an image beside it: give the new image's "
                        + "name", image: path)
            }
            let suffix = format == parentFormat ? FilePath(path).extension : nil
            let usual = try Formats.all.driver(named: format).fileExtensions.first ?? format
            image.path = try Self.suggestedPath(for: path, fileExtension: suffix ?? usual)
        }
        try image.create()
        return image.path
    }

    private static func format(ofExtension suffix: String) -> String? {
        Formats.all.drivers.first { $0.fileExtensions.contains(suffix.lowercased()) }?.name
    }

    /// The format itself, if it has differencing images that it can write; else QCOW2, which can name any parent.
    private static func childFormat(of format: String) -> String {
        guard let driver = try? Formats.all.driver(named: format),
            driver.capabilities.isSuperset(of: [.differencing, .write])
        else { return "qcow2" }
        return format
    }

    /// Beside `path`, the first name that is free of `NAME-001.EXT`, `NAME-002.EXT`, …, where NAME is the image's name
    /// without such a number.
    public static func suggestedPath(for path: String, fileExtension: String) throws(DiskError) -> String {
        let file = FilePath(path)
        var stem = file.stem ?? "disk"
        if let dash = stem.lastIndex(of: "-"), stem.distance(from: dash, to: stem.endIndex) == 4,
            stem[dash...].dropFirst().allSatisfy({ $0.isASCII && $0.isNumber })
        {
            stem = String(stem[..<dash])
        }
        let finder = FileFinder()
        for number in 1...999_999 {
            let digits = String(number)
            let name =
                stem + "-" + String(repeating: "0", count: max(0, 3 - digits.count)) + digits + "." + fileExtension
            let candidate = file.removingLastComponent().appending(name).string
            if try finder.file(at: candidate) == nil { return candidate }
        }
        throw DiskError(.invalidArgument, "all names for a snapshot are taken: give one", image: path)
    }
}

import ArgumentParser
import CommandSupport
import DiskStorage
import VirtualDisk

/// `vdimg create`: a new base or differencing image.
struct CreateCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "create", abstract: "Create an image, or a differencing image over another.",
        discussion: """
            EXAMPLES
              vdimg create --size 20G disk.vmdk
              vdimg create --format vmdk --variant split-fixed --size 8G disk.vmdk
              vdimg create --parent base.vmdk child.vmdk
              vdimg create --variant full-device --option device=/dev/sdb disk.vmdk
              vdimg create --variant partitioned-device --option device=/dev/sdb --option partitions=1,5r disk.vmdk

            'vdimg formats' lists formats and variants.
            """)

    @Option(help: "The format; told by the file name's extension if not given.") var format: String?
    @Option(help: "The kind of image, as 'vdimg formats' lists them.") var variant: String?
    @Option(help: "The size of the disk: bytes, or K, M, G, T (powers of 1024).") var size: ByteCount?
    @Option(help: "Make a differencing image over this one.", completion: .file()) var parent: String?
    @Option(help: "The parent's format; detected if not given.") var parentFormat: String?
    @Option(help: "The unit of allocation: bytes, or K, M.") var blockSize: ByteCount?
    @Option(help: "A comment to store in the image.") var comment: String?
    @Option(help: "The image's UUID; random if not given.") var uuid: String?
    @Option(
        name: .customLong("option"),
        help: ArgumentHelp("What the format alone knows (repeatable).", valueName: "NAME=VALUE"))
    var formatOptions: [String] = []
    @Option(
        name: .customLong("allow-dir"),
        help: ArgumentHelp(
            "The parent's own parents and extents may also come from DIR (repeatable).", valueName: "DIR"),
        completion: .directory)
    var allowedFolders: [String] = []
    @OptionGroup var openOptions: FormatOptions
    @Flag(help: "Say nothing on success.") var quiet = false
    @Argument(help: "The new image.", completion: .file()) var path: String

    func validate() throws {
        try openOptions.validate()
        let needsSize = variant != "full-device" && variant != "partitioned-device"
        if size == nil, parent == nil, needsSize { throw ValidationError("give the disk's --size, or a --parent") }
        if parent == nil, parentFormat != nil { throw ValidationError("--parent-format is for --parent") }
        if path.hasSuffix("/") { throw ValidationError("'\(path)' is a folder: give the new image's name") }
        if let uuid, DiskUUID(uuid) == nil { throw ValidationError("'\(uuid)' is not a UUID") }
        _ = try keyValues(formatOptions)
    }

    func run() throws {
        let options = try keyValues(formatOptions)
        try reportingErrors { () throws(DiskError) in
            var image = NewImage(path: path)
            image.size = size?.bytes ?? (parent == nil ? 0 : nil)
            image.format = format
            image.variant = variant
            image.parent = parent
            image.parentFormat = parentFormat
            image.blockSize = blockSize?.bytes
            image.comment = comment
            image.uuid = uuid.flatMap { DiskUUID($0) }
            image.allowedFolders = allowedFolders
            image.parentOptions = openOptions.values
            image.options = options
            try image.create()
            guard !quiet else { return }
            for information in try ImageInformation.read(path, options: DiskOptions(format: format)) {
                print("\(path): \(information.format), \(humanSize(information.virtualSize))")
            }
            if parent != nil { noteUnlessFound() }
            if variant?.hasSuffix("-device") ?? false { noteUnlessAllowed() }
        }
    }

    /// A device lies in none of the folders from which an image's files come.
    private func noteUnlessAllowed() {
        do throws(DiskError) {
            var options = DiskOptions(format: format, allowedFolders: allowedFolders)
            options.locksImages = false
            try Disk.open(path, options: options).close()
        } catch {
            writeError("vdimg: note: made, but to open it needs more: \(error)")
        }
    }

    /// Says at once what a mount would say later: that the parent is not looked for where it lies.
    private func noteUnlessFound() {
        do throws(DiskError) {
            var options = DiskOptions(format: format)
            options.formatOptions = openOptions.values
            _ = try ImageInformation.read(path, options: options, wholeChain: true)
        } catch {
            writeError("vdimg: note: made, but to open it needs more: \(error)")
        }
    }
}

import ArgumentParser
import CommandSupport
import DiskStorage
import VirtualDisk

/// `vdimg convert`: copies a disk to another format, variant or size.
struct ConvertCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "convert", abstract: "Copy a disk to another format, variant or size.",
        discussion: """
            The new image holds what the whole chain of SOURCE shows. With --parent it holds what SOURCE alone holds, \
            over that parent, which must show what SOURCE's own parent shows. On file systems with reflinks (XFS, btrfs) \
            data is shared, not copied. Runs of zeros take no space.

            EXAMPLES
              vdimg convert disk.vmdk disk.vhdx
              vdimg convert --format vmdk --variant stream disk.qcow2 - | ssh host 'cat >disk.vmdk'
              vdimg convert --parent base.vhdx child.vmdk child.vhdx
              vdimg convert --overwrite disk.vmdk /dev/sdb
            """)

    @OptionGroup var source: ImageOptions
    @OptionGroup var progress: ProgressOptions
    @Option(
        name: [.customShort("O"), .customLong("to")],
        help: ArgumentHelp(
            "The new image's format; told by its name's extension if not given.", valueName: "FORMAT"))
    var targetFormat: String?
    @Option(help: "The kind of image, as 'vdimg formats' lists them.") var variant: String?
    @Option(help: "The size of the new disk, if not the old one's: bytes, or K, M, G, T.") var size: ByteCount?
    @Option(help: "The unit of allocation: bytes, or K, M.") var blockSize: ByteCount?
    @Option(help: "Copy SOURCE alone, over this parent.", completion: .file()) var parent: String?
    @Option(help: "The parent's format; detected if not given.") var parentFormat: String?
    @Option(
        name: .customLong("option"),
        help: ArgumentHelp("What the new image's format alone knows (repeatable).", valueName: "NAME=VALUE"))
    var options: [String] = []
    @Flag(name: .shortAndLong, help: "Compress the blocks of a QCOW2.") var compress = false
    @Flag(help: "Read the new image back and compare.") var verify = false
    @Flag(help: "TARGET is there: a device, or an image, whose content is replaced.") var overwrite = false
    @Flag(help: "Copy data even where files could share it.") var noReflink = false
    @Argument(help: "The image to copy; - is standard input.", completion: .file()) var from: String
    @Argument(help: "The new image; - is standard output.", completion: .file()) var to: String

    func run() throws {
        let conversion = try makeConversion()
        try progress.run { (control) throws(DiskError) in try conversion.run(control) }
    }

    private func makeConversion() throws -> ImageConversion {
        var target = NewImage(path: to)
        target.size = size?.bytes
        target.format = targetFormat
        target.variant = variant
        target.blockSize = blockSize?.bytes
        target.parent = parent
        target.parentFormat = parentFormat
        target.allowedFolders = source.allowedFolders
        target.parentOptions = source.formatOptions.values
        target.options = try keyValues(options)
        var conversion = ImageConversion(from: from, options: source.diskOptions(), to: target)
        conversion.compresses = compress
        conversion.verifies = verify
        conversion.overwritesTarget = overwrite
        conversion.sharesBlocks = !noReflink
        return conversion
    }
}

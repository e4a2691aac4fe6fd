import ArgumentParser
import CommandSupport
import DiskStorage
import Glibc
import VirtualDisk

/// `vdimg convert`: copies a disk to another format, variant or size.
struct ConvertCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "convert", abstract: "Copy a disk to another format, variant or size.",
        discussion: """
            The new image holds what the whole chain of SOURCE shows. With --parent it holds what SOURCE alone holds, \
            over that parent, which must show what SOURCE's own parent shows. On file systems with reflinks (XFS, \
            btrfs) data is shared, not copied. Runs of zeros take no space.

            EXAMPLES
              vdimg convert disk.vmdk disk.vhdx
              vdimg convert --format vmdk --variant stream disk.qcow2 - | ssh host 'cat >disk.vmdk'
              vdimg convert --parent base.vhdx child.vmdk child.vhdx
              vdimg convert --overwrite disk.vmdk /dev/sdb
              vdimg convert --in-place --to qcow2 --compress disk.img
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
    @Flag(help: "Copy every image of the chain, over each other, into the folder TARGET.") var keepChain = false
    @Flag(help: "Put the new image in SOURCE's place, in one step, when it is complete.") var inPlace = false
    @Flag(name: .shortAndLong, help: "Compress the blocks of a QCOW2.") var compress = false
    @Flag(help: "Read the new image back and compare.") var verify = false
    @Flag(help: "TARGET is there: a device, or an image, whose content is replaced.") var overwrite = false
    @Flag(help: "Copy data even where files could share it.") var noReflink = false
    @Flag(help: "Do not wait until the new image is on stable storage, as cp and qemu-img do not.") var noSync = false
    @Argument(help: "The image to copy; - is standard input.", completion: .file()) var from: String
    @Argument(help: "The new image; - is standard output.", completion: .file()) var to: String?

    func validate() throws {
        guard inPlace == (to == nil) else {
            throw ValidationError(inPlace ? "--in-place takes one image, and no TARGET" : "give the new image's name")
        }
        if parent == nil, parentFormat != nil { throw ValidationError("--parent-format is for --parent") }
        if overwrite, variant != nil || blockSize != nil || compress || !options.isEmpty {
            throw ValidationError("--overwrite fills the image that is there, which stays of the kind that it is")
        }
        if to?.hasSuffix("/") == true, !keepChain {
            throw ValidationError("'\(to ?? "")' is a folder: give the new image's name, as in '\(to ?? "")disk.qcow2'")
        }
        if noSync, inPlace {
            throw ValidationError("--in-place waits for stable storage before it removes the old image")
        }
        if inPlace, keepChain || parent != nil || size != nil || overwrite || from == "-" {
            throw ValidationError("--in-place keeps the image's size and its parent")
        }
        if keepChain, targetFormat == nil { throw ValidationError("--keep-chain needs the new --to format") }
        if keepChain, parent != nil || size != nil || compress || overwrite || from == "-" || to == "-" {
            throw ValidationError("--keep-chain copies images as they are, into a folder")
        }
        if to == "-" {
            if targetFormat == nil { throw ValidationError("standard output needs the new --to format") }
            if parent != nil || overwrite || verify {
                throw ValidationError("what goes to standard output has no parent and is not read back")
            }
            if compress {
                throw ValidationError("a QCOW2 cannot be written front to back; --variant stream of VMDK is")
            }
        }
    }

    func run() throws {
        let options = try keyValues(options)
        try progress.run { (control) throws(DiskError) in
            guard let to else { return try replace(options, control) }
            if keepChain { return try convertChain(to, options, control) }
            if to == "-" { return try writeToOutput(options, control) }
            let conversion = makeConversion(to, options)
            if from == "-" {
                try conversion.run(reading: STDIN_FILENO, spoolFolder: folder(of: to), control)
            } else {
                try conversion.run(control)
            }
        }
    }

    private func replace(_ options: [String: String], _ control: OperationControl) throws(DiskError) {
        var replacement = ImageReplacement(from, options: source.diskOptions())
        replacement.format = targetFormat
        replacement.variant = variant
        replacement.blockSize = blockSize?.bytes
        replacement.formatOptions = options
        replacement.compresses = compress
        replacement.sharesBlocks = !noReflink
        replacement.verifies = verify
        try replacement.run(control)
    }

    private func convertChain(
        _ to: String, _ options: [String: String], _ control: OperationControl
    ) throws(DiskError) {
        var conversion = ChainConversion(
            from: from, options: source.diskOptions(), to: to, format: targetFormat ?? "")
        conversion.variant = variant
        conversion.blockSize = blockSize?.bytes
        conversion.formatOptions = options
        conversion.sharesBlocks = !noReflink
        conversion.syncs = !noSync
        conversion.verifies = verify
        let paths = try conversion.run(control)
        if !progress.quiet { for path in paths { writeError("vdimg: made \(path)") } }
    }

    /// Front to back, for a pipe.
    private func writeToOutput(_ options: [String: String], _ control: OperationControl) throws(DiskError) {
        guard isatty(STDOUT_FILENO) == 0 else {
            throw DiskError(.invalidArgument, "an image is not written to a terminal: send it to a file or a program")
        }
        let image = makeImage(from == "-" ? "disk" : from, options)
        let options = source.diskOptions()
        let disk: Disk
        if from == "-" {
            disk = try Disk.open(
                storage: try InputSpool.read(STDIN_FILENO, name: "standard input", folder: temporaryFolder, control),
                options: options)
        } else {
            disk = try Disk.open(from, options: options)
        }
        try disk.writeStream(image, control: control) { (bytes) throws(DiskError) in
            try writeAll(bytes, to: STDOUT_FILENO)
        }
        try disk.close()
    }

    private func writeAll(_ bytes: IOBytes, to descriptor: Int32) throws(DiskError) {
        var done = 0
        while done < bytes.count {
            let result = unsafe write(descriptor, bytes.pointer + done, bytes.count - done)
            if result > 0 {
                done += result
            } else if errno != EINTR {
                throw .system(errno, "write to standard output")
            }
        }
    }

    private var temporaryFolder: String {
        unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? "/var/tmp"
    }

    private func folder(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }

    private func makeImage(_ to: String, _ options: [String: String]) -> NewImage {
        var target = NewImage(path: to)
        target.size = size?.bytes
        target.format = targetFormat
        target.variant = variant
        target.blockSize = blockSize?.bytes
        target.parent = parent
        target.parentFormat = parentFormat
        target.allowedFolders = source.allowedFolders
        target.parentOptions = source.formatOptions.values
        target.options = options
        return target
    }

    private func makeConversion(_ to: String, _ options: [String: String]) -> ImageConversion {
        let target = makeImage(to, options)
        var conversion = ImageConversion(
            from: from == "-" ? "standard input" : from, options: source.diskOptions(), to: target)
        conversion.compresses = compress
        conversion.verifies = verify
        conversion.overwritesTarget = overwrite
        conversion.sharesBlocks = !noReflink
        conversion.syncs = !noSync
        return conversion
    }
}

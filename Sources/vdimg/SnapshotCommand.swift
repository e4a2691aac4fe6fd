import ArgumentParser
import CommandSupport
import DiskStorage
import FuseHost
import VirtualDisk

/// `vdimg snapshot`: a new image over another.
struct SnapshotCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "snapshot", abstract: "Make a new image on top, so that the disk as it is now stays.",
        discussion: """
            From then on NEW is the disk's top image, and IMAGE must not be written to any more. Without NEW it is \
            IMAGE's name with -001, or the next number that is free.

            EXAMPLES
              vdimg snapshot disk.vmdk                         makes disk-001.vmdk
              vdimg snapshot --format qcow2 disk.raw before-update.qcow2

            If vdmount serves IMAGE's disk for writing, the new image becomes the top one of the mounted disk, which \
            goes on meanwhile. A read-only mount goes on showing IMAGE.

            'vdimg merge NEW' takes a snapshot back: what was written since goes into IMAGE.
            """)

    @OptionGroup var imageOptions: FormatOptions
    @Option(help: "IMAGE's format; detected if not given.") var parentFormat: String?
    @Option(help: "NEW's format; IMAGE's if not given, or what NEW's name says.") var format: String?
    @Option(help: "The kind of image, as 'vdimg formats' lists them.") var variant: String?
    @Option(help: "The unit of allocation: bytes, or K, M.") var blockSize: ByteCount?
    @Option(help: "A comment to store in the new image.") var comment: String?
    @Option(
        name: .customLong("allow-dir"),
        help: ArgumentHelp("Parents and extents may also come from DIR (repeatable).", valueName: "DIR"),
        completion: .directory)
    var allowedFolders: [String] = []
    @Flag(help: "Say nothing on success.") var quiet = false
    @Argument(help: "The image that stays as it is.", completion: .file()) var path: String
    @Argument(help: ArgumentHelp("The new image.", valueName: "NEW"), completion: .file()) var newPath: String?

    func run() throws {
        var image = NewImage(path: newPath ?? "")
        image.format = format
        image.variant = variant
        image.blockSize = blockSize?.bytes
        image.comment = comment
        image.allowedFolders = allowedFolders
        image.parentOptions = imageOptions.values
        var snapshot = ImageSnapshot(of: path, image: image)
        snapshot.format = parentFormat
        try reportingErrors { [snapshot] () throws(DiskError) in
            let all = try MountedChain.all(with: path)
            if let mounted = all.first(where: { $0.number(of: path) == 0 || $0.isOverlay(path) }),
                mounted.chain.isWritable
            {
                let created = try MountedSnapshot(mounted: mounted, snapshot: snapshot).run()
                if !quiet {
                    print("\(created): over \(path), on top of the disk at \(mounted.daemon.mountpoint)".printable())
                }
                return
            }
            let created = try snapshot.create()
            if !quiet { print("\(created): over \(path)".printable()) }
        }
    }
}

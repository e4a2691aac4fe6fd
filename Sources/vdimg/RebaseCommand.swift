import ArgumentParser
import DiskStorage
import VirtualDisk

/// `vdimg rebase`: another parent for an image.
struct RebaseCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "rebase", abstract: "Give an image another parent, or none.",
        discussion: """
            The disk shows the same bytes afterwards: where the parents differ, IMAGE gets what the old one shows. \
            Stopped at any moment, IMAGE has its old parent and shows the same; called again, it goes on.

            With --unsafe only the link is changed: for a parent that was moved, renamed or copied. The old parent \
            need not be there.

            EXAMPLES
              vdimg rebase --parent new-base.qcow2 disk.qcow2
              vdimg rebase --no-parent disk.vmdk               everything is copied into disk.vmdk
              vdimg rebase --unsafe --parent /new/place/base.vhdx child.vhdx
            """)

    @OptionGroup var image: ImageOptions
    @OptionGroup var progress: ProgressOptions
    @Option(help: "The new parent.", completion: .file()) var parent: String?
    @Option(help: "The new parent's format; detected if not given.") var parentFormat: String?
    @Flag(
        name: [.customLong("no-parent"), .customLong("flatten")],
        help: "Copy all that the parents hold into the image, which becomes a base.")
    var noParent = false
    @Flag(name: [.customShort("u"), .long], help: "Change only what the image says of its parent.") var unsafe = false
    @Argument(help: "The image.", completion: .file()) var path: String

    func validate() throws {
        if (parent != nil) == noParent { throw ValidationError("give either --parent or --no-parent") }
        if noParent, parentFormat != nil { throw ValidationError("--parent-format is for --parent") }
    }

    func run() throws {
        var rebase = ChainRebase(path, parent: parent)
        rebase.parentFormat = parentFormat
        rebase.isUnsafe = unsafe
        rebase.options = image.diskOptions()
        try progress.run { [rebase] (control) throws(DiskError) in
            try rebase.run(control)
            guard !progress.quiet else { return }
            print("\(path): \(parent.map { "now over \($0)" } ?? "has no parent any more")".printable())
        }
    }
}

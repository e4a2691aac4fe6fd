import ArgumentParser
import DiskStorage
import VirtualDisk

/// `vdimg merge`: images of a chain become one.
struct MergeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "merge", abstract: "Merge images of a chain into one of them.",
        discussion: """
            Alone, IMAGE is merged into its parent (a commit): the parent then holds what IMAGE shows, and IMAGE is \
            removed.

            With --from and --to, image A of IMAGE's chain is merged into image B, up or down, with all images \
            between the two; A and those between are removed, and the image above is told of its new parent. Both \
            are named by path, or by number as 'vdimg map' counts: 0 is IMAGE, 1 its parent, and so on.

            The disk shows the same bytes before, meanwhile and afterwards. What was stopped goes on when it is \
            called again. IMAGE must be the top of its chain: other images over one that changes or goes away would \
            be lost, so merging is refused when there is one beside them.

            The disk may be mounted meanwhile with vdmount, which then does the work and goes on reading and writing. \
            Ctrl-C stops it, and the disk goes on with the images that it had.

            EXAMPLES
              vdimg merge disk-001.vmdk                        disk-001 into its parent
              vdimg merge disk-003.vmdk --to disk.vmdk         all snapshots into the base
              vdimg merge disk-003.vmdk --from 2 --to 1        into the image above, which stays
            """)

    @OptionGroup var image: ImageOptions
    @OptionGroup var progress: ProgressOptions
    @Option(help: ArgumentHelp("The image that is merged; IMAGE if not given.", valueName: "A"), completion: .file())
    var from: String?
    @Option(
        help: ArgumentHelp("The image it is merged into; A's parent if not given.", valueName: "B"),
        completion: .file())
    var to: String?
    @Flag(help: "Leave the files of the images that are not needed any more.") var keep = false
    @Flag(help: "Merge although other images lie over one that changes or goes away, or it has internal snapshots.")
    var force = false
    @Argument(help: "The top image of the chain.", completion: .file()) var path: String

    func run() throws {
        var merge = ChainMerge(top: path)
        merge.options = image.diskOptions()
        if let from { merge.source = chainImage(from) }
        merge.target = to.map(chainImage)
        merge.keepsFiles = keep
        merge.ignoresOtherChildren = force
        try progress.run { [merge] (control) throws(DiskError) in
            let outcome = try run(merge, control)
            guard !progress.quiet else { return }
            print("\(outcome.source): merged into \(outcome.target)".printable())
            if keep, !outcome.obsoleteFiles.isEmpty {
                print("not needed any more: \(outcome.obsoleteFiles.joined(separator: ", "))".printable())
            }
        }
    }
}

extension MergeCommand {
    /// Merges here, or has the daemon do it that serves the disk.
    private func run(_ merge: ChainMerge, _ control: OperationControl) throws(DiskError) -> ChainMerge.Outcome {
        if let mounted = try MountedChain.withTop(path) {
            return try MountedMerge(mounted: mounted, merge: merge).run(control)
        }
        // Merged away before, by a call that ended before it had removed the file.
        if merge.source == .number(0), let mounted = try MountedMerge.whereLeft(path) {
            return try MountedMerge.finish(path, mounted, keepsFiles: keep)
        }
        return try merge.run(control)
    }
}

/// An image of a chain as people name it: digits alone are its number.
func chainImage(_ text: String) -> ChainMerge.Image {
    if let number = Int(text), number >= 0 { return .number(number) }
    return .path(text)
}

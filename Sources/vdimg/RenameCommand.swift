import ArgumentParser
import DiskStorage
import VirtualDisk

/// `vdimg rename`: another name or folder for an image, with all its files.
struct RenameCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "rename", abstract: "Rename or move an image with all its files.",
        discussion: """
            The files of extents are renamed after the image, and a parent that is named by a relative path is found \
            from the new folder too. NEW is a file's name, or a folder. Nothing is overwritten; an image that is in \
            use is left alone. If it is interrupted, the image opens under its old or its new name, and the same \
            command finishes.

            Images made over the renamed one are not searched for. They name it as it was called: \
            'vdimg rebase --unsafe' tells them the new name.

            EXAMPLES
              vdimg rename disk.vmdk server.vmdk
              vdimg rename disk.vmdk /srv/images
            """)

    @OptionGroup var image: ImageOptions
    @OptionGroup var progress: ProgressOptions
    @Argument(help: "The image.", completion: .file()) var old: String
    @Argument(help: "Its new name, or the folder to move it to.", completion: .file()) var new: String

    func run() throws {
        var outcome: ImageRename.Outcome?
        try progress.run { (control) throws(DiskError) in
            outcome = try ImageRename.run(old, to: new, options: image.diskOptions(), control: control)
        }
        guard let outcome, !progress.quiet else { return }
        let verb = outcome.isContinuation ? "what was left of the rename is done" : "renamed from \(old)"
        let count = outcome.files.count == 1 ? "" : ", \(outcome.files.count) files"
        print("\(outcome.path): \(verb)\(count)".printable())
        print(
            "Images made over it still name \(old): 'vdimg rebase --unsafe' with the new name mends them.".printable())
        noteUnlessFound(outcome.path)
    }

    /// A parent that is known by UUID is looked for beside the image, where it may not be now.
    private func noteUnlessFound(_ path: String) {
        do throws(DiskError) {
            _ = try ImageInformation.read(path, options: image.diskOptions(), wholeChain: true)
        } catch {
            writeError("vdimg: note: renamed, but to open it needs more: \(error)")
        }
    }
}

import ArgumentParser
import CommandSupport
import DiskStorage
import VirtualDisk

/// `vdimg compact`: makes an image smaller where it lies.
struct CompactCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "compact", abstract: "Make an image smaller where it lies.",
        discussion: """
            Blocks of zeros, and blocks that the parents show as well, are given up, blocks at the file's end move to \
            the front, and the file is cut off. The disk shows the same bytes at every moment, and children of the \
            image stay valid. SIGINT ends it with a sound image; doing it again does the rest.

            With --free-space, what a clean ext4 in the image has as free is dropped too. Its bytes change to zeros: \
            do that to no image that has children.

            EXAMPLES
              vdimg compact disk.vdi
              vdimg compact --free-space disk.vmdk
              vdimg compact --copy disk.qcow2
            """)

    @OptionGroup var image: ImageOptions
    @Flag(help: "Also drop what file systems in it (ext4) have as free; only if the image has no children.")
    var freeSpace = false
    @Flag(help: "Do so although there is an image that was made over this one.") var force = false
    @Flag(help: "Make the image anew, dense and in the disk's order, and put the new one in its place.") var copy =
        false
    @Flag(help: "Write JSON.") var json = false
    @OptionGroup var progress: ProgressOptions
    @Argument(help: "The image.", completion: .file()) var path: String

    func validate() throws {
        if force, !freeSpace { throw ValidationError("--force belongs to --free-space") }
        if copy, freeSpace || json { throw ValidationError("--copy makes the image as it is, and goes by itself") }
    }

    func run() throws {
        if copy { return try makeAnew() }
        var result: ImageCompaction?
        try progress.run { (control) throws(DiskError) in
            var compaction = ImageCompaction.Options()
            compaction.dropsFreeSpace = freeSpace
            compaction.ignoresOtherChildren = force
            result = try ImageCompaction.run(
                path, options: image.diskOptions(isWritable: true), compaction: compaction, control: control)
        }
        guard let result else { return }
        if json { return try print(jsonText(CompactionRecord(path, result))) }
        for note in result.notes { writeError("vdimg: note: \(note.printable())") }
        guard !progress.quiet else { return }
        func size(_ space: ImageCompaction.Space) -> String {
            "\(humanSize(space.allocatedBytes)) of \(humanSize(space.fileLength))"
        }
        var rows = [("disk usage before", size(result.before)), ("disk usage now", size(result.after))]
        for (title, bytes) in [
            ("zeros dropped", result.zeroBytes), ("same as parents", result.sameBytes),
            ("free space dropped", result.freeBytes), ("zeros made holes", result.punchedBytes),
        ] where bytes > 0 {
            rows.append((title, humanSize(bytes)))
        }
        printRows(rows)
    }

    private func makeAnew() throws {
        try progress.run { (control) throws(DiskError) in
            let before = try ImageInformation.read(path, options: image.diskOptions()).first
            try ImageReplacement(path, options: image.diskOptions()).run(control)
            let after = try ImageInformation.read(path, options: image.diskOptions()).first
            guard !progress.quiet, let before, let after else { return }
            printRows([
                ("disk usage before", "\(humanSize(before.allocatedBytes)) of \(humanSize(before.fileLength))"),
                ("disk usage now", "\(humanSize(after.allocatedBytes)) of \(humanSize(after.fileLength))"),
            ])
        }
    }
}

/// A compaction as JSON shows it.
private struct CompactionRecord: Encodable {
    let image: String
    let fileLengthBefore: UInt64
    let fileLength: UInt64
    let allocatedBytesBefore: UInt64
    let allocatedBytes: UInt64
    let zeroBytes: UInt64
    let sameBytes: UInt64
    let freeBytes: UInt64
    let punchedBytes: UInt64
    let notes: [String]

    init(_ path: String, _ result: ImageCompaction) {
        image = path
        fileLengthBefore = result.before.fileLength
        fileLength = result.after.fileLength
        allocatedBytesBefore = result.before.allocatedBytes
        allocatedBytes = result.after.allocatedBytes
        zeroBytes = result.zeroBytes
        sameBytes = result.sameBytes
        freeBytes = result.freeBytes
        punchedBytes = result.punchedBytes
        notes = result.notes
    }

    enum CodingKeys: String, CodingKey {
        case image, notes
        case fileLengthBefore = "file-length-before"
        case fileLength = "file-length"
        case allocatedBytesBefore = "allocated-bytes-before"
        case allocatedBytes = "allocated-bytes"
        case zeroBytes = "zero-bytes"
        case sameBytes = "same-bytes"
        case freeBytes = "free-bytes"
        case punchedBytes = "punched-bytes"
    }
}

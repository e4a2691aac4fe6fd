import ArgumentParser
import CommandSupport
import DiskStorage
import VirtualDisk

/// `vdimg resize`: a larger or smaller disk.
struct ResizeCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "resize", abstract: "Make the disk of an image larger or smaller.",
        discussion: """
            EXAMPLES
              vdimg resize disk.vhd 40G
              vdimg resize disk.qcow2 +10G
              vdimg resize --shrink disk.vmdk -5G

            What is new reads as zeros. A disk becomes smaller only with --shrink, and only if what is cut off reads \
            as zeros and no partition lies there. Partitions and file systems are not changed: make them larger \
            afterwards, or smaller before. Images made over this one (its children) are not changed either.
            """)

    @OptionGroup var image: ImageOptions
    @OptionGroup var progress: ProgressOptions
    @Flag(help: "Allow the disk to become smaller.") var shrink = false
    @Flag(help: "Shrink even where that cuts off data and partitions: they are lost.") var discardData = false
    @Argument(help: "The image.", completion: .file()) var path: String
    @Argument(help: "The new size: bytes, or K, M, G, T (powers of 1024); +SIZE or -SIZE is a difference.")
    var size: SizeChange

    func run() throws {
        try progress.run { (control) throws(DiskError) in
            var resize = ImageResize(path: path, size: size.value, options: image.diskOptions())
            resize.allowsShrinking = shrink
            resize.discardsData = discardData
            let outcome = try resize.run(control)
            if outcome.hasStrayBackupTable {
                writeError(
                    "vdimg: note: \(path): the backup of the disk's GUID partition table is not at the disk's end now: "
                        + "'sgdisk --move-second-header' puts it there")
            }
            guard !progress.quiet else { return }
            let old = "\(humanSize(outcome.oldSize)) (\(outcome.oldSize) bytes)"
            let new = "\(humanSize(outcome.newSize)) (\(outcome.newSize) bytes)"
            print(outcome.oldSize == outcome.newSize ? "\(path): \(new) already" : "\(path): \(new), before \(old)")
        }
    }
}

/// A size, or with a sign a difference.
struct SizeChange: ExpressibleByArgument {
    let value: ImageResize.Size

    /// What stands for a minus where an argument's own would make it an option.
    private static let minus = "\u{2212}"

    init?(argument: String) {
        let sign = ["+", "-", Self.minus].first { argument.hasPrefix($0) } ?? ""
        guard let count = ByteCount(argument: String(argument.dropFirst(sign.count))) else { return nil }
        switch sign {
        case "": value = .exactly(count.bytes)
        case "+": value = .larger(by: count.bytes)
        default: value = .smaller(by: count.bytes)
        }
    }

    /// The arguments of the program, in which a minus before a number is no option's.
    static func protecting(_ arguments: [String]) -> [String] {
        guard arguments.first == "resize" else { return arguments }
        return arguments.map { argument in
            let rest = argument.dropFirst()
            guard argument.hasPrefix("-"), rest.first?.isASCII == true, rest.first?.isNumber == true else {
                return argument
            }
            return minus + rest
        }
    }
}

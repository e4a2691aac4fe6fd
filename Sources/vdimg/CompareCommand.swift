import ArgumentParser
import CommandSupport
import DiskStorage
import VirtualDisk

/// `vdimg compare`: whether two disks show the same bytes.
struct CompareCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "compare", abstract: "Compare what two images show, whatever their formats.",
        discussion: """
            Parents are found and read as for a mount. What both are known to have as zeros, and what both take from \
            the same place of the same file, is not read. If one disk is longer, its rest must be zeros.

            EXAMPLES
              vdimg compare disk.vmdk disk.qcow2
              vdimg compare --all --json before.vdi after.vdi

            EXIT STATUS
              0 they are the same; 1 they differ; 2 they could not be compared (as of cmp and qemu-img).
            """)

    @OptionGroup var image: ImageOptions
    @Option(help: "The second image's format; detected if not given.") var secondFormat: String?
    @Flag(help: "Sizes must be the same too, and what is allocated.") var strict = false
    @Flag(help: "List all ranges that differ, not the first byte alone.") var all = false
    @Flag(help: "Write JSON.") var json = false
    @OptionGroup var progress: ProgressOptions
    @Argument(help: "An image.", completion: .file()) var first: String
    @Argument(help: "Another one.", completion: .file()) var second: String

    func run() throws {
        var result: DiskComparison?
        do {
            try progress.run { (control) throws(DiskError) in result = try compare(control) }
        } catch let code as ExitCode where code == ExitCode(1) {
            throw ExitCode(2)  // 1 is an answer here
        }
        guard let result else { throw ExitCode(2) }
        if json {
            try print(jsonText(ComparisonRecord(first, second, result, listsAll: all)))
        } else {
            show(result)
        }
        guard Program.hasWrittenOutput("vdimg") else { throw ExitCode(2) }
        if !result.isEqual { throw ExitCode(1) }
    }

    private func compare(_ control: OperationControl) throws(DiskError) -> DiskComparison {
        var options = DiskComparison.Options()
        options.isStrict = strict
        options.findsAll = all
        var secondOptions = image.diskOptions()
        secondOptions.format = secondFormat
        let a = try Disk.open(first, options: image.diskOptions())
        let b = try Disk.open(second, options: secondOptions)
        let result = try DiskComparison.run(a, b, options: options, control: control)
        try a.close()
        try b.close()
        return result
    }

    private func show(_ result: DiskComparison) {
        if !result.hasAcceptedSizes {
            print("the disks have \(result.sizes.first) and \(result.sizes.second) bytes")
        }
        if all {
            for found in result.ranges {
                let note = found.difference == .allocation ? "  allocated in one alone" : ""
                print("\(found.range.lowerBound) \(found.range.upperBound - found.range.lowerBound)\(note)")
            }
            if result.furtherRanges > 0 { print("… and \(result.furtherRanges) ranges more") }
        }
        guard !result.isEqual else {
            if !progress.quiet { print("the disks are the same") }
            return
        }
        guard let place = result.firstDifference else { return }
        let isAllocation = result.ranges.first?.difference == .allocation
        let what = isAllocation ? "the disks are not allocated alike" : "the disks differ"
        print("\(what), first at byte \(place)\(all ? "; \(result.differingBytes) bytes in all" : "")")
    }
}

/// A comparison as JSON shows it.
private struct ComparisonRecord: Encodable {
    let first: String
    let second: String
    let isEqual: Bool
    let firstSize: UInt64
    let secondSize: UInt64
    let firstDifference: UInt64?
    let ranges: [RangeRecord]?
    let furtherRanges: Int?
    let differingBytes: UInt64?

    struct RangeRecord: Encodable {
        let offset: UInt64
        let length: UInt64
        let difference: String
    }

    init(_ first: String, _ second: String, _ result: DiskComparison, listsAll: Bool) {
        self.first = first
        self.second = second
        isEqual = result.isEqual
        (firstSize, secondSize) = result.sizes
        firstDifference = result.firstDifference
        ranges =
            listsAll
            ? result.ranges.map {
                RangeRecord(
                    offset: $0.range.lowerBound, length: $0.range.upperBound - $0.range.lowerBound,
                    difference: $0.difference.rawValue)
            } : nil
        furtherRanges = listsAll ? result.furtherRanges : nil
        differingBytes = listsAll ? result.differingBytes : nil
    }

    enum CodingKeys: String, CodingKey {
        case first, second, ranges
        case isEqual = "is-equal"
        case firstSize = "first-size"
        case secondSize = "second-size"
        case firstDifference = "first-difference"
        case furtherRanges = "further-ranges"
        case differingBytes = "differing-bytes"
    }
}

import ArgumentParser
import CommandSupport
import DiskStorage
import VirtualDisk

/// `vdimg measure`: how large a new image would be.
struct MeasureCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "measure", abstract: "Tell how large a new image would be.",
        discussion: """
            Required is what the image takes that holds what IMAGE shows (without IMAGE: nothing), fully allocated \
            what it takes when all of the disk was written: lengths of all its files together, holes included.

            EXAMPLES
              vdimg measure --format qcow2 --size 20G
              vdimg measure --format vmdk --variant stream disk.vdi
            """)

    @Option(help: "The new image's format.") var format: String
    @Option(help: "The kind of image, as 'vdimg formats' lists them.") var variant: String?
    @Option(help: "The size of the disk: bytes, or K, M, G, T; the image's if not given.") var size: ByteCount?
    @Option(help: "The unit of allocation: bytes, or K, M.") var blockSize: ByteCount?
    @Option(
        name: .customLong("option"),
        help: ArgumentHelp("What the format alone knows (repeatable).", valueName: "NAME=VALUE"))
    var formatOptions: [String] = []
    @Flag(help: "Read the image, to leave out zeros that its tables do not know of.") var exact = false
    @Option(help: "The format of IMAGE; detected if not given.") var sourceFormat: String?
    @Option(
        name: .customLong("allow-dir"),
        help: ArgumentHelp("Parents and extents of IMAGE may also come from DIR (repeatable).", valueName: "DIR"),
        completion: .directory)
    var allowedFolders: [String] = []
    @OptionGroup var openOptions: FormatOptions
    @Flag(help: "Write JSON.") var json = false
    @OptionGroup var progress: ProgressOptions
    @Argument(help: "The image whose contents the new one is to have.", completion: .file()) var image: String?

    func validate() throws {
        try openOptions.validate()
        if size == nil, image == nil { throw ValidationError("give the disk's --size, or an image") }
        for option in formatOptions where !option.contains("=") {
            throw ValidationError("--option takes NAME=VALUE, not '\(option)'")
        }
    }

    func run() throws {
        var result: ImageMeasurement?
        try progress.run { (control) throws(DiskError) in
            var new = NewImage(path: "new.\(format)")
            new.format = format
            new.variant = variant
            new.size = size?.bytes
            new.blockSize = blockSize?.bytes
            for option in formatOptions {
                let parts = option.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
                new.options[String(parts[0])] = String(parts[1])
            }
            let disk = try image.map { (path) throws(DiskError) in try open(path) }
            if let disk, size == nil {
                // Most formats count in sectors.
                new.size = disk.size.dividedRoundingUp(by: 512) * 512
            }
            result = try ImageMeasurement.run(new, contents: disk, readsData: exact, control: control)
            try disk?.close()
        }
        guard let result else { return }
        if json { return try print(jsonText(MeasurementRecord(result))) }
        let note = result.isUpperBound ? ", at most" : ""
        func text(_ bytes: UInt64) -> String { "\(bytes) bytes (\(humanSize(bytes)))\(note)" }
        printRows([("required", text(result.required)), ("fully allocated", text(result.fullyAllocated))])
    }

    private func open(_ path: String) throws(DiskError) -> Disk {
        var options = DiskOptions(format: sourceFormat, allowedFolders: allowedFolders)
        options.formatOptions = openOptions.values
        return try Disk.open(path, options: options)
    }
}

/// A measurement as JSON shows it; the first two keys are those of qemu-img.
private struct MeasurementRecord: Encodable {
    let required: UInt64
    let fullyAllocated: UInt64
    let format: String
    let virtualSize: UInt64
    let isUpperBound: Bool

    init(_ measurement: ImageMeasurement) {
        required = measurement.required
        fullyAllocated = measurement.fullyAllocated
        format = measurement.format
        virtualSize = measurement.virtualSize
        isUpperBound = measurement.isUpperBound
    }

    enum CodingKeys: String, CodingKey {
        case required, format
        case fullyAllocated = "fully-allocated"
        case virtualSize = "virtual-size"
        case isUpperBound = "is-upper-bound"
    }
}

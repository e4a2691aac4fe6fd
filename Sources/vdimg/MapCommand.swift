import ArgumentParser
import DiskStorage
import VirtualDisk

/// `vdimg map`: which image of a chain holds which bytes.
struct MapCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "map", abstract: "Show where the bytes of a disk lie.",
        discussion: """
            Layer 0 is the image that is named, 1 its parent, and so on. --svg draws them all: a row for each image, \
            with the partitions above.

            EXAMPLES
              vdimg map --svg chain.svg child.vmdk
              vdimg map --json child.vmdk
            """)

    @OptionGroup var image: ImageOptions
    @Flag(help: "Write JSON: a list of extents.") var json = false
    @Option(
        help: ArgumentHelp(
            "Write a picture (SVG) to FILE, which must not exist; - is standard output.", valueName: "FILE"),
        completion: .file(extensions: ["svg"]))
    var svg: String?
    @Flag(help: "Replace FILE if it exists.") var force = false
    @Argument(help: "The image.", completion: .file()) var path: String

    func validate() throws {
        if json, svg != nil { throw ValidationError("--json and --svg are two different answers") }
        if force, svg == nil { throw ValidationError("--force belongs to --svg") }
    }

    func run() throws {
        try reportingErrors { () throws(DiskError) in
            let disk = try Disk.open(path, options: image.diskOptions())
            if let svg { return try draw(disk, to: svg) }
            if json { return try showJSON(disk) }
            print(row("offset", "length", "layer", "where"))
            try disk.forEachExtent(offset: 0, length: disk.size) { extent in
                let record = ExtentRecord(extent)
                let place =
                    record.file.map { $0 + (record.fileOffset.map { " at \($0)" } ?? ", compressed") } ?? record.kind
                print(
                    row(
                        String(record.offset), String(record.length), record.layer.map(String.init) ?? "-",
                        place.printable()))
                return true
            }
        }
    }

    private func draw(_ disk: Disk, to file: String) throws(DiskError) {
        let text = try ChainPicture(disk).svg
        if file == "-" { return print(text, terminator: "") }
        try writeNewFile(file, Array(text.utf8), replacing: force)
    }

    private func row(_ offset: String, _ length: String, _ layer: String, _ place: String) -> String {
        func pad(_ text: String, _ width: Int) -> String {
            String(repeating: " ", count: max(0, width - text.count)) + text
        }
        return "\(pad(offset, 16)) \(pad(length, 16)) \(pad(layer, 6))  \(place)"
    }

    /// One extent a line: a map may be long, and is not kept in memory.
    private func showJSON(_ disk: Disk) throws(DiskError) {
        var separator = "["
        try disk.forEachExtent(offset: 0, length: disk.size) { extent in
            print(separator + ExtentRecord(extent).json)
            separator = ","
            return true
        }
        print(separator == "[" ? "[]" : "]")
    }
}

/// An extent as it is shown.
private struct ExtentRecord {
    let offset: UInt64
    let length: UInt64
    let kind: String
    var layer: Int?
    var file: String?
    var fileOffset: UInt64?

    init(_ extent: DiskExtent) {
        offset = extent.offset
        length = extent.length
        switch extent.source {
        case .data(let number, let name, let place):
            (kind, layer, file, fileOffset) = ("data", number, name, place)
        case .encoded(let number, let name):
            (kind, layer, file) = ("compressed", number, name)
        case .zero(let number):
            (kind, layer) = ("zero", number)
        case .unallocated:
            kind = "unallocated"
        }
    }

    var json: String {
        var fields = ["\"offset\": \(offset)", "\"length\": \(length)", "\"kind\": \"\(kind)\""]
        if let layer { fields.append("\"layer\": \(layer)") }
        if let file { fields.append("\"file\": \(quoted(file))") }
        if let fileOffset { fields.append("\"file-offset\": \(fileOffset)") }
        return "{" + fields.joined(separator: ", ") + "}"
    }

    private func quoted(_ text: String) -> String {
        var result = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"", "\\": result += "\\" + String(scalar)
            case _ where scalar.value < 0x20:
                let digits = String(scalar.value, radix: 16)
                result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result + "\""
    }
}

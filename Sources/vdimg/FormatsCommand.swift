import ArgumentParser
import CommandSupport
import DiskImage
import VirtualDisk

/// `vdimg formats`: what formats there are and what can be done with them.
struct FormatsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "formats", abstract: "List the formats, their capabilities and their kinds of images.")

    @Flag(help: "Write JSON.") var json = false

    func run() throws {
        let formats = ImageFormats.all
        if json { return try print(jsonText(formats.map(FormatRecord.init))) }
        for (index, format) in formats.enumerated() {
            if index > 0 { print() }
            print("\(format.name): \(format.title) (\(format.fileExtensions.map { "." + $0 }.joined(separator: ", ")))")
            print("  can: \(format.capabilities.joined(separator: ", "))")
            if !format.options.isEmpty { print("  --option: \(format.options.joined(separator: ", "))") }
            for variant in format.variants { print("  --variant \(variant.name): \(variant.summary)") }
        }
    }
}

private struct FormatRecord: Encodable {
    let name: String
    let title: String
    let extensions: [String]
    let capabilities: [String]
    let variants: [String: String]
    let options: [String]

    init(_ format: ImageFormats.Description) {
        name = format.name
        title = format.title
        extensions = format.fileExtensions
        capabilities = format.capabilities
        variants = Dictionary(format.variants.map { ($0.name, $0.summary) }) { first, _ in first }
        options = format.options
    }
}

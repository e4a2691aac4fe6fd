import ArgumentParser
import DiskStorage
import Glibc

/// `vdimg`: creates, inspects and checks images.
@main
struct VDImg: ParsableCommand {
    static func main() {
        ProcessPreparation.run()
        main(nil)
    }

    static let configuration = CommandConfiguration(
        commandName: "vdimg",
        abstract: "Create, inspect, check and repair virtual disk images.",
        usage: "vdimg COMMAND ...",
        discussion: """
            EXAMPLES
              vdimg create --size 20G disk.vmdk
              vdimg create --parent base.vmdk child.vmdk
              vdimg info --chain child.vmdk
              vdimg check --repair disk.vmdk
              vdimg map --json child.vmdk

            EXIT STATUS
              0 well; 1 the operation failed; 2 check found what needs repair; 3 check found loss that
              cannot be repaired; 64 wrong usage.
            """,
        version: version,
        subcommands: [
            InfoCommand.self, CreateCommand.self, MapCommand.self, CheckCommand.self, FormatsCommand.self,
        ])
}

/// The version of this package.
let version = "0.1.0"

/// Options that every command which opens images has.
struct ImageOptions: ParsableArguments {
    @Option(help: "The image's format; detected if not given.")
    var format: String?

    @Option(
        name: .customLong("allow-dir"),
        help: ArgumentHelp("Parents and extents may also come from DIR (repeatable).", valueName: "DIR"))
    var allowedFolders: [String] = []
}

/// Runs a command's work; an error becomes one line on standard error and exit status 1.
func reportingErrors(_ body: () throws(DiskError) -> Void) throws {
    do throws(DiskError) {
        try body()
    } catch {
        writeError("vdimg: \(error)")
        throw ExitCode(1)
    }
}

/// Writes a line to standard error.
func writeError(_ text: String) {
    let line = Array((text + "\n").utf8)
    _ = unsafe line.withUnsafeBytes { unsafe write(STDERR_FILENO, $0.baseAddress, $0.count) }
}

/// A size as people read it: `1.5 GiB`.
func humanSize(_ bytes: UInt64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    var unit = 0
    var scale: UInt64 = 1
    while unit < units.count - 1, bytes / scale >= 1024 {
        scale <<= 10
        unit += 1
    }
    if unit == 0 { return "\(bytes) bytes" }
    let tenths = bytes / scale * 10 + bytes % scale * 10 / scale
    return tenths % 10 == 0 ? "\(tenths / 10) \(units[unit])" : "\(tenths / 10).\(tenths % 10) \(units[unit])"
}

/// A size as people type it: bytes, or K, M, G, T (powers of 1024).
struct ByteCount: ExpressibleByArgument {
    let bytes: UInt64

    init?(argument: String) {
        var digits = argument.uppercased()
        for suffix in ["IB", "B"] where digits.hasSuffix(suffix) {
            digits.removeLast(suffix.count)
            break
        }
        var shift: UInt64 = 0
        if let unit = digits.last, let index = ["K", "M", "G", "T", "P"].firstIndex(of: String(unit)) {
            shift = UInt64(index + 1) * 10
            digits.removeLast()
        }
        guard let number = UInt64(digits) else { return nil }
        let (value, overflow) = number.multipliedReportingOverflow(by: 1 << shift)
        guard !overflow else { return nil }
        bytes = value
    }
}

import ArgumentParser
import CommandSupport
import DiskNetwork
import DiskStorage
import Glibc
import VirtualDisk

/// `vdimg`: creates, inspects and checks images.
@main
struct VDImg: ParsableCommand {
    static func main() {
        ProcessPreparation.run()
        Program.expectText("vdimg")
        Program.run(Self.self, named: "vdimg", SizeChange.protecting(Array(CommandLine.arguments.dropFirst())))
    }

    static let configuration = CommandConfiguration(
        commandName: "vdimg",
        abstract: "Create, inspect, check, repair and change virtual disk images.",
        usage: "vdimg COMMAND ...",
        discussion: """
            EXAMPLES
              vdimg create --size 20G disk.vmdk
              vdimg create --parent base.vmdk child.vmdk
              vdimg info --chain child.vmdk
              vdimg check --repair disk.vmdk
              vdimg map --svg chain.svg child.vmdk
              vdimg compare disk.vmdk disk.qcow2
              vdimg measure --format qcow2 disk.vmdk
              vdimg snapshot disk.vmdk
              vdimg merge disk-001.vmdk
              vdimg rebase --parent other.vmdk child.vmdk
              vdimg resize disk.vmdk +10G
              vdimg set --comment 'before the update' disk.vmdk
              vdimg rename disk.vmdk server.vmdk

            EXIT STATUS
              0 well; 1 the operation failed; 2 check found what needs repair; 3 check found loss that
              cannot be repaired; 64 wrong usage. Of compare: 0 the same; 1 they differ; 2 it failed.
            """,
        version: programVersion,
        subcommands: [
            InfoCommand.self, CreateCommand.self, ConvertCommand.self, MapCommand.self, CheckCommand.self,
            SnapshotCommand.self, MergeCommand.self, RebaseCommand.self, CompareCommand.self, MeasureCommand.self,
            CompactCommand.self, ResizeCommand.self, SetCommand.self, RenameCommand.self, FormatsCommand.self,
            CacheCommand.self,
        ])
}

/// Options that every command which opens images has.
struct ImageOptions: ParsableArguments {
    @Option(help: "The image's format; detected if not given.")
    var format: String?

    @Option(
        name: .customLong("allow-dir"),
        help: ArgumentHelp("Parents and extents may also come from DIR (repeatable).", valueName: "DIR"),
        completion: .directory)
    var allowedFolders: [String] = []

    @Option(
        name: .customLong("allow-url"),
        help: ArgumentHelp(
            "Parents and extents may also come from URL, and from what lies below it (repeatable).",
            valueName: "URL"))
    var allowedAddresses: [String] = []

    @Option(
        name: .customLong("storage-option"),
        help: ArgumentHelp(
            "How servers are reached: timeout, user, password-file, ca-file and others (repeatable).",
            valueName: "NAME=VALUE"))
    var storageOptions: [String] = []

    @OptionGroup var formatOptions: FormatOptions

    func validate() throws {
        try formatOptions.validate()
        do throws(DiskError) { _ = try storages() } catch { throw ValidationError("\(error)") }
    }

    /// What opens images that are not files.
    private func storages() throws(DiskError) -> NetworkStorages {
        try NetworkStorages(options: storageOptions, allowedAddresses: allowedAddresses)
    }

    /// How the image is opened.
    func diskOptions(isWritable: Bool = false) -> DiskOptions {
        var options = DiskOptions(isWritable: isWritable, format: format, allowedFolders: allowedFolders)
        options.formatOptions = formatOptions.values
        // Validated before; without it addresses are taken for paths, where nothing is.
        options.storageProvider = try? storages()
        return options
    }
}

/// What one format alone understands, when images are opened.
struct FormatOptions: ParsableArguments {
    @Option(
        name: .customLong("vhd-size"),
        help: ArgumentHelp(
            "The size of VHDs: chs (geometry) or current; told by their creator if not given.", valueName: "RULE"),
        completion: .list(["chs", "current"]))
    var vhdSize: String?

    func validate() throws {
        if let vhdSize, !["chs", "current"].contains(vhdSize) {
            throw ValidationError("--vhd-size takes chs or current, not '\(vhdSize)'")
        }
    }

    var values: [String: String] { vhdSize.map { ["vhd-size": $0] } ?? [:] }
}

/// The values of options of the form NAME=VALUE, by name.
func keyValues(_ options: [String]) throws -> [String: String] {
    var values: [String: String] = [:]
    for option in options {
        let parts = option.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2 else { throw ValidationError("--option takes NAME=VALUE, not '\(option)'") }
        values[String(parts[0])] = String(parts[1])
    }
    return values
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

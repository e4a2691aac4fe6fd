import ArgumentParser
import CommandSupport
import DiskNetwork
import DiskStorage
import FuseHost
import Glibc
import Logging
import VirtualDisk

/// `vdmount`: exposes the disk of a chain of images as one raw file.
@main
struct VDMount: ParsableCommand {
    static func main() {
        ProcessPreparation.run()
        Program.expectText("vdmount")
        let arguments = CommandLine.arguments
        if StorageProcess.isMeant(by: arguments) {
            StorageProcess.serve(arguments) { files in Confinement.beginForServers(files) }
        }
        main(Self.separated(arguments.dropFirst()))
    }

    /// Words as the parser takes them. `-oLIST`, as mount(8) and its helpers write it too, is `-o LIST`: the parser
    /// takes a value that is joined to its option only if no `=` is in it. `--overlay=FILE` and `--fs=N`, whose value
    /// may be left out, are options of their own.
    private static func separated(_ arguments: ArraySlice<String>) -> [String] {
        let options = arguments.prefix { $0 != "--" }
        let words = options.flatMap { word -> [String] in
            if word.hasPrefix("-o"), word.count > 2 { return ["-o", String(word.dropFirst(2))] }
            if word.hasPrefix("--overlay=") { return ["--overlay-file", String(word.dropFirst("--overlay=".count))] }
            if word.hasPrefix("--fs=") { return ["--fs-number", String(word.dropFirst("--fs=".count))] }
            return [word]
        }
        return words + arguments.dropFirst(options.count)
    }

    static let configuration = CommandConfiguration(
        commandName: "vdmount",
        abstract: "Expose a virtual disk image, with all images below it, as one raw file.",
        usage: """
            vdmount [OPTION...] IMAGE MOUNTPOINT
            vdmount --fs[=N] [OPTION...] IMAGE FOLDER
            vdmount --list [--json]
            """,
        discussion: """
            MOUNTPOINT is a folder, which then holds disk.raw, or an existing regular file, which then is \
            the disk. The mount is read-only and changes no byte of any image, unless --rw makes the named \
            image writable; the images below it stay as they are in any case.

            EXAMPLES
              vdmount image.vmdk /mnt/disk
              mount -o loop,ro /mnt/disk/disk.raw /mnt/fs
              losetup --find --show --partscan /mnt/disk/disk.raw
              vdmount --rw child.vmdk /mnt/disk
              vdmount https://server/disk.vmdk /mnt/disk
              vdumount /mnt/disk
            """,
        version: programVersion)

    @Flag(name: .customLong("rw"), help: "Make the image writable (not those below it).")
    var isWritable = false

    @Flag(
        help: """
            Make the disk writable without changing any image: what is written goes to a file that is gone afterwards, \
            or with --overlay=FILE to FILE, to be used again.
            """)
    var overlay = false

    @Option(help: .private)
    var overlayFile: String?

    @Option(help: ArgumentHelp("Where --overlay keeps what is written (default: /var/tmp).", valueName: "DIR"))
    var overlayDir: String?

    @Flag(name: [.customShort("f"), .long], help: "Stay in the foreground, log to standard error, end on SIGINT.")
    var foreground = false

    @Flag(name: .customLong("no-sandbox"), help: "Do not confine the daemon: for finding faults.")
    var isUnconfined = false

    @Option(help: "The image's format; detected if not given.")
    var format: String?

    @Option(
        name: .customLong("vhd-size"),
        help: ArgumentHelp(
            "The size of VHDs: chs (geometry) or current; told by their creator if not given.", valueName: "RULE"),
        completion: .list(["chs", "current"]))
    var vhdSize: String?

    @Option(
        help: ArgumentHelp(
            "Show the image's internal snapshot of that name or ID, read-only ('vdimg info' lists them).",
            valueName: "NAME"))
    var snapshot: String?

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

    @Option(
        name: [.customShort("o")],
        help: ArgumentHelp(
            "Options as mount(8) gives them: ro, rw, uid=, gid=, umask=, and each long option by its name.",
            valueName: "LIST"))
    var optionLists: [String] = []

    @Option(help: ArgumentHelp("Memory for mapping tables: bytes, or K, M (default: 8M).", valueName: "SIZE"))
    var tableCache: ByteCount?

    @Option(
        help: ArgumentHelp(
            "Keep what is read from the images in FILE, on a fast disk, for the next time too.", valueName: "FILE"),
        completion: .file())
    var cache: String?

    @Option(
        help: ArgumentHelp(
            "How large --cache makes a new FILE: bytes, or K, M, G, T (default: 10G).", valueName: "SIZE"))
    var cacheSize: ByteCount?

    @Option(help: ArgumentHelp("The most requests served at once (default: 16).", valueName: "N"))
    var lanes: Int?

    @Option(help: "error, warning, notice, info or debug (default: notice).")
    var logLevel: String?

    @Option(help: ArgumentHelp("Append the log to FILE.", valueName: "FILE"), completion: .file())
    var logFile: String?

    @Flag(
        help: """
            Mount the file system of the disk, or with --fs=N of its partition N, at a folder, read-only unless --rw \
            is given (root only).
            """)
    var fs = false

    @Option(help: .private)
    var fsNumber: Int?

    @Flag(help: "Show what is mounted.")
    var list = false

    @Flag(help: "With --list: as JSON.")
    var json = false

    @Argument(
        help: ArgumentHelp(
            "The image, most often the newest of its chain: a file, or a URL (http, https, nbd, iscsi).",
            valueName: "IMAGE"), completion: .file())
    var image: String?

    @Argument(help: ArgumentHelp("A folder or a regular file.", valueName: "MOUNTPOINT"), completion: .file())
    var mountpoint: String?

    /// The options of the command line and of `-o` together; what stands on its own wins over the list.
    private func request() throws -> MountRequest {
        var request = MountRequest()
        request.isForeground = foreground
        if isUnconfined { request.isConfined = false }
        for list in optionLists { try request.apply(optionList: list) }
        if fs || fsNumber != nil { request.hasFileSystem = true }
        request.partition = fsNumber ?? request.partition
        if request.hasFileSystem, request.owner != nil || request.group != nil || request.umask != nil {
            throw ValidationError("uid=, gid= and umask= are for the disk's file; with --fs its file system decides")
        }
        if request.hasFileSystem, request.isForeground { throw ValidationError("--fs goes to the background") }
        if overlay || overlayFile != nil { request.hasOverlay = true }
        request.overlayFile = overlayFile ?? request.overlayFile
        request.overlayFolder = overlayDir ?? request.overlayFolder
        if isWritable || request.hasOverlay { request.isWritable = true }
        if request.overlayFile?.isEmpty == true { throw ValidationError("--overlay= needs a file") }
        request.format = format ?? request.format
        request.vhdSize = vhdSize ?? request.vhdSize
        if let rule = request.vhdSize, !["chs", "current"].contains(rule) {
            throw ValidationError("--vhd-size takes chs or current, not '\(rule)'")
        }
        request.snapshot = snapshot ?? request.snapshot
        if request.snapshot != nil, request.isWritable, !request.hasOverlay {
            throw ValidationError(
                "an internal snapshot is read-only: leave out --rw (in fstab: say ro), or add --overlay")
        }
        request.allowedFolders += allowedFolders
        request.allowedAddresses += allowedAddresses
        request.storageOptions += storageOptions
        do throws(DiskError) {
            _ = try NetworkStorages(options: request.storageOptions, allowedAddresses: request.allowedAddresses)
        } catch {
            throw ValidationError("\(error)")
        }
        request.tableCacheSize = tableCache?.bytes ?? request.tableCacheSize
        request.cacheFile = cache ?? request.cacheFile
        request.cacheSize = cacheSize?.bytes ?? request.cacheSize
        if request.cacheFile == nil, request.cacheSize != nil { throw ValidationError("--cache-size needs --cache") }
        if request.cacheFile?.isEmpty == true { throw ValidationError("--cache needs a file") }
        if let size = request.cacheSize, !CacheOptions.sizes.contains(size) {
            throw ValidationError("--cache-size takes 2M to 512G")
        }
        request.maximumLanes = lanes ?? request.maximumLanes
        request.logLevel = logLevel ?? request.logLevel
        request.logFile = logFile ?? request.logFile
        if let level = request.logLevel, Logger.Level(rawValue: level) == nil {
            throw ValidationError("there is no log level '\(level)': error, warning, notice, info or debug")
        }
        if let lanes = request.maximumLanes, !(1...256).contains(lanes) {
            throw ValidationError("--lanes takes 1 to 256")
        }
        return request
    }

    func validate() throws {
        if list {
            guard image == nil else { throw ValidationError("--list takes no image") }
            return
        }
        if json { throw ValidationError("--json goes with --list") }
        guard image != nil else { throw ValidationError("which IMAGE, and at which MOUNTPOINT?") }
        guard mountpoint != nil else { throw ValidationError("at which MOUNTPOINT?") }
        _ = try request()
    }

    func run() throws {
        if list { return try MountList.print(asJSON: json) }
        guard let image, let mountpoint else { return }
        let request = try request()
        if request.hasFileSystem {
            return try FileSystemCommand(
                image: image, shownImage: try NetworkStorages().shownName(image), folder: mountpoint,
                number: request.partition, isWritable: request.isWritable,
                diskOptions: request.words, mountOptions: request.kernelOptions
            ).run()
        }
        Daemon.run(program: "vdmount", foreground: request.isForeground) { daemon in
            Self.serve(image, at: mountpoint, request, daemon)
        }
    }

    /// Mounts, and serves to the end; the exit status.
    private static func serve(
        _ image: String, at mountpoint: String, _ request: MountRequest, _ daemon: consuming Daemon
    ) -> Int32 {
        let level = request.logLevel.flatMap { Logger.Level(rawValue: $0) } ?? .notice
        guard let logger = Logger.make(level: level, path: request.logFile) else {
            daemon.fail("\(request.logFile ?? ""): cannot open the log: \(DiskError.describe(errno: errno))")
        }
        let mount: RunningMount
        do throws(MountFailure) {
            mount = try RunningMount(image: image, at: mountpoint, request, daemon.keeper, logger)
        } catch {
            daemon.fail(error.text, errno: error.errno)
        }
        let service = daemon.service
        service.status(mount.summary)
        guard daemon.ready() else {
            _ = mount.abandon()
            return 1
        }
        logger.info("\(mount.summary)")
        if let failure = mount.serve(service) {
            logger.error("\(failure)")
            service.failed(failure)
            return 1
        }
        return 0
    }
}

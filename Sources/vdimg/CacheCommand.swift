import ArgumentParser
import CommandSupport
import DiskImage
import DiskStorage
import VirtualDisk

/// `vdimg cache`: the files in which `vdmount --cache` keeps what it has read.
struct CacheCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "cache", abstract: "Make, describe, check and empty block caches (VCI).",
        discussion: """
            A block cache keeps on a fast disk what was read from images on a slow one: \
            'vdmount --cache FILE IMAGE MOUNTPOINT' uses FILE, and makes it if it is not there.

            EXAMPLES
              vdimg cache create --size 50G /var/cache/vm.vci
              vdmount --cache /var/cache/vm.vci /mnt/nas/vm.vmdk /mnt/disk
              vdimg cache info /var/cache/vm.vci
            """,
        subcommands: [
            CacheCreateCommand.self, CacheInfoCommand.self, CacheCheckCommand.self, CacheDropCommand.self,
        ])
}

/// `vdimg cache create`
struct CacheCreateCommand: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "create", abstract: "Make an empty block cache.")

    @Option(help: "The size of the file: bytes, or K, M, G, T (2M to 512G; default: 10G).") var size: ByteCount?
    @Flag(help: "Take all its space at once.") var fixed = false
    @Flag(help: "Say nothing on success.") var quiet = false
    @Argument(help: "The new file.", completion: .file()) var path: String

    func run() throws {
        try reportingErrors { () throws(DiskError) in
            try BlockCacheFile.create(path, size: size?.bytes ?? CacheOptions.defaultSize, isFixed: fixed)
            guard !quiet else { return }
            let information = try BlockCacheFile.information(path)
            print("\(path): block cache, \(fixed ? "fixed" : "dynamic"), \(humanSize(information.size))")
        }
    }
}

/// `vdimg cache info`
struct CacheInfoCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "info", abstract: "Show what a block cache holds, and of which image.",
        discussion: "Works on a cache that is in use, and then shows what its header says.")

    @Flag(help: "Write JSON.") var json = false
    @Argument(help: "The cache.", completion: .file()) var path: String

    func run() throws {
        try reportingErrors { () throws(DiskError) in
            let information = try BlockCacheFile.information(path)
            if json {
                do { try print(jsonText(CacheRecord(information))) } catch { throw DiskError(.system, "\(error)") }
                return
            }
            show(information)
        }
    }

    private func show(_ cache: BlockCacheInformation) {
        var rows = [
            ("cache", cache.path), ("type", cache.isFixed ? "fixed" : "dynamic"), ("size", humanSize(cache.size)),
            ("disk usage", "\(humanSize(cache.allocatedBytes)) of \(humanSize(cache.fileLength))"),
            ("image", cache.imageUUID.map { "\($0)" } ?? "none"),
            ("image state", cache.modificationUUID.map { "\($0)" } ?? "none"),
        ]
        if let contents = cache.contents {
            rows += [
                ("state", "closed cleanly"),
                ("cached", "\(humanSize(contents.cachedBytes)) in \(contents.extents) extents"),
                ("free", humanSize(contents.freeBytes)),
                (
                    "metadata",
                    "\(humanSize(contents.metadataBytes)); tree of \(contents.treeNodes) nodes in "
                        + "\(contents.treeLevels) levels"
                ),
            ]
        } else {
            rows.append(
                ("state", cache.isUnclean ? "in use, or not closed cleanly" : "damaged: see 'vdimg cache check'"))
        }
        printRows(rows)
    }
}

/// A cache as JSON shows it.
private struct CacheRecord: Encodable {
    let cache: String
    let type: String
    let size: UInt64
    let fileLength: UInt64
    let allocatedBytes: UInt64
    let imageUUID: String?
    let modificationUUID: String?
    let isUnclean: Bool
    let isDamaged: Bool
    let cachedBytes: UInt64?
    let metadataBytes: UInt64?
    let freeBytes: UInt64?
    let extents: Int?
    let treeNodes: Int?
    let treeLevels: Int?

    init(_ information: BlockCacheInformation) {
        cache = information.path
        type = information.isFixed ? "fixed" : "dynamic"
        size = information.size
        fileLength = information.fileLength
        allocatedBytes = information.allocatedBytes
        imageUUID = information.imageUUID.map { "\($0)" }
        modificationUUID = information.modificationUUID.map { "\($0)" }
        isUnclean = information.isUnclean
        isDamaged = information.contents == nil && !information.isUnclean
        cachedBytes = information.contents?.cachedBytes
        metadataBytes = information.contents?.metadataBytes
        freeBytes = information.contents?.freeBytes
        extents = information.contents?.extents
        treeNodes = information.contents?.treeNodes
        treeLevels = information.contents?.treeLevels
    }

    enum CodingKeys: String, CodingKey {
        case cache, type, size, extents
        case fileLength = "file-length"
        case allocatedBytes = "allocated-bytes"
        case imageUUID = "image-uuid"
        case modificationUUID = "modification-uuid"
        case isUnclean = "is-unclean"
        case isDamaged = "is-damaged"
        case cachedBytes = "cached-bytes"
        case metadataBytes = "metadata-bytes"
        case freeBytes = "free-bytes"
        case treeNodes = "tree-nodes"
        case treeLevels = "tree-levels"
    }
}

/// `vdimg cache check`
struct CacheCheckCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "check", abstract: "Look for damage in a block cache.",
        discussion: """
            A damaged cache is no harm: it is emptied when it is used, and 'vdimg cache drop' empties it now.

            EXIT STATUS
              0 nothing is wrong; 2 it would be emptied.
            """)

    @Argument(help: "The cache.", completion: .file()) var path: String

    func run() throws {
        var report = CheckReport()
        try reportingErrors { () throws(DiskError) in report = try BlockCacheFile.check(path) }
        for finding in report.findings { print("\(finding.file): \(finding.message)".printable()) }
        if report.remaining(.repairable) > 0 { throw ExitCode(2) }
        print("\(path): no problems; \(report.allocatedBlocks) of \(report.totalBlocks) blocks in use".printable())
    }
}

/// `vdimg cache drop`
struct CacheDropCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "drop", abstract: "Empty a block cache; it belongs to no image then.")

    @Argument(help: "The cache.", completion: .file()) var path: String

    func run() throws {
        try reportingErrors { () throws(DiskError) in try BlockCacheFile.drop(path) }
    }
}

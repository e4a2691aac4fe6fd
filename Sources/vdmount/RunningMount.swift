import CommandSupport
import DiskNetwork
import DiskStorage
import FuseHost
import Glibc
import Logging
import VirtualDisk

/// What keeps a mount from coming about, as one line.
struct MountFailure: Error {
    let text: String
    /// The system's number for it, if there is one.
    var errno: Int32 = 0
}

/// An open disk and the mount that shows it.
struct RunningMount {
    private let disk: Disk
    private let session: MountSession
    private let partitions: PartitionFiles
    private let chain: ChainControl
    /// What reaches the servers that hold images, if any do.
    private let storages: StorageProcess?
    private let logger: Logger
    private let notices: CacheNotices
    /// What is mounted, for the log.
    let summary: String

    /// Opens the disk and mounts it; nothing is left behind if that fails.
    init(
        image: String, at path: String, _ request: MountRequest, _ keeper: Keeper, _ logger: Logger
    ) throws(MountFailure) {
        self.logger = logger
        notices = CacheNotices(logger)
        let place: Mountpoint
        do throws(HostError) { place = try Mountpoint(path) } catch { throw MountFailure(text: "\(error)") }
        for warning in place.warnings { Daemon.say("vdmount: \(warning)") }
        let shown: String
        let passed = PassedFiles()
        do throws(DiskError) {
            let provider = try NetworkStorages(
                options: request.storageOptions, allowedAddresses: request.allowedAddresses)
            shown = provider.shownName(image)
            let isRemote = provider.recognizes(image) || !request.allowedAddresses.isEmpty
            storages = isRemote ? try Self.startStorages(request) : nil
            disk = try Disk.open(image, options: Self.options(request, notices, passed, storages ?? provider))
        } catch {
            throw MountFailure(text: "\(error)", errno: error.errnoValue)
        }
        notices.isServing = true
        partitions = PartitionFiles(disk, request, logger)
        let file = partitions.makeWhole()
        let chain = ChainControl(disk, passed, logger)
        self.chain = chain
        let cacheFile = disk.blockCacheUse == nil ? nil : request.cacheFile.map(Self.realPath)
        do throws(HostError) {
            session = try Self.mount(file, image: shown, at: place, request, keeper, (passed, storages)) {
                [disk] question, connection in
                guard question == "status" else { return chain.answer(question, connection) }
                let status = Self.status(disk, file, at: place.path, cacheFile: cacheFile)
                return (try? jsonText(status)).map { .text($0) } ?? .unknown
            }
        } catch {
            try? disk.close()
            storages?.end()
            throw MountFailure(text: "\(error)")
        }
        chain.begin(session)
        if place.isFolder, let warning = partitions.begin(session) { Daemon.say("vdmount: \(shown): \(warning)") }
        if let size = disk.sectorSize { Daemon.say("vdmount: \(shown): \(Self.sectorNote(size))") }
        let mode = request.isWritable ? "read-write" : "read-only"
        summary = "\(shown) is at \(place.path), \(mode), \(disk.size) bytes"
    }

    /// What to do about a disk whose sectors do not have 512 bytes.
    static func sectorNote(_ size: UInt32) -> String {
        "the disk has sectors of \(size) bytes: a loop device needs 'losetup --sector-size \(size)'"
    }

    private static func startStorages(_ request: MountRequest) throws(DiskError) -> StorageProcess {
        try StorageProcess.start(
            options: request.storageOptions, allowedAddresses: request.allowedAddresses,
            channels: request.maximumLanes ?? 16)
    }

    private static func options(
        _ request: MountRequest, _ notices: CacheNotices, _ passed: PassedFiles, _ provider: any StorageProvider
    ) -> DiskOptions {
        var options = DiskOptions(
            isWritable: request.isWritable, format: request.format, allowedFolders: request.allowedFolders)
        options.snapshot = request.snapshot
        options.storageProvider = provider
        options.passedFiles = passed
        options.overlay = request.overlay
        // The session does it: a timer of the disk's would be a thread before the process is confined.
        options.lazyFlushInterval = 0
        if let rule = request.vhdSize { options.formatOptions["vhd-size"] = rule }
        options.cache = request.cacheFile.map { path in
            CacheOptions(path: path, size: request.cacheSize) { notices.take($0) }
        }
        if let size = request.tableCacheSize { options.tableCacheSize = Int(clamping: size) }
        return options
    }

    private static func mount(
        _ file: DiskFile, image: String, at place: Mountpoint, _ request: MountRequest, _ keeper: Keeper,
        _ files: (passed: PassedFiles, storages: StorageProcess?), answer: @escaping ControlHandler
    ) throws(HostError) -> MountSession {
        var options = MountOptions(source: realPath(image), isReadOnly: !request.isWritable)
        options.extra = request.kernelOptions
        if let lanes = request.maximumLanes { options.maximumLanes = lanes }
        // Who may use the disk may list the folder.
        let shape: MountShape =
            place.isFolder
            ? .folder(mode: request.umask.map { 0o777 & ~$0 } ?? 0o500, owner: file.owner, group: file.group) : .file
        let session = try MountSession(files: [file], shape: shape, options: options, keeper: keeper)
        let confine = { () throws(HostError) -> [String] in
            // All images are open: what they make of this process shall not have others opened.
            files.passed.isSole = true
            do throws(DiskError) { try files.storages?.seal() } catch {
                throw HostError(subject: image, reason: "\(error)")
            }
            return request.isConfined ? try Confinement.begin() : []
        }
        for warning in try session.mount(at: place, confine: confine, answer: answer) {
            Daemon.say("vdmount: \(warning)")
        }
        return session
    }

    private static func status(
        _ disk: Disk, _ file: DiskFile, at path: String, cacheFile: String?
    ) -> MountStatus {
        let traffic = file.traffic
        let cache = disk.blockCacheUse
        let tables = disk.tableCacheUse
        return MountStatus(
            mountpoint: path, process: getpid(), mode: disk.isWritable ? "rw" : "ro",
            images: disk.layers.map { .init(path: $0.path, format: $0.format) }, size: disk.size,
            bytesRead: traffic.read, bytesWritten: traffic.written,
            cachedBytes: tables.cached,
            dirtyBytes: tables.dirty, cacheFile: cacheFile, cacheHitBytes: cache?.hitBytes,
            cacheMissBytes: cache?.missBytes, cacheUsedBytes: cache?.cachedBytes)
    }

    private static func realPath(_ path: String) -> String {
        guard let real = unsafe realpath(path, nil) else { return path }
        defer { unsafe free(real) }
        return unsafe String(cString: real)
    }

    /// Serves until the mount is gone and the disk closed; nil, or what failed at the end.
    func serve(_ service: ServiceNotification) -> String? {
        session.serve(
            MountSession.Handler(
                flush: { [disk] in
                    do throws(DiskError) {
                        try disk.flush()
                        return nil
                    } catch {
                        return "\(error)"
                    }
                },
                close: { [disk, partitions, chain, storages] in
                    service.stopping()
                    chain.end()
                    partitions.end()
                    defer { storages?.end() }
                    do throws(DiskError) {
                        try disk.close()
                        return nil
                    } catch {
                        return "\(error)"
                    }
                },
                regularly: { [disk] in disk.flushIfChanged() },
                log: { [logger] in
                    logger.warning("\($0)")
                    service.status($0)
                }))
    }

    /// Unmounts and closes at once, for a caller that went away.
    func abandon() -> String? {
        chain.end()
        partitions.end()
        session.cancel()
        defer { storages?.end() }
        do throws(DiskError) {
            try disk.close()
            return nil
        } catch {
            return "\(error)"
        }
    }
}

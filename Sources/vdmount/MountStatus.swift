import CommandSupport
import DiskStorage
import FuseHost
import Glibc
import VirtualDisk

/// What a daemon says of its mount: the answer to `status` on its control socket, and a line of `vdmount --list`.
struct MountStatus: Codable {
    /// One image of the chain.
    struct Image: Codable {
        var path: String
        var format: String
    }

    /// Whether somebody serves it.
    enum State: String, Codable {
        case serving
        /// Its daemon was killed: every access fails.
        case dead
        /// Its daemon does not answer this user.
        case unknown
    }

    var state = State.serving
    var mountpoint: String
    /// Where `vdmount --fs` mounted a file system of it.
    var files: String?
    var process: Int32?
    /// `ro` or `rw`.
    var mode: String
    /// The top image first; an overlay is the top one.
    var images: [Image]
    /// Bytes of the disk.
    var size: UInt64?
    var bytesRead: UInt64?
    var bytesWritten: UInt64?
    /// Bytes of mapping tables in memory, and of those that hold changes which are not written yet.
    var cachedBytes: Int?
    var dirtyBytes: Int?
    /// The block cache's file; what of the bytes that were asked for came from it and what did not; what it holds.
    var cacheFile: String?
    var cacheHitBytes: UInt64?
    var cacheMissBytes: UInt64?
    var cacheUsedBytes: UInt64?

    enum CodingKeys: String, CodingKey {
        case state, mountpoint, files, process, mode, images, size
        case bytesRead = "bytes-read"
        case bytesWritten = "bytes-written"
        case cachedBytes = "cached-bytes"
        case dirtyBytes = "dirty-bytes"
        case cacheFile = "cache-file"
        case cacheHitBytes = "cache-hit-bytes"
        case cacheMissBytes = "cache-miss-bytes"
        case cacheUsedBytes = "cache-used-bytes"
    }
}

/// `vdmount --list`.
enum MountList {
    /// All mounts, or a user's own, in the order of mounting.
    static func current() -> [MountStatus] {
        let user = geteuid()
        return MountTable.current().ours.filter { user == 0 || $0.owner == user }.map(status)
    }

    private static func status(of entry: MountEntry) -> MountStatus {
        var known = MountStatus(
            state: .unknown, mountpoint: entry.mountpoint, mode: entry.isReadOnly ? "ro" : "rw",
            images: [.init(path: entry.source, format: "")])
        let files = FileSystemMount.at(disk: entry.mountpoint).flatMap { try? $0.target() }
        known.files = files
        let owners = entry.owner.map { [$0] } ?? [geteuid()]
        guard let watch = MountWatch.find(device: entry.device, mountpoint: entry.mountpoint, owners: owners) else {
            if entry.isStale { known.state = .dead }
            return known
        }
        known.process = watch.pid
        if let text = watch.ask("status"), let status = jsonValue(MountStatus.self, from: text) {
            known = status
            // It may have been bound or moved.
            known.mountpoint = entry.mountpoint
            known.files = files
        }
        return known
    }

    static func print(asJSON: Bool) throws {
        let mounts = current()
        if asJSON { return try Swift.print(jsonText(mounts)) }
        for (index, mount) in mounts.enumerated() {
            if index > 0 { Swift.print() }
            for line in lines(mount) { Swift.print(line) }
        }
    }

    private static func lines(_ mount: MountStatus) -> [String] {
        let process = mount.process.map { "process \($0)" } ?? "no process"
        var lines = ["\(mount.mountpoint.printable()): \(mount.mode), \(process)"]
        if mount.state == .dead {
            lines[0] = "\(mount.mountpoint.printable()): dead, its daemon was killed: clear it with vdumount"
        }
        if let files = mount.files { lines.append("  files \(files.printable())") }
        for (index, image) in mount.images.enumerated() {
            let format = image.format.isEmpty ? "" : " (\(image.format.printable()))"
            lines.append("  \(index == 0 ? "image" : "below") \(image.path.printable())\(format)")
        }
        if let size = mount.size { lines.append("  size  \(humanSize(size))") }
        if let read = mount.bytesRead, let written = mount.bytesWritten {
            lines.append("  read  \(humanSize(read)), written \(humanSize(written))")
        }
        if let cached = mount.cachedBytes, let dirty = mount.dirtyBytes {
            lines.append(
                "  tables cached \(humanSize(UInt64(max(0, cached)))), "
                    + "of which \(humanSize(UInt64(max(0, dirty)))) wait to be written")
        }
        if let file = mount.cacheFile, let hits = mount.cacheHitBytes, let misses = mount.cacheMissBytes {
            lines.append("  cache \(file.printable()), holds \(humanSize(mount.cacheUsedBytes ?? 0))")
            lines.append("        \(humanSize(hits)) read from it, \(humanSize(misses)) from the images")
        }
        return lines
    }
}

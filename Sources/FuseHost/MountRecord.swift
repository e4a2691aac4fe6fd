internal import FuseShim
import Glibc

/// What a daemon leaves for others to find: who serves a mount, whether it still lives, and how it ended.
///
/// The record is a small text file, `<device>-<pid>` in `/run/vdmount` for root and in `$XDG_RUNTIME_DIR/vdmount`,
/// `/run/user/UID/vdmount` or `/tmp/vdmount-UID` for others, one `key=value` a line.
/// - While the daemon lives it holds a flock(2) on the file: a record without one is of a daemon that was killed.
///   The lock is taken before the file gets its name, so nobody sees a living record unlocked.
/// - When the daemon has closed the disk it adds `result=` (0 or 1) and `message=`, removes the name and ends, which
///   drops the lock. Who opened the file before, waits for the lock and then reads how it ended, or finds no result:
///   killed.
///
/// Nothing is polled by process number, so a number used again does no harm. The record is a help for `vdumount`: a
/// mount works without.
// Sendable: the descriptors and path do not change; the rest is used by one thread at a time.
public final class MountRecord: @unchecked Sendable {
    /// Ends the name of the control socket, which is beside the record.
    static let controlSuffix = ".control"

    private let descriptor: Int32
    private let path: String
    /// Bytes that were written to begin with.
    private let length: Int
    /// Where questions come; below 0 if the path is too long for a socket: `vdmount --list` then knows less.
    private let listening: Int32
    private var control: ControlSocket?

    /// Writes the record of this process for a mount.
    static func create(for entry: MountEntry) throws(HostError) -> MountRecord {
        let user = geteuid()
        var reason = ""
        for folder in folders(of: user) {
            if let failure = prepare(folder, user: user) {
                reason = "\(folder): \(failure)"
                continue
            }
            let path = "\(folder)/\(entry.device.split(separator: ":").joined(separator: "-"))-\(getpid())"
            let draft = path + ".new"
            let descriptor = SystemFiles.openFile(
                draft, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, mode: 0o644)
            let text = """
                pid=\(getpid())
                device=\(entry.device)
                mountpoint=\(OctalText.encode(entry.mountpoint))
                image=\(OctalText.encode(entry.source))

                """
            if descriptor >= 0, flock(descriptor, LOCK_EX | LOCK_NB) == 0, SystemFiles.writeAll(text, to: descriptor),
                unsafe rename(draft, path) == 0
            {
                let listening = unsafe fuseshim_control_listen(path + controlSuffix)
                return MountRecord(
                    descriptor: descriptor, path: path, length: text.utf8.count, listening: listening)
            }
            reason = "\(path): \(errorText(errno))"
            if descriptor >= 0 {
                close(descriptor)
                unsafe unlink(draft)
            }
        }
        throw HostError(subject: entry.mountpoint, reason: "vdumount will not wait for the close: \(reason)")
    }

    private init(descriptor: Int32, path: String, length: Int, listening: Int32) {
        self.descriptor = descriptor
        self.path = path
        self.length = length
        self.listening = listening
    }

    /// The files that ``finish(failure:keeper:)`` has removed.
    var files: [String] { [path, path + Self.controlSuffix] }

    /// Answers questions from now on.
    func serve(_ answer: @escaping ControlHandler) {
        if listening >= 0 { control = ControlSocket(listening: listening, answer: answer) }
    }

    /// Says which image the mounted disk has on top now. What is said last counts.
    func note(image: String) {
        lseek(descriptor, length, SEEK_SET)
        SystemFiles.writeAll("image=\(OctalText.encode(image))\n", to: descriptor)
        ftruncate(descriptor, lseek(descriptor, 0, SEEK_CUR))
    }

    /// Says how the daemon ended. To be called once, when the disk is closed and nothing but the end of the process is
    /// left: that releases the lock, so that who waits for it goes on when no file is open any more, and may unmount
    /// the file system that the images lie in.
    func finish(failure: String?, keeper: Keeper) {
        let message = failure.map { "message=\(OctalText.encode($0))\n" } ?? ""
        SystemFiles.writeAll("result=\(failure == nil ? 0 : 1)\n" + message, to: descriptor)
        control?.end()
        if keeper.isReady, keeper.removeFiles() { return }
        for file in files { unsafe unlink(file) }
    }

    /// Where the records of a user are.
    static func folders(of user: UInt32) -> [String] {
        if user == 0 { return ["/run/vdmount", "/tmp/vdmount-0"] }
        var folders = ["/run/user/\(user)/vdmount", "/tmp/vdmount-\(user)"]
        if user == geteuid(), let value = unsafe getenv("XDG_RUNTIME_DIR") {
            let own = unsafe String(cString: value) + "/vdmount"
            if own.hasPrefix("/") && !folders.contains(own) { folders.insert(own, at: 0) }
        }
        return folders
    }

    /// Makes the folder unless it is there, and nobody else's: the reason why not, else nil.
    private static func prepare(_ folder: String, user: UInt32) -> String? {
        if unsafe mkdir(folder, user == 0 ? 0o755 : 0o700) != 0 && errno != EEXIST { return errorText(errno) }
        return ownFolder(folder, user: user) ? nil : "belongs to somebody else or is open to others"
    }

    static func ownFolder(_ folder: String, user: UInt32) -> Bool {
        var status = stat()
        return unsafe lstat(folder, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
            && status.st_uid == user && status.st_mode & 0o022 == 0
    }
}

/// A daemon found by its record: to see who it is and to wait for its end.
// The descriptor is owned: closed once, at the end of the value's life.
public struct MountWatch: ~Copyable {
    private let descriptor: Int32
    public let pid: Int32
    public let device: String
    public let mountpoint: String
    public let image: String
    /// When the record was written, in nanoseconds.
    private let written: Int
    /// Whose the record is.
    private let owner: UInt32
    private let path: String

    deinit { close(descriptor) }

    /// How a daemon ended.
    public enum End: Sendable, Equatable {
        case clean
        case failed(String)
        /// It was killed or crashed before it had closed the disk.
        case killed
    }

    /// The living daemon of a mount, or (with no device known) the one that served a mountpoint and is closing.
    /// Records of killed daemons that are met on the way are removed.
    ///
    /// The record of the same device at the same place is the mount's. Without one, the mount was bound or moved
    /// elsewhere: then the newest of the device counts, since a device's number is used again once its mount is gone,
    /// which may be while its daemon still closes.
    public static func find(device: String?, mountpoint: String, owners: [UInt32]) -> MountWatch? {
        if let device, let exact = search(owners, { $0.device == device && $0.mountpoint == mountpoint }) {
            return exact
        }
        return search(owners) { device == nil ? $0.mountpoint == mountpoint : $0.device == device }
    }

    /// The newest record that fits.
    private static func search(_ owners: [UInt32], _ fits: (borrowing MountWatch) -> Bool) -> MountWatch? {
        var newest: MountWatch?
        var latest = Int.min
        for owner in owners {
            for folder in MountRecord.folders(of: owner) where MountRecord.ownFolder(folder, user: owner) {
                for name in SystemFiles.names(in: folder) where !name.contains(".") {
                    guard let watch = MountWatch(path: "\(folder)/\(name)") else { continue }
                    guard fits(watch), watch.written > latest else { continue }
                    latest = watch.written
                    newest = consume watch
                }
            }
        }
        return newest
    }

    private init?(path: String) {
        let descriptor = SystemFiles.openFile(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)
        guard descriptor >= 0 else { return nil }
        if flock(descriptor, LOCK_SH | LOCK_NB) == 0 {
            // Its daemon is dead, or has just finished and removed the name itself.
            unsafe unlink(path)
            unsafe unlink(path + MountRecord.controlSuffix)
            close(descriptor)
            return nil
        }
        let values = MountWatch.values(descriptor)
        guard let pid = Int32(values["pid"] ?? ""), let device = values["device"],
            let mountpoint = values["mountpoint"]
        else {
            close(descriptor)
            return nil
        }
        self.descriptor = descriptor
        self.pid = pid
        self.device = device
        self.mountpoint = mountpoint
        image = values["image"] ?? ""
        self.path = path
        var status = stat()
        unsafe fstat(descriptor, &status)
        owner = status.st_uid
        written = status.st_mtim.tv_sec &* 1_000_000_000 &+ status.st_mtim.tv_nsec
    }

    private static func values(_ descriptor: Int32) -> [String: String] {
        var values: [String: String] = [:]
        lseek(descriptor, 0, SEEK_SET)
        for line in (SystemFiles.contents(of: descriptor, limit: 65536) ?? []).split(separator: 0x0A) {
            guard let equals = line.firstIndex(of: UInt8(ascii: "=")) else { continue }
            values[String(decoding: line[..<equals], as: UTF8.self)] = OctalText.decode(
                line[line.index(after: equals)...])
        }
        return values
    }

    /// Asks the daemon a question; nil if it does not answer, or not this user.
    public func ask(_ question: String) -> String? {
        guard case .text(let answer) = ControlSocket.ask(question, at: path + MountRecord.controlSuffix, of: owner)
        else { return nil }
        return answer
    }

    /// Where it can be reached.
    private var address: DaemonAddress {
        DaemonAddress(
            pid: pid, mountpoint: mountpoint, image: image, owner: owner, socket: path + MountRecord.controlSuffix)
    }

    /// All living daemons of these users. Records of killed daemons that are met on the way are removed.
    public static func daemons(of owners: [UInt32]) -> [DaemonAddress] {
        var found: [DaemonAddress] = []
        for owner in owners {
            for folder in MountRecord.folders(of: owner) where MountRecord.ownFolder(folder, user: owner) {
                for name in SystemFiles.names(in: folder).sorted() where !name.contains(".") {
                    guard let watch = MountWatch(path: "\(folder)/\(name)"), watch.owner == owner else { continue }
                    found.append(watch.address)
                }
            }
        }
        return found
    }

    /// Waits until the daemon has closed the disk or is dead.
    ///
    /// - Parameter patience: called once, when it takes longer than three seconds.
    public func wait(patience: () -> Void) -> End {
        var waited = 0
        while flock(descriptor, LOCK_SH | LOCK_NB) != 0 {
            SystemFiles.sleep(milliseconds: 5)
            waited += 5
            if waited == 3000 { patience() }
        }
        let values = MountWatch.values(descriptor)
        switch values["result"] {
        case "0": return .clean
        case nil: return .killed
        default: return .failed(values["message"] ?? "unknown failure")
        }
    }
}

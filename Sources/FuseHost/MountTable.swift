internal import FuseShim
import Glibc

/// One line of /proc/self/mountinfo.
public struct MountEntry: Sendable, Equatable {
    /// Numbers of this mount and of the one it is mounted on.
    public let identifier: Int
    public let parent: Int
    /// The file system's device number, such as "0:52"; no two mounted file systems share one.
    public let device: String
    public let mountpoint: String
    /// Such as "fuse.vdmount".
    public let fileSystem: String
    /// What is mounted; for our mounts the image.
    public let source: String
    public let isReadOnly: Bool
    /// Who mounted it, for FUSE mounts.
    public let owner: UInt32?

    /// Parses a line, see proc_pid_mountinfo(5).
    init?(line: ArraySlice<UInt8>) {
        let fields = line.split(separator: UInt8(ascii: " "))
        guard let dash = fields.dropFirst(6).firstIndex(where: { $0.elementsEqual("-".utf8) }),
            fields.count > dash + 3,
            let identifier = Int(String(decoding: fields[0], as: UTF8.self)),
            let parent = Int(String(decoding: fields[1], as: UTF8.self))
        else { return nil }
        self.identifier = identifier
        self.parent = parent
        device = String(decoding: fields[2], as: UTF8.self)
        mountpoint = OctalText.decode(fields[4])
        fileSystem = OctalText.decode(fields[dash + 1])
        source = OctalText.decode(fields[dash + 2])
        let options = fields[5].split(separator: UInt8(ascii: ","))
        let superOptions = fields[dash + 3].split(separator: UInt8(ascii: ","))
        isReadOnly = (options + superOptions).contains { $0.elementsEqual("ro".utf8) }
        let prefix = "user_id="
        owner = superOptions.lazy.map { String(decoding: $0, as: UTF8.self) }.first { $0.hasPrefix(prefix) }
            .flatMap { UInt32($0.dropFirst(prefix.count)) }
    }

    public var isOurs: Bool { fileSystem == MountTable.fileSystem }

    /// Whether the daemon behind this mount is gone: every access then fails with ENOTCONN. Asks the daemon if it is
    /// alive, and waits for its answer.
    public var isStale: Bool {
        let failure = SystemFiles.reach(mountpoint)
        return failure == ENOTCONN || failure == ECONNABORTED
    }

    /// Takes the mount away at once, also from under its users.
    func detach() throws(HostError) { try Unmount.now(mountpoint, lazy: true) }
}

/// What is mounted, in the order of mounting.
public struct MountTable: Sendable {
    /// The file system type that our mounts show.
    public static let fileSystem = "fuse.vdmount"

    public let entries: [MountEntry]

    public static func current() -> MountTable {
        MountTable(parsing: SystemFiles.contents("/proc/self/mountinfo") ?? [])
    }

    init(parsing text: [UInt8]) {
        entries = text.split(separator: 0x0A).compactMap { MountEntry(line: $0) }
    }

    /// Our mounts.
    public var ours: [MountEntry] { entries.filter(\.isOurs) }

    /// What an access to a path that is a mountpoint reaches: the last mount at it.
    public func top(at path: String) -> MountEntry? { entries.last { $0.mountpoint == path } }

    func entry(device: String) -> MountEntry? { entries.last { $0.device == device } }

    /// Mounts on top of or below a mountpoint.
    func below(_ entry: MountEntry) -> [MountEntry] {
        entries.filter {
            $0.identifier != entry.identifier
                && ($0.parent == entry.identifier || isPath($0.mountpoint, below: entry.mountpoint))
        }
    }
}

/// Whether a path lies in a folder.
func isPath(_ path: String, below folder: String) -> Bool {
    path.hasPrefix(folder == "/" ? folder : folder + "/")
}

/// The system calls that unmount.
enum Unmount {
    /// - Parameter lazy: detach the mount from the tree now, end it when its last user is gone.
    static func now(_ mountpoint: String, lazy: Bool) throws(HostError) {
        if let failure = attempt(mountpoint, lazy: lazy) {
            throw HostError(subject: mountpoint, reason: "cannot unmount: \(failure.text)")
        }
    }

    struct Failure {
        let isBusy: Bool
        let text: String
    }

    static func attempt(_ mountpoint: String, lazy: Bool) -> Failure? {
        if geteuid() == 0 {
            // UMOUNT_NOFOLLOW is 8, MNT_DETACH is 2: linux/mount.h.
            if unsafe umount2(mountpoint, lazy ? 8 | 2 : 8) == 0 { return nil }
            return Failure(isBusy: errno == EBUSY, text: errorText(errno))
        }
        var arguments = ["fusermount3", "-u", "-q", "--", mountpoint]
        if lazy { arguments.insert("-z", at: 2) }
        let (status, said) = Program.run(lazy ? arguments : arguments.filter { $0 != "-q" })
        if status == 0 { return nil }
        let text = said.isEmpty ? "fusermount3 failed; is the package fuse3 installed?" : said
        return Failure(isBusy: said.contains("busy"), text: text)
    }
}

/// Other programs.
public enum Program {
    /// Runs a program to its end: its exit status (-1 if it did not exit) and what it wrote to standard error.
    public static func run(_ arguments: [String]) -> (status: Int32, errors: String) {
        var output = [CChar](repeating: 0, count: 1024)
        let status = unsafe withCStrings(arguments) { list in
            unsafe output.withUnsafeMutableBufferPointer { text in
                unsafe fuseshim_run(list.baseAddress, text.baseAddress, text.count)
            }
        }
        let lines = text(from: output).split(separator: "\n").map { line in
            let words = line.drop { $0 == " " || $0 == "\t" }
            return words.last == "." ? words.dropLast() : words
        }
        return (status, lines.joined(separator: "; "))
    }
}

internal import FuseShim
import Glibc

/// The process beside a daemon that does what the daemon cannot do itself once it is confined: unmount, say who uses
/// the mount, remove the names of its record and socket. It opens no image and reads nothing that comes from one.
///
/// It is told once which mount it is for; after that a daemon that somebody else has taken over can have nothing done
/// but to that mount. It ends when the daemon does.
// Sendable: used by one thread at a time.
public final class Keeper: @unchecked Sendable {
    /// The most bytes of a message: some paths.
    private static let messageLimit = 32 << 10

    /// What the first byte of a message asks for.
    private enum Request: UInt8 {
        /// This is the mount: its device, its place, the files to remove.
        case mount = 0x4D
        /// Whether the mount answers; widens its read-ahead if it does.
        case reach = 0x52
        case unmount = 0x55
        /// Unmounts now what is still in use, and ends it when its last user is gone.
        case detach = 0x44
        /// Removes the files.
        case finish = 0x46
    }

    /// How an attempt to unmount ended.
    enum Answer: Equatable {
        case unmounted
        /// Nothing is mounted there any more.
        case gone
        /// In use; by whom, for the log.
        case busy(String)
        case failed(String)
    }

    private let socket: Int32
    private let process: Int32
    /// Whether it was told which mount it is for.
    private(set) var isReady = false

    private init(socket: Int32, process: Int32) {
        self.socket = socket
        self.process = process
    }

    /// Starts the process. Only before the first thread.
    static func start() throws(HostError) -> Keeper {
        var end: Int32 = -1
        let result = unsafe fuseshim_start_keeper(&end)
        if result == 0 { KeeperProcess(socket: end).run() }
        guard result > 0 else { throw HostError(subject: "vdmount", action: "cannot start", errno: -result) }
        return Keeper(socket: end, process: result)
    }

    // MARK: - The daemon's side

    /// Says which mount it is for, and the files to remove at the end.
    func take(_ entry: MountEntry, files: [String]) {
        isReady = ask(.mount, [entry.device, entry.mountpoint] + files) != nil
    }

    /// The errno value of asking the mount something that its daemon must answer.
    func reach() -> Int32 { ask(.reach, []).flatMap { Int32($0) } ?? EIO }

    func unmount(lazy: Bool) -> Answer {
        guard let answer = ask(lazy ? .detach : .unmount, []) else {
            return .failed("the process beside this one, which would do it, is gone; 'vdumount' can")
        }
        let text = String(answer.dropFirst())
        switch answer.first {
        case "u": return .unmounted
        case "g": return .gone
        case "b": return .busy(text)
        default: return .failed(text)
        }
    }

    /// Removes the files; whether it could be asked to.
    func removeFiles() -> Bool { ask(.finish, []) != nil }

    /// Ends it and waits for that.
    func end() {
        close(socket)
        while waitpid(process, nil, 0) < 0 && errno == EINTR {}
    }

    private func ask(_ request: Request, _ words: [String]) -> String? {
        guard Self.send(String(UnicodeScalar(request.rawValue)) + words.joined(separator: "\0"), to: socket) else {
            return nil
        }
        return Self.receive(from: socket)
    }

    fileprivate static func send(_ text: String, to socket: Int32) -> Bool {
        let bytes = Array(text.utf8)
        guard bytes.count <= messageLimit else { return false }
        return unsafe bytes.withUnsafeBytes { unsafe fuseshim_send(socket, $0.baseAddress, $0.count) }
    }

    /// The next message; nil when the other side is gone.
    fileprivate static func receive(from socket: Int32) -> String? {
        // Messages are never empty: one byte is left for an answer without words.
        guard let bytes = SystemFiles.message(from: socket, limit: messageLimit), !bytes.isEmpty else { return nil }
        return String(decoding: bytes, as: UTF8.self)
    }

    // MARK: - The other side

    /// What runs in the other process.
    private struct KeeperProcess {
        let socket: Int32
        private var device = ""
        private var place = ""
        private var files: [String] = []

        init(socket: Int32) { self.socket = socket }

        /// Answers until the daemon is gone.
        consuming func run() -> Never {
            var state = self
            while let message = Keeper.receive(from: state.socket) {
                guard let request = message.utf8.first.flatMap({ Request(rawValue: $0) }) else { break }
                let words = message.dropFirst().split(separator: "\0", omittingEmptySubsequences: false)
                guard Keeper.send(state.answer(request, words.map(String.init)), to: state.socket) else { break }
            }
            _exit(0)
        }

        private mutating func answer(_ request: Request, _ words: [String]) -> String {
            switch request {
            case .mount:
                // Once.
                guard device.isEmpty, words.count >= 2 else { return "f" }
                (device, place, files) = (words[0], words[1], Array(words[2...]))
                return "."
            case .reach: return String(reach())
            case .unmount: return unmount(lazy: false)
            case .detach: return unmount(lazy: true)
            case .finish:
                for file in files { unsafe unlink(file) }
                return "."
            }
        }

        private func reach() -> Int32 {
            let failure = SystemFiles.reach(place)
            // Root may let buffered reads ask for as much as direct ones; 128 KiB otherwise.
            if failure == 0, geteuid() == 0 { SystemFiles.write("1024", to: "/sys/class/bdi/\(device)/read_ahead_kb") }
            return failure
        }

        /// The mount may have been moved; a device's number is its own as long as its daemon lives.
        private func unmount(lazy: Bool) -> String {
            let table = MountTable.current()
            guard let entry = table.entry(device: device), entry.isOurs else { return "g" }
            guard let failure = Unmount.attempt(entry.mountpoint, lazy: lazy) else { return "u" }
            return failure.isBusy ? "b" + MountUsers.busyReason(of: entry, in: table) : "f" + failure.text
        }
    }
}

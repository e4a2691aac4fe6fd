public import DiskStorage
internal import Glibc

/// A process that reaches servers for this one, which need have nothing to do with a network then: it reads and writes
/// by sockets to that process alone.
///
/// The other process runs the same program, which must begin by asking ``isMeant(by:)`` and then calls
/// ``serve(_:confine:)``. It gets addresses and options over a socket, so that no secret is in a command line, and ends
/// when this process does. Each request has a socket for itself, on which it is asked and answered.
public final class StorageProcess: StorageProvider {
    static let word = "--storage-process"
    static let mostChannels = 64
    /// The other side's first descriptor.
    static let firstChannel: Int32 = 3

    private struct Channels {
        var free: [Int32]
        /// All of them, until the end.
        var all: [Int32]
    }

    private let channels: Monitor<Channels>
    /// Nil: whoever answers is none of this process's children.
    private let process: pid_t?
    private let rules: AddressRules

    /// Starts it. The options are checked before.
    ///
    /// - Parameters:
    ///   - options: What ``StorageSettings/init(_:)`` takes.
    ///   - allowedAddresses: Addresses that images may name.
    ///   - channels: How many requests can be on their way at the same time.
    public static func start(
        options: [String], allowedAddresses: [String], channels: Int
    ) throws(DiskError) -> StorageProcess {
        _ = try StorageSettings(options)
        return try StorageProcess(options, AddressRules(allowedAddresses), min(max(channels, 1), mostChannels))
    }

    private init(_ options: [String], _ rules: AddressRules, _ count: Int) throws(DiskError) {
        self.rules = rules
        var own: [Int32] = []
        var other: [Int32] = []
        defer { for end in other { close(end) } }
        for _ in 0..<count {
            var ends: [Int32] = [-1, -1]
            guard unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0 else {
                for end in own { close(end) }
                throw .system(errno, "make a pair of sockets")
            }
            own.append(ends[0])
            // Out of the way of the numbers that they get in the other process.
            let moved = fcntl(ends[1], F_DUPFD_CLOEXEC, Self.firstChannel + Int32(Self.mostChannels))
            close(ends[1])
            other.append(moved)
        }
        do throws(DiskError) {
            process = try Self.spawn(other)
        } catch {
            for end in own { close(end) }
            throw error
        }
        for end in other { close(end) }
        other = []
        channels = Monitor(Channels(free: own.reversed(), all: own))
        do throws(DiskError) {
            try configure(options, own)
        } catch {
            end()
            throw error
        }
    }

    /// One that is there already, and answers on these sockets.
    init(answeringOn sockets: [Int32]) throws(DiskError) {
        rules = try AddressRules([])
        process = nil
        channels = Monitor(Channels(free: sockets.reversed(), all: sockets))
    }

    deinit { end() }

    private static func spawn(_ sockets: [Int32]) throws(DiskError) -> pid_t {
        var actions = unsafe posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        for descriptor: Int32 in 0...2 {
            unsafe posix_spawn_file_actions_addopen(&actions, descriptor, "/dev/null", O_RDWR, 0)
        }
        for (number, socket) in sockets.enumerated() {
            unsafe posix_spawn_file_actions_adddup2(&actions, socket, firstChannel + Int32(number))
        }
        var attributes = posix_spawnattr_t()
        unsafe posix_spawnattr_init(&attributes)
        defer { unsafe posix_spawnattr_destroy(&attributes) }
        // What ends this process is not meant for that one: it ends when this one has ended.
        var blocked = sigset_t()
        unsafe sigemptyset(&blocked)
        for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] { unsafe sigaddset(&blocked, signal) }
        unsafe posix_spawnattr_setsigmask(&attributes, &blocked)
        // POSIX_SPAWN_SETSIGMASK, and a session of its own: POSIX_SPAWN_SETSID.
        unsafe posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK) | 0x80)
        let words = ["vdmount", word, String(sockets.count)]
        var arguments = unsafe words.map { unsafe strdup($0) } + [nil]
        defer { for index in unsafe arguments.indices { unsafe free(arguments[index]) } }
        var pid: pid_t = 0
        let result = unsafe posix_spawn(&pid, "/proc/self/exe", &actions, &attributes, &arguments, environ)
        guard result == 0 else { throw .system(result, "start the process that reaches servers") }
        return pid
    }

    private func configure(_ options: [String], _ sockets: [Int32]) throws(DiskError) {
        let bytes = StorageMessage.bytes(options)
        _ = try ask(StorageMessage(.configure), bytes)
        // Then each of its threads says that it is there.
        for socket in sockets {
            var place = pollfd(fd: socket, events: Int16(POLLIN), revents: 0)
            guard unsafe poll(&place, 1, 20_000) > 0, StorageMessage(from: socket) != nil else { throw Self.isGone }
        }
    }

    static let isGone = DiskError(
        .system, "the process that reaches the server has ended: unmount, and mount again", errno: EIO)

    /// From now on nothing more can be opened, whoever asks.
    public func seal() throws(DiskError) { _ = try ask(StorageMessage(.seal), []) }

    /// Ends it, with all its connections, and waits for that, some seconds at most.
    public func end() {
        let open = channels.withLock { channels in
            defer { channels = Channels(free: [], all: []) }
            return channels.all
        }
        guard !open.isEmpty else { return }
        for socket in open { shutdown(socket, Int32(SHUT_WR)) }
        // When it ends it closes them; what it did not answer is read and forgotten.
        var bytes = [UInt8](repeating: 0, count: 4096)
        var place = pollfd(fd: open[0], events: Int16(POLLIN), revents: 0)
        while unsafe poll(&place, 1, 8000) > 0, unsafe recv(open[0], &bytes, bytes.count, 0) > 0 {}
        for socket in open { close(socket) }
        guard let process else { return }
        for _ in 0..<50 where waitpid(process, nil, WNOHANG) == 0 { usleep(10_000) }
    }

    // MARK: - Asking

    /// Asks, and answers the header and bytes of the answer.
    func ask(_ message: StorageMessage, _ bytes: [UInt8]) throws(DiskError) -> (StorageMessage, [UInt8]) {
        var result: (StorageMessage, [UInt8])?
        try bytes.withIOBytes { (bytes) throws(DiskError) in
            try exchange(message, bytes) { (answer, socket) throws(DiskError) in
                guard let bytes = answer.bytes(from: socket) else { throw Self.isGone }
                result = (answer, bytes)
            }
        }
        guard let result else { throw Self.isGone }
        return result
    }

    /// Sends a question, waits for the answer's header, and has `body` take its bytes. Errors of the other side are
    /// thrown here.
    func exchange(
        _ message: StorageMessage, _ bytes: IOBytes, _ body: (StorageMessage, Int32) throws(DiskError) -> Void
    ) throws(DiskError) {
        let socket = try take()
        var message = message
        message.byteCount = bytes.count
        guard message.send(bytes, to: socket), let answer = StorageMessage(from: socket) else { throw drop() }
        if answer.code != 0 {
            guard let bytes = answer.bytes(from: socket) else { throw drop() }
            putBack(socket)
            throw StorageMessage.error(bytes)
        }
        do throws(DiskError) {
            try body(answer, socket)
        } catch {
            // The answer was not taken as a whole: what comes next there has no meaning.
            throw drop()
        }
        putBack(socket)
    }

    private func take() throws(DiskError) -> Int32 {
        try channels.withLock { (channels) throws(DiskError) in
            while true {
                guard !channels.all.isEmpty else { throw Self.isGone }
                if let socket = channels.free.popLast() { return socket }
                self.channels.wait()
            }
        }
    }

    private func putBack(_ socket: Int32) {
        channels.withLock { channels in
            if channels.all.contains(socket) { channels.free.append(socket) }
            self.channels.changed()
        }
    }

    /// The other side is gone: nobody waits for it any more. The sockets stay open, since others may be using them.
    private func drop() -> DiskError {
        channels.withLock { channels in
            for socket in channels.all { shutdown(socket, Int32(SHUT_RDWR)) }
            channels = Channels(free: [], all: [])
            self.channels.changed()
        }
        return Self.isGone
    }

    // MARK: - StorageProvider

    public func recognizes(_ name: String) -> Bool { AddressRules.recognizes(name) }
    public func shownName(_ address: String) -> String { AddressRules.shownName(address) }

    public func address(of name: String, namedBy base: String) -> String? {
        AddressRules.address(of: name, namedBy: base)
    }

    public func permits(_ address: String) -> Bool { rules.permits(address) }

    public func open(_ address: String, isWritable: Bool) throws(DiskError) -> ProvidedStorage {
        var message = StorageMessage(.open)
        message.flag = isWritable
        let words = StorageMessage.words(try ask(message, Array(address.utf8.prefix(StorageAddress.limit + 1))).1)
        guard words.count == 7, let number = UInt32(words[0]), let length = UInt64(words[1]),
            length <= UInt64(Int64.max)
        else { throw Self.isGone }
        let traits = StorageTraits(
            isWritable: words[2] == "w", canDiscard: words[3] == "d", hasFixedLength: words[4] == "f")
        let storage = RemoteStorage(self, number: number, name: words[5].printable(), length: length, traits)
        return ProvidedStorage(storage, version: words[6].isEmpty ? nil : words[6])
    }
}

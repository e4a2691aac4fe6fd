internal import FuseShim
import Glibc

/// A mount from its beginning to its clean end.
///
/// 1. `init` makes it, `mount(at:)` mounts it and returns when it is served.
/// 2. `serve` returns when the mount is gone and the disk closed, or when it was told to end.
///
/// Signals: `mount(at:)` blocks SIGINT, SIGTERM and SIGHUP in the calling thread (Dispatch does so in its own), and
/// `serve` takes them from a signalfd. The first one unmounts; if the mount is in use, what is written so far is
/// flushed, the mount leaves the tree and is served until its last user is gone. The second one ends at once: the
/// lanes end, the disk is closed cleanly, and who still uses the mount gets errors.
// Sendable: used by one thread at a time; the lanes only use the session and the tree.
@safe public final class MountSession: @unchecked Sendable {
    /// The most bytes of one read or write.
    public static let maximumTransfer = Int(FUSESHIM_MAX_TRANSFER)

    private let tree: FileTree
    private let options: MountOptions
    private var session: OpaquePointer?
    private var lanes: LanePool?
    private var entry: MountEntry?
    private var record: MountRecord?
    private let ended: Int32
    private var signals: Int32 = -1

    /// - Parameter files: in a folder their order is that of the listing; the first is the disk, whose size and
    ///   allocation statfs(2) shows. With shape `.file` there must be exactly one.
    public init(files: [ExposedFile], shape: MountShape, options: MountOptions) throws(HostError) {
        precondition(!files.isEmpty, "a mount shows at least one file")
        tree = FileTree(files: files, shape: shape)
        self.options = options
        unsafe session = nil
        ended = fuseshim_event_descriptor()
        if ended < 0 { throw HostError(subject: options.source, action: "cannot mount", errno: errno) }
    }

    deinit {
        unsafe fuseshim_session_destroy(session)
        close(ended)
        if signals >= 0 { close(signals) }
    }

    /// Makes these the files of the folder; the first stays the disk. Who has another one open may go on.
    public func list(_ files: [ExposedFile]) { tree.list(files) }

    /// Where it is mounted now; nil before and after.
    public var mountpoint: String? { entry?.mountpoint }

    // MARK: Mounting

    /// Mounts and returns when reads are served: warnings for the user. Nothing is mounted if it throws.
    ///
    /// - Parameter answer: what the control socket answers to a question; nil: it is not understood.
    public func mount(
        at place: Mountpoint, answer: @escaping @Sendable (String) -> String? = { _ in nil }
    ) throws(HostError) -> [String] {
        try place.alone { () throws(HostError) in try mountAlone(at: place, answer) }
    }

    private func mountAlone(
        at place: Mountpoint, _ answer: @escaping @Sendable (String) -> String?
    ) throws(HostError) -> [String] {
        var warnings: [String] = []
        // From here on a signal waits for `serve`: it would leave a mount without a daemon.
        signals = fuseshim_signal_descriptor()
        try openSession(at: place, &warnings)
        guard let session = unsafe session else { return [] }
        let lanes = unsafe LanePool(
            session: session, maximum: options.maximumLanes, kept: options.keptLanes, ended: ended)
        self.lanes = lanes
        lanes.start(2)
        // The lanes answer this; it is the proof that the mount works.
        let failure = SystemFiles.reach(place.path)
        let entry = MountTable.current().top(at: place.path)
        guard failure == 0, let entry, entry.isOurs else {
            _ = Unmount.attempt(place.path, lazy: true)
            endLanes()
            destroy()
            throw HostError(subject: place.path, action: "the mount does not answer", errno: failure)
        }
        self.entry = entry
        // Root may let buffered reads ask for as much as direct ones; 128 KiB otherwise.
        if geteuid() == 0 { SystemFiles.write("1024", to: "/sys/class/bdi/\(entry.device)/read_ahead_kb") }
        do throws(HostError) { record = try MountRecord.create(for: entry, answer: answer) } catch {
            warnings.append(error.description)
        }
        return warnings
    }

    private func openSession(at place: Mountpoint, _ warnings: inout [String]) throws(HostError) {
        var reason = ""
        if options.allowsOthers && MountOptions.systemAllowsOthers {
            reason = attempt(place, allowsOthers: true)
            if reason.isEmpty { return }
            if geteuid() == 0 { throw HostError(subject: place.path, reason: "cannot mount: \(reason)") }
        }
        reason = attempt(place, allowsOthers: false)
        guard reason.isEmpty else { throw HostError(subject: place.path, reason: "cannot mount: \(reason)") }
        if options.allowsOthers {
            warnings.append(
                "\(place.path): only you can use it, root and loop devices cannot: "
                    + "add the line 'user_allow_other' to /etc/fuse.conf")
        }
    }

    /// Tries to mount: an empty text, or what is wrong.
    private func attempt(_ place: Mountpoint, allowsOthers: Bool) -> String {
        let list = options.list(allowsOthers: allowsOthers)
        var message = [CChar](repeating: 0, count: 512)
        var operations = fileOperations()
        // The tree lives as long as this session, which ends after its lanes.
        let host = unsafe Unmanaged.passUnretained(tree).toOpaque()
        let made = unsafe withCStrings(list) { options in
            unsafe message.withUnsafeMutableBufferPointer { text -> OpaquePointer? in
                let made = unsafe fuseshim_session_new(
                    &operations, host, options.baseAddress, list.count, text.baseAddress, text.count)
                guard let made = unsafe made else { return nil }
                if unsafe fuseshim_session_mount(made, place.path, text.baseAddress, text.count) == 0 {
                    return unsafe made
                }
                unsafe fuseshim_session_destroy(made)
                return nil
            }
        }
        if let made = unsafe made {
            unsafe session = unsafe made
            return ""
        }
        let said = text(from: message)
        return said.isEmpty ? "unknown reason" : said
    }

    // MARK: Serving

    /// What the owner of the disk does for the session. Each returns nil, or a text that says what failed.
    public struct Handler {
        /// Makes durable what was written so far; others still read and write.
        public var flush: () -> String?
        /// Flushes and closes the disk. Called once, when no lane runs any more.
        public var close: () -> String?
        /// Takes a line for the log.
        public var log: (String) -> Void

        public init(
            flush: @escaping () -> String?, close: @escaping () -> String?, log: @escaping (String) -> Void = { _ in }
        ) {
            self.flush = flush
            self.close = close
            self.log = log
        }
    }

    /// Serves until the mount is gone, closes the disk and tells a waiting `vdumount`: nil, or what failed.
    public func serve(_ handler: Handler) -> String? {
        var asked = 0
        while true {
            let event = fuseshim_wait(signals, ended, -1)
            if event == 0 { break }
            asked += 1
            if asked == 1 && event > 0 {
                stop(handler)
            } else {
                endLanes()
                break
            }
        }
        let cut = lanes?.endFailure ?? 0
        let failure = handler.close() ?? (cut == 0 ? nil : "the mount failed: \(errorText(cut))")
        destroy()
        record?.finish(failure: failure)
        record = nil
        entry = nil
        return failure
    }

    /// Unmounts and waits for the lanes, without a record or a handler: for the caller that cannot go on after
    /// ``mount(at:)``. The disk is the caller's to close.
    public func cancel() {
        guard let entry else { return }
        _ = Unmount.attempt(entry.mountpoint, lazy: true)
        endLanes()
        destroy()
        record?.finish(failure: nil)
        record = nil
        self.entry = nil
    }

    private func stop(_ handler: Handler) {
        guard let entry = entry.flatMap({ MountTable.current().entry(device: $0.device) }) else {
            handler.log("asked to end; the mount is gone, but still in use")
            return
        }
        guard let failure = Unmount.attempt(entry.mountpoint, lazy: false) else { return }
        let table = MountTable.current()
        let reason = failure.isBusy ? MountUsers.busyReason(of: entry, in: table) : failure.text
        handler.log("\(entry.mountpoint): \(reason); serving until the last user is gone, a second signal ends at once")
        if let failed = handler.flush() { handler.log("\(entry.mountpoint): flush: \(failed)") }
        if let failed = Unmount.attempt(entry.mountpoint, lazy: true) {
            handler.log("\(entry.mountpoint): cannot unmount: \(failed.text)")
        }
    }

    /// Makes the lanes end though the mount may still have users, and waits for that.
    private func endLanes() {
        repeat {
            unsafe fuseshim_lanes_interrupt(session)
        } while fuseshim_wait(-1, ended, 10) != 0
    }

    /// Closes the connection to the kernel: whoever still uses the mount gets ENOTCONN. Only without lanes.
    private func destroy() {
        unsafe fuseshim_session_destroy(session)
        unsafe session = nil
    }
}

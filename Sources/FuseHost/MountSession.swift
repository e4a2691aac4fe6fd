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
    private let keeper: Keeper
    private var session: OpaquePointer?
    private var lanes: LanePool?
    private var entry: MountEntry?
    private var record: MountRecord?
    private let ended: Int32
    private var signals: Int32 = -1

    /// - Parameter files: in a folder their order is that of the listing; the first is the disk, whose size and
    ///   allocation statfs(2) shows. With shape `.file` there must be exactly one.
    /// - Parameter keeper: the process that unmounts.
    public init(
        files: [ExposedFile], shape: MountShape, options: MountOptions, keeper: Keeper
    ) throws(HostError) {
        precondition(!files.isEmpty, "a mount shows at least one file")
        tree = FileTree(files: files, shape: shape)
        self.options = options
        self.keeper = keeper
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

    /// Says in the record which image is on top now; between ``mount(at:confine:answer:)`` and the end.
    public func note(image: String) { record?.note(image: image) }

    /// Where it is mounted now; nil before and after.
    public var mountpoint: String? { entry?.mountpoint }

    // MARK: Mounting

    /// Mounts and returns when reads are served: warnings for the user. Nothing is mounted if it throws.
    ///
    /// - Parameters:
    ///   - confine: called when all is opened and nothing served yet; answers warnings for the user.
    ///   - answer: what the control socket answers to a line.
    public func mount(
        at place: Mountpoint, confine: () throws(HostError) -> [String] = { () throws(HostError) in [] },
        answer: @escaping ControlHandler = { _, _ in .unknown }
    ) throws(HostError) -> [String] {
        try place.alone { () throws(HostError) in try mountAlone(at: place, confine, answer) }
    }

    private func mountAlone(
        at place: Mountpoint, _ confine: () throws(HostError) -> [String],
        _ answer: @escaping ControlHandler
    ) throws(HostError) -> [String] {
        var warnings: [String] = []
        // From here on a signal waits for `serve`: it would leave a mount without a daemon.
        signals = fuseshim_signal_descriptor()
        try openSession(at: place, &warnings)
        guard let session = unsafe session else { return [] }
        guard let entry = MountTable.current().top(at: place.path), entry.isOurs else {
            _ = Unmount.attempt(place.path, lazy: true)
            destroy()
            throw HostError(subject: place.path, reason: "the mount does not show in /proc/self/mountinfo")
        }
        do throws(HostError) { record = try MountRecord.create(for: entry) } catch {
            warnings.append(error.description)
        }
        keeper.take(entry, files: record?.files ?? [])
        do throws(HostError) { warnings += try confine() } catch {
            giveUp(failure: "\(error)")
            throw error
        }
        let lanes = unsafe LanePool(
            session: session, maximum: options.maximumLanes, kept: options.keptLanes, ended: ended)
        self.lanes = lanes
        lanes.start(2)
        // The lanes answer this; it is the proof that the mount works.
        let failure = keeper.reach()
        guard failure == 0 else {
            giveUp(failure: "the mount does not answer")
            throw HostError(subject: place.path, action: "the mount does not answer", errno: failure)
        }
        self.entry = entry
        record?.serve(answer)
        return warnings
    }

    /// Takes back what was mounted.
    private func giveUp(failure: String?) {
        _ = keeper.unmount(lazy: true)
        if lanes != nil { endLanes() }
        destroy()
        record?.finish(failure: failure, keeper: keeper)
        record = nil
        entry = nil
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
        /// Called every few seconds.
        public var regularly: () -> Void
        /// Takes a line for the log.
        public var log: (String) -> Void

        public init(
            flush: @escaping () -> String?, close: @escaping () -> String?, regularly: @escaping () -> Void = {},
            log: @escaping (String) -> Void = { _ in }
        ) {
            self.flush = flush
            self.close = close
            self.regularly = regularly
            self.log = log
        }
    }

    /// How long ``Handler/regularly`` waits, in milliseconds.
    private static let interval: Int32 = 5000

    /// Serves until the mount is gone, closes the disk and tells a waiting `vdumount`: nil, or what failed.
    public func serve(_ handler: Handler) -> String? {
        var asked = 0
        while true {
            let event = fuseshim_wait(signals, ended, Self.interval)
            if event == 0 { break }
            if event == -ETIMEDOUT {
                handler.regularly()
                continue
            }
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
        record?.finish(failure: failure, keeper: keeper)
        record = nil
        entry = nil
        return failure
    }

    /// Unmounts and waits for the lanes, without a record or a handler: for the caller that cannot go on after
    /// ``mount(at:)``. The disk is the caller's to close.
    public func cancel() {
        if entry != nil { giveUp(failure: nil) }
    }

    private func stop(_ handler: Handler) {
        guard let entry else { return }
        let reason: String
        switch keeper.unmount(lazy: false) {
        case .unmounted: return
        case .gone:
            handler.log("asked to end; the mount is gone, but still in use")
            return
        case .busy(let users): reason = users
        case .failed(let text): reason = text
        }
        handler.log("\(entry.mountpoint): \(reason); serving until the last user is gone, a second signal ends at once")
        if let failed = handler.flush() { handler.log("\(entry.mountpoint): flush: \(failed)") }
        if case .failed(let text) = keeper.unmount(lazy: true) {
            handler.log("\(entry.mountpoint): cannot unmount: \(text)")
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

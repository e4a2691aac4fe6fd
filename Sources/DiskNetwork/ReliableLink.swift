internal import DiskStorage
internal import Glibc

/// A connection that is made anew when it breaks, if nothing can have been lost by that.
///
/// A server that went away may have lost what it had acknowledged and not flushed. To write on as if nothing had
/// happened would leave a hole in what the guest believes to be written; so after such a loss everything fails.
final class ReliableLink<Engine: ConnectionEngine>: Sendable {
    private struct State {
        var connection: SharedConnection<Engine>?
        var isConnecting = false
        var failure: DiskError?
        /// Writes that the server acknowledged, and how many of those a flush has covered.
        var written: UInt64 = 0
        var flushed: UInt64 = 0
    }

    /// What a request does.
    enum Kind {
        case read
        case write
        case flush
    }

    private let state: Monitor<State>
    private let settings: StorageSettings
    private let connect: @Sendable () throws(DiskError) -> SharedConnection<Engine>

    /// - Parameter connect: Makes a connection anew, and checks that it is to the same storage.
    init(
        _ first: SharedConnection<Engine>, _ settings: StorageSettings,
        connect: @escaping @Sendable () throws(DiskError) -> SharedConnection<Engine>
    ) {
        state = Monitor(State(connection: first))
        self.settings = settings
        self.connect = connect
    }

    /// Runs a request to its end; a request that the library or the server refused is an error that `doing` completes:
    /// "cannot …".
    @discardableResult
    func run(
        _ kind: Kind, _ doing: String, _ issue: (Engine, PendingOperation) -> String?
    ) throws(DiskError) -> PendingOperation {
        var failures = 0
        while true {
            let (connection, written) = try current()
            // What the server has not written yet it writes in a flush.
            switch connection.run(patience: kind == .flush ? 10 : 1, issue) {
            case .done(let operation) where operation.status == 0:
                note(kind, written)
                return operation
            case .done(let operation):
                failures += 1
                guard operation.isPassing, failures <= settings.retries else {
                    throw DiskError(.system, "cannot \(doing): \(operation.reason)", errno: operation.status)
                }
                usleep(UInt32(20_000 * failures))
            case .lost(let reason):
                failures += 1
                let failure = DiskError(.system, "cannot \(doing): \(reason)", errno: EIO)
                try giveUp(connection, failure)
                guard failures <= settings.retries else { throw failure }
            }
        }
    }

    /// The connection, made anew if need be, and how many writes are acknowledged.
    private func current() throws(DiskError) -> (SharedConnection<Engine>, UInt64) {
        let found: (SharedConnection<Engine>?, UInt64) = try state.withLock { (state) throws(DiskError) in
            while true {
                if let failure = state.failure { throw failure }
                if let connection = state.connection { return (connection, state.written) }
                if !state.isConnecting {
                    state.isConnecting = true
                    return (nil, state.written)
                }
                self.state.wait()
            }
        }
        if let connection = found.0 { return (connection, found.1) }
        var result: Result<SharedConnection<Engine>, DiskError>?
        for attempt in 0...settings.retries {
            if attempt > 0 { usleep(UInt32(100_000 << min(attempt, 5))) }
            do throws(DiskError) {
                result = .success(try connect())
                break
            } catch {
                result = .failure(error)
                if error.kind != .system { break }
            }
        }
        state.withLock { state in
            state.isConnecting = false
            if case .success(let connection)? = result { state.connection = connection }
            self.state.changed()
        }
        guard let result else { throw DiskError(.system, "the connection is lost", errno: EIO) }
        return (try result.get(), found.1)
    }

    private func note(_ kind: Kind, _ written: UInt64) {
        state.withLock { state in
            switch kind {
            case .read: break
            case .write: state.written += 1
            case .flush: state.flushed = max(state.flushed, written)
            }
        }
    }

    /// A connection broke: the next request gets another one, unless something is lost with it.
    private func giveUp(_ connection: SharedConnection<Engine>, _ reason: DiskError) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            guard let present = state.connection, present === connection else { return }
            // A request that could not be issued is no loss by itself.
            guard !connection.isOpen else { throw reason }
            state.connection = nil
            if state.written != state.flushed {
                state.failure = DiskError(
                    .system,
                    "the connection broke after writes that were not flushed, which the server may have lost: "
                        + reason.message + "; nothing more is read or written: unmount, and check what is on the disk",
                    errno: EIO)
            }
            self.state.changed()
        }
    }
}

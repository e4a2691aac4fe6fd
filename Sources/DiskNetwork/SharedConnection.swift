internal import DiskStorage
internal import Glibc

/// A request on its way; everything in it is guarded by its connection's lock.
final class PendingOperation: @unchecked Sendable {  // only touched under the connection's lock, until it is done
    fileprivate(set) var isDone = false
    /// The library's code; 0 is well.
    private(set) var status: Int32 = 0
    /// The library's words for a failure.
    private(set) var reason = ""
    /// Whether the same request may well succeed at once.
    private(set) var isPassing = false
    /// What the request found out, for who asked for that.
    var numbers: [UInt64] = []
    fileprivate let deadline: SuspendingClock.Instant

    fileprivate init(deadline: SuspendingClock.Instant) { self.deadline = deadline }

    /// Called by the library's callback, once.
    func finish(_ status: Int32, _ reason: String = "", isPassing: Bool = false) {
        self.status = status
        self.reason = reason.printable(limit: 300)
        self.isPassing = isPassing
        isDone = true
    }
}

/// A library's connection to one server, which one thread at a time may use.
protocol ConnectionEngine: AnyObject {
    /// The socket.
    var descriptor: Int32 { get }
    /// What to wait for there, as poll(2) has it.
    var events: Int16 { get }
    /// Whether it broke, as far as is known without waiting.
    var isDead: Bool { get }
    /// Goes on with what came; why the connection is lost, or nil.
    func service(_ events: Int16) -> String?
    /// Ends it; no callback comes after this.
    func close(isClean: Bool)
}

/// A connection that many threads use at the same time: each issues its request, and one of those that wait does the
/// waiting for all.
final class SharedConnection<Engine: ConnectionEngine>: @unchecked Sendable {  // the monitor guards the engine
    /// How a request ended.
    enum Outcome {
        case done(PendingOperation)
        /// The connection is gone, and nobody knows what became of the request.
        case lost(String)
    }

    private struct State {
        var engine: Engine?
        var hasLeader = false
        var lossReason = "the connection is closed"
        var operations: [ObjectIdentifier: PendingOperation] = [:]
    }

    private enum Step {
        case ended(Outcome)
        case lead(descriptor: Int32, events: Int16)
    }

    private let state: Monitor<State>
    /// Written to when who waits must look anew.
    private let waker: Int32
    private let wake: Int32
    /// Seconds that an answer may take.
    private let timeout: Int

    init(_ engine: sending Engine, timeout: Int) throws(DiskError) {
        var ends: [Int32] = [-1, -1]
        guard unsafe pipe(&ends) == 0 else {
            engine.close(isClean: true)
            throw .system(errno, "make a pipe")
        }
        for end in ends {
            _ = fcntl(end, F_SETFD, FD_CLOEXEC)
            _ = fcntl(end, F_SETFL, O_NONBLOCK)
        }
        (wake, waker) = (ends[0], ends[1])
        self.timeout = timeout
        state = Monitor(State(engine: engine))
    }

    deinit {
        state.withLock { state in
            state.engine?.close(isClean: true)
            state.engine = nil
        }
        Glibc.close(wake)
        Glibc.close(waker)
    }

    /// Whether it can still be used.
    var isOpen: Bool { state.withLock { $0.engine != nil } }

    /// Issues a request and waits until it is done. `issue` is called under the lock, and hands the operation to the
    /// library; it answers why it could not, or nil. Memory that the request uses is in nobody's hands any more when
    /// this returns.
    ///
    /// - Parameter patience: How many times the usual time this may take.
    func run(patience: Int = 1, _ issue: (Engine, PendingOperation) -> String?) -> Outcome {
        let operation = PendingOperation(deadline: SuspendingClock.now + .seconds(timeout * patience))
        let failure: String? = state.withLock { state in
            guard let engine = state.engine else { return state.lossReason }
            if let reason = issue(engine, operation) {
                if engine.isDead { end(&state, reason) }
                return reason
            }
            state.operations[ObjectIdentifier(operation)] = operation
            if state.hasLeader, engine.events & Int16(POLLOUT) != 0 { wakeLeader() }
            return nil
        }
        if let failure { return .lost(failure) }
        while true {
            switch next(operation) {
            case .ended(let outcome): return outcome
            case .lead(let descriptor, let events): lead(descriptor, events)
            }
        }
    }

    private func wakeLeader() {
        var byte: UInt8 = 1
        _ = unsafe write(waker, &byte, 1)
    }

    private func next(_ operation: PendingOperation) -> Step {
        state.withLock { state in
            while true {
                if operation.isDone {
                    state.operations[ObjectIdentifier(operation)] = nil
                    return .ended(.done(operation))
                }
                guard let engine = state.engine else {
                    state.operations[ObjectIdentifier(operation)] = nil
                    return .ended(.lost(state.lossReason))
                }
                if !state.hasLeader {
                    state.hasLeader = true
                    return .lead(descriptor: engine.descriptor, events: engine.events)
                }
                self.state.wait()
            }
        }
    }

    /// Waits for the server, for all.
    private func lead(_ descriptor: Int32, _ events: Int16) {
        var places = [
            pollfd(fd: descriptor, events: events, revents: 0), pollfd(fd: wake, events: Int16(POLLIN), revents: 0),
        ]
        let ready = unsafe poll(&places, 2, 1000)
        if ready > 0, places[1].revents != 0 {
            var bytes = [UInt8](repeating: 0, count: 64)
            _ = unsafe Glibc.read(wake, &bytes, bytes.count)
        }
        state.withLock { state in
            state.hasLeader = false
            if let engine = state.engine {
                var reason = engine.service(ready > 0 ? places[0].revents : 0)
                let now = SuspendingClock.now
                if reason == nil, state.operations.values.contains(where: { !$0.isDone && $0.deadline < now }) {
                    reason = "the server has not answered for \(timeout) seconds"
                }
                if let reason { end(&state, reason) }
            }
            self.state.changed()
        }
    }

    /// The connection broke: everybody is told.
    private func end(_ state: inout State, _ reason: String) {
        // A thread that polls the descriptor meanwhile comes back without it.
        wakeLeader()
        state.engine?.close(isClean: false)
        state.engine = nil
        state.lossReason = reason
        self.state.changed()
    }
}

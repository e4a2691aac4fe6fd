public import DiskStorage
internal import Glibc

/// When a storage fails: the n-th change or flush of all files together, once or for good.
public final class FaultPlan: Sendable {
    private struct State {
        var events = 0
        let failing: Int?
        let lasts: Bool
        var eventsWhenLifted: Int?
        var failures = 0
    }

    private let state: Locked<State>
    private let errno: Int32
    private let kills: Bool

    /// Fails event number `event` (from 0; nil: none) with `errno`, and with `lasts` everything after it.
    public init(event: Int?, errno: Int32, lasts: Bool = false) {
        self.errno = errno
        kills = false
        state = Locked(State(failing: event, lasts: lasts))
    }

    /// Kills this process instead of event number `event`.
    public init(killingAt event: Int) {
        errno = 0
        kills = true
        state = Locked(State(failing: event, lasts: false))
    }

    /// How many changes and flushes there were.
    public var events: Int { state.withLock { $0.events } }
    /// How many of them failed.
    public var failures: Int { state.withLock { $0.failures } }
    /// From now on nothing fails.
    public func lift() { state.withLock { $0.eventsWhenLifted = $0.events } }
    /// How many events there were before that.
    public var eventsWhenLifted: Int? { state.withLock { $0.eventsWhenLifted } }

    /// Wraps a storage so that it fails by this plan.
    public func wrap(_ storage: any Storage) -> any Storage {
        ObservedStorage(storage) { [self] (access) throws(DiskError) in
            if access.isChange { try check(access.description) }
        }
    }

    private func check(_ doing: String) throws(DiskError) {
        let fails = state.withLock { state in
            defer { state.events += 1 }
            guard let failing = state.failing, state.eventsWhenLifted == nil else { return false }
            let fails = state.events == failing || state.lasts && state.events > failing
            if fails { state.failures += 1 }
            return fails
        }
        if fails, kills { kill(getpid(), SIGKILL) }
        if fails { throw .system(errno, doing) }
    }
}

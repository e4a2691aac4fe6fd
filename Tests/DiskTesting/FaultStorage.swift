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
    public func wrap(_ storage: any Storage) -> any Storage { FaultStorage(storage, self) }

    fileprivate func check(_ doing: String) throws(DiskError) {
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

/// Passes everything on, but for what its plan fails.
private final class FaultStorage: Storage {
    let traits: StorageTraits
    let name: String
    private let inner: any Storage
    private let plan: FaultPlan

    init(_ inner: any Storage, _ plan: FaultPlan) {
        self.inner = inner
        self.plan = plan
        name = inner.name
        var traits = inner.traits
        traits.descriptor = -1
        self.traits = traits
    }

    func length() throws(DiskError) -> UInt64 { try inner.length() }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        try inner.read(into: buffer, at: offset, for: purpose)
    }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        try plan.check("write")
        try inner.write(bytes, at: offset, for: purpose)
    }

    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        try plan.check("discard")
        try inner.discard(range, mustZero: mustZero, for: purpose)
    }

    func setLength(_ length: UInt64) throws(DiskError) {
        try plan.check("set the length")
        try inner.setLength(length)
    }

    func flush() throws(DiskError) {
        try plan.check("flush")
        try inner.flush()
    }

    func replaceContents(with bytes: [UInt8], for purpose: StoragePurpose) throws(DiskError) {
        try plan.check("replace the contents")
        try inner.replaceContents(with: bytes, for: purpose)
    }

    func allocatedBytes() throws(DiskError) -> UInt64 { try inner.allocatedBytes() }
    func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? { try inner.nextData(from: offset) }
}

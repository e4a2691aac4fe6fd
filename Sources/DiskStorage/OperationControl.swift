/// How far a long operation is.
public struct OperationProgress: Sendable, Equatable {
    /// What is being done, as a short verb phrase: `copying`, `verifying`.
    public var phase: String
    /// Bytes (of the disk, unless the operation says otherwise) that are done in this phase.
    public var done: UInt64
    /// All bytes of this phase.
    public var total: UInt64

    public init(phase: String, done: UInt64, total: UInt64) {
        self.phase = phase
        self.done = done
        self.total = total
    }

    /// From 0 to 1; 1 for a phase in which nothing is to be done.
    public var fraction: Double { total == 0 ? 1 : min(1, Double(done) / Double(total)) }
}

/// The two ways between a long operation and who started it: how far it is, and that it shall stop.
///
/// An operation asks ``checkCancelled()`` at least once for every few mebibytes; then it ends with
/// ``DiskError/Kind/cancelled``, and leaves what its documentation promises. All members may be used from any thread.
public final class OperationControl: Sendable {
    private struct State {
        var progress = OperationProgress(phase: "", done: 0, total: 0)
        var isCancelled = false
    }

    private let state = Locked(State())
    private let onProgress: (@Sendable (OperationProgress) -> Void)?

    /// - Parameter onProgress: Called, on whatever thread works, after each step; must be quick.
    public init(onProgress: (@Sendable (OperationProgress) -> Void)? = nil) { self.onProgress = onProgress }

    /// How far it is now.
    public var progress: OperationProgress { state.withLock { $0.progress } }

    /// Asks the operation to stop.
    public func cancel() { state.withLock { $0.isCancelled = true } }

    /// Whether ``cancel()`` was called.
    public var isCancelled: Bool { state.withLock { $0.isCancelled } }

    // MARK: - For the operation

    /// Throws ``DiskError/Kind/cancelled`` after ``cancel()``.
    public func checkCancelled() throws(DiskError) {
        if isCancelled { throw DiskError(.cancelled, "stopped before it was done") }
    }

    /// A new phase of `total` bytes begins.
    public func begin(_ phase: String, total: UInt64) {
        report { $0 = OperationProgress(phase: phase, done: 0, total: total) }
    }

    /// `count` more bytes are done.
    public func advance(by count: UInt64) {
        report { $0.done = min($0.total, $0.done &+ count) }
    }

    /// `done` bytes are done in all.
    public func advance(to done: UInt64) {
        report { $0.done = min($0.total, done) }
    }

    private func report(_ change: (inout OperationProgress) -> Void) {
        let progress = state.withLock { state in
            change(&state.progress)
            return state.progress
        }
        onProgress?(progress)
    }
}

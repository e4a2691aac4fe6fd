internal import DiskStorage

/// A run of bytes with one meaning, which a run behind it may continue.
protocol JoinableRun {
    /// How many bytes.
    var length: UInt64 { get set }
    /// Whether `next`, which begins where this one ends, is more of the same.
    func isContinued(by next: Self) -> Bool
}

/// Joins runs that continue each other.
struct RunJoiner<Run: JoinableRun> {
    private var pending: Run?

    init() {}

    /// Adds what follows, and calls `body` with the run before, if that has ended; answers whether to go on.
    mutating func add(_ run: Run, _ body: (Run) throws(DiskError) -> Bool) throws(DiskError) -> Bool {
        guard let current = pending else {
            pending = run
            return true
        }
        if current.isContinued(by: run) {
            pending?.length += run.length
            return true
        }
        pending = run
        return try body(current)
    }

    /// Nothing follows: calls `body` with the last run.
    func end(_ body: (Run) throws(DiskError) -> Bool) throws(DiskError) {
        if let pending { _ = try body(pending) }
    }
}

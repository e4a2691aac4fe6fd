/// Places of blocks in a file that hold nothing any more, as runs: what is given up lies together more often than not,
/// and a run takes as much memory as a block.
///
/// There is a limit to how many runs are kept. What is forgotten beyond it is lost to this session only as space at
/// known places: it was given back to the file system already, and `vdimg compact` shortens the file.
public struct FreeBlocks: Sendable {
    /// Blocks one after the other.
    public struct Run: Equatable, Sendable {
        /// Where the first one begins, in bytes.
        public var offset: UInt64
        /// How many.
        public var count: UInt64
        /// Whether they are known to read as zeros.
        public var isZero: Bool

        public init(offset: UInt64, count: UInt64, isZero: Bool) {
            self.offset = offset
            self.count = count
            self.isZero = isZero
        }

        /// Whether `next` begins where this run ends, and is like it.
        func isContinued(by next: Run, _ blockSize: UInt64) -> Bool {
            isZero == next.isZero && offset + count * blockSize == next.offset
        }
    }

    /// The most runs that are kept: 1.5 MiB of them.
    public static let limit = 65_536

    /// The runs, the one that lies furthest back first, as far as ``isOrdered``.
    private(set) var runs: [Run] = []
    private var isOrdered = true
    /// How many runs were added at the list's end since it was put in order.
    private var added = 0
    private let blockSize: UInt64
    private let limit: Int

    public init(blockSize: UInt64, limit: Int = Self.limit) {
        self.blockSize = blockSize
        self.limit = limit
    }

    public var isEmpty: Bool { runs.isEmpty }
    /// How many blocks there are.
    public var count: UInt64 { runs.reduce(0) { $0 + $1.count } }

    // MARK: - Giving

    /// Adds a block. If too many runs are known and it continues none of the last ones, it is forgotten.
    public mutating func add(_ offset: UInt64, isZero: Bool) {
        let block = Run(offset: offset, count: 1, isZero: isZero)
        if let last = runs.last {
            if last.isContinued(by: block, blockSize) {
                runs[runs.count - 1].count += 1
                // It may meet the one before it now.
                isOrdered = false
                return
            }
            if block.isContinued(by: last, blockSize) {
                runs[runs.count - 1] = Run(offset: offset, count: last.count + 1, isZero: isZero)
                return
            }
            // Joining runs makes room, if there is a good part of them that was not joined yet.
            if runs.count >= limit, added > limit / 8 { order() }
            guard runs.count < limit else { return }
            if let last = runs.last, offset > last.offset { isOrdered = false }
        }
        runs.append(block)
        added += 1
    }

    /// Adds blocks that lie one after the other. If too many runs are known, they are forgotten.
    public mutating func add(_ run: Run) {
        guard run.count > 0 else { return }
        if runs.count >= limit, added > limit / 8 { order() }
        guard runs.count < limit else { return }
        runs.append(run)
        isOrdered = false
        added += 1
    }

    /// Adds what another list has; of too many runs the shortest are forgotten.
    public mutating func add(_ other: FreeBlocks) {
        guard !other.isEmpty else { return }
        runs.append(contentsOf: other.runs)
        isOrdered = false
        order()
        guard runs.count > limit else { return }
        let shortest = runs.map(\.count).sorted(by: >)[limit - 1]
        var spare = limit - runs.count { $0.count > shortest }
        runs.removeAll { run in
            guard run.count == shortest, spare > 0 else { return run.count <= shortest }
            spare -= 1
            return false
        }
    }

    /// Puts the runs in order and joins those that meet.
    private mutating func order() {
        runs.sort { $0.offset > $1.offset }
        var kept = 0
        for run in runs {
            if kept > 0, run.isContinued(by: runs[kept - 1], blockSize) {
                runs[kept - 1].offset = run.offset
                runs[kept - 1].count += run.count
            } else {
                runs[kept] = run
                kept += 1
            }
        }
        runs.removeLast(runs.count - kept)
        isOrdered = true
        added = 0
    }

    // MARK: - Taking

    /// Takes up to `count` blocks in one piece, those that lie furthest in front; nil if there are none.
    public mutating func take(_ count: UInt64) -> Run? {
        if !isOrdered { order() }
        guard var last = runs.popLast() else { return nil }
        let taken = Run(offset: last.offset, count: min(count, last.count), isZero: last.isZero)
        if taken.count < last.count {
            last.offset += taken.count * blockSize
            last.count -= taken.count
            runs.append(last)
        }
        return taken
    }

    /// Takes the run that ends where the file's blocks end; nil if the last block is not among them.
    public mutating func takeLast(endingAt end: UInt64) -> Run? {
        if !isOrdered { order() }
        guard let last = runs.first, last.offset + last.count * blockSize == end else { return nil }
        return runs.removeFirst()
    }
}

public import DiskStorage

/// Which places of a file are in use, a place being as large as a block: those that blocks lie in, which can move, and
/// those of everything else, which stay.
public struct FilePlaces: Sendable {
    /// 16 MiB of bits, twice.
    private static let limit: UInt64 = 1 << 27

    private let unit: UInt64
    private let count: UInt64
    private var used: [UInt64]
    private var fixed: [UInt64]
    /// Where the last thing in use ends.
    public private(set) var end: UInt64 = 0

    /// Of a file of `length` bytes; nil if it has too many places to know them all.
    public init?(unit: UInt64, length: UInt64) {
        self.unit = unit
        count = length.dividedRoundingUp(by: unit)
        guard count <= Self.limit else { return nil }
        used = [UInt64](repeating: 0, count: Int(count / 64 + 1))
        fixed = used
    }

    /// Something that stays lies there.
    public mutating func keep(_ range: Range<UInt64>) {
        guard !range.isEmpty else { return }
        end = max(end, range.upperBound)
        let last = min(count, range.upperBound.dividedRoundingUp(by: unit))
        var number = range.lowerBound / unit
        while number < last {
            used[Int(number / 64)] |= 1 << (number % 64)
            fixed[Int(number / 64)] |= 1 << (number % 64)
            number += 1
        }
    }

    /// A block lies there. One that does not lie at a multiple of its size stays.
    public mutating func addBlock(at offset: UInt64) {
        let (blockEnd, overflow) = offset.addingReportingOverflow(unit)
        guard !overflow else { return }
        guard offset % unit == 0 else { return keep(offset..<blockEnd) }
        end = max(end, blockEnd)
        let number = offset / unit
        guard number < count else { return }
        used[Int(number / 64)] |= 1 << (number % 64)
    }

    /// What was said to stay can move after all.
    public mutating func release(_ offset: UInt64) {
        let number = offset / unit
        guard offset % unit == 0, number < count else { return }
        fixed[Int(number / 64)] &= ~(1 << (number % 64))
    }

    /// Where the file could end if the last blocks moved to free places, and the way to these.
    public func plan() -> ShrinkingPlan {
        var movable: UInt64 = 0
        var lastFixed: UInt64 = 0
        for index in used.indices {
            movable += UInt64((used[index] & ~fixed[index]).nonzeroBitCount)
            if fixed[index] != 0 { lastFixed = UInt64(index) * 64 + 64 - UInt64(fixed[index].leadingZeroBitCount) }
        }
        // The first place behind as many as the blocks need, and behind everything that stays.
        var end: UInt64 = 0
        var room: UInt64 = 0
        while end < count, room < movable || end < lastFixed {
            if fixed[Int(end / 64)] >> (end % 64) & 1 == 0 { room += 1 }
            end += 1
        }
        return ShrinkingPlan(unit: unit, end: end * unit, used: used)
    }
}

/// Where the blocks at a file's end move to.
public struct ShrinkingPlan: Sendable {
    /// Bytes of a place.
    public let unit: UInt64
    /// Blocks from here on move.
    public let end: UInt64
    private let used: [UInt64]
    private var next: UInt64 = 0

    init(unit: UInt64, end: UInt64, used: [UInt64]) {
        self.unit = unit
        self.end = end
        self.used = used
    }

    /// A free place before ``end``, which nobody else gets; nil if there is none.
    public mutating func take() -> UInt64? {
        while next * unit < end {
            let number = next
            next += 1
            if used[Int(number / 64)] >> (number % 64) & 1 == 0 { return number * unit }
        }
        return nil
    }
}

/// The way through an image whose last blocks move to the front, one after the other in the order of the disk.
public final class BlockMover: Sendable {
    private struct State {
        var plans: [UInt16: ShrinkingPlan] = [:]
        /// The next byte of the disk to look at.
        var position: UInt64 = 0
    }

    private let state = Locked<State?>(nil)

    public init() {}

    /// Begins, with the plans of storages.
    public func begin(_ plans: [UInt16: ShrinkingPlan]) { state.withLock { $0 = State(plans: plans) } }

    /// Whether there is more to do.
    public var isMoving: Bool { state.withLock { $0 != nil } }

    /// No block moves any more.
    public func end() { state.withLock { $0 = nil } }

    /// The next block to move, and where to; nil: that was all.
    public func next(in backend: some ImageBackend) throws(DiskError) -> Relocation? {
        try state.withLock { (current) throws(DiskError) in
            guard var state = current else { return nil }
            let found = try Self.find(&state, backend)
            current = found == nil ? nil : state
            return found
        }
    }

    private static func find(_ state: inout State, _ backend: some ImageBackend) throws(DiskError) -> Relocation? {
        var batch = ExtentBatch()
        while state.position < backend.virtualSize {
            batch.removeAll()
            try backend.map(
                offset: state.position, length: backend.virtualSize - state.position, into: &batch)
            let extent = batch[0]
            let next = state.position + extent.length
            guard extent.kind == .data, let plan = state.plans[extent.storage],
                extent.fileOffset + extent.length > plan.end
            else {
                state.position = next
                continue
            }
            // The first block of the run that lies too far back.
            let skipped = plan.end > extent.fileOffset ? (plan.end - extent.fileOffset) / plan.unit * plan.unit : 0
            let source = extent.fileOffset + skipped
            let offset = state.position + skipped
            let length = min(plan.unit, extent.length - skipped)
            // A block of which a part is something else stays.
            guard source % plan.unit == 0, source >= plan.end,
                length == plan.unit || offset + length == backend.virtualSize
            else {
                state.position = min(next, offset + plan.unit)
                continue
            }
            state.position = offset + length
            guard let target = state.plans[extent.storage]?.take() else { return nil }
            return Relocation(offset: offset, length: length, storage: extent.storage, source: source, target: target)
        }
        return nil
    }
}

import FuseHost
import Glibc
import Synchronization

/// Who has the disk and its partitions open: the same bytes seen through several files.
///
/// While a partition is open for writing the disk cannot be, and the other way round: each would have its own page
/// cache over the same bytes. What a file's page cache holds is forgotten at its next opening if the bytes may have
/// been written through another file meanwhile.
final class DiskViews: Sendable {
    private struct State {
        /// How often each file is open for writing.
        var writers: [ObjectIdentifier: (name: String, isDisk: Bool, count: Int)] = [:]
        /// Counts openings and closings for writing, of the disk and of partitions.
        var diskWrites = 0
        var partitionWrites = 0
        /// The other side's count when the file was opened last.
        var seen: [ObjectIdentifier: Int] = [:]

        mutating func countWriting(_ isDisk: Bool) {
            if isDisk { diskWrites += 1 } else { partitionWrites += 1 }
        }
    }

    private let state = Mutex(State())
    /// Whether bytes were written where the partition table lies, or may lie.
    private let tableIsTouched = Atomic<Bool>(false)
    private let size: UInt64
    private let say: @Sendable (String) -> Void
    private let tableChanged: @Sendable () -> Void

    /// The front and the end of a disk in which tables begin: 34 sectors of 4096 bytes fit well.
    static let margin: UInt64 = 1 << 20
    private let everything = Atomic<Bool>(false)

    /// Whether a part of the table lies elsewhere, so that any write may be to it.
    var watchesEverything: Bool {
        get { everything.load(ordering: .relaxed) }
        set { everything.store(newValue, ordering: .relaxed) }
    }

    /// - Parameter say: takes a line for the log.
    /// - Parameter tableChanged: called on any thread when the partition table may be another one than before.
    init(size: UInt64, say: @escaping @Sendable (String) -> Void, tableChanged: @escaping @Sendable () -> Void) {
        self.size = size
        self.say = say
        self.tableChanged = tableChanged
    }

    func opened(_ file: DiskFile, forWriting: Bool) -> ExposedFile.OpenResult {
        let isDisk = file.partition == nil
        let result = state.withLock { state -> (obstacle: String?, keepsCache: Bool) in
            if forWriting {
                if let other = state.writers.values.first(where: { $0.isDisk != isDisk }) { return (other.name, false) }
                state.writers[ObjectIdentifier(file), default: (file.name, isDisk, 0)].count += 1
                state.countWriting(isDisk)
            }
            let others = isDisk ? state.partitionWrites : state.diskWrites
            let before = state.seen.updateValue(others, forKey: ObjectIdentifier(file))
            let isBeingWritten = state.writers.values.contains { $0.isDisk != isDisk }
            return (nil, (before ?? 0) == others && !isBeingWritten)
        }
        if let obstacle = result.obstacle {
            say("\(file.name): cannot be opened for writing while \(obstacle) is: both are the same bytes")
            return .refused(EBUSY)
        }
        return .opened(keepsCache: result.keepsCache)
    }

    func closed(_ file: DiskFile, forWriting: Bool) {
        guard forWriting else { return }
        let isDisk = file.partition == nil
        state.withLock { state in
            state.countWriting(isDisk)
            let key = ObjectIdentifier(file)
            guard let count = state.writers[key]?.count, count > 1 else {
                state.writers[key] = nil
                return
            }
            state.writers[key]?.count = count - 1
        }
        flushed(file)
    }

    /// Bytes of the file were written.
    @inline(__always)
    func wrote(offset: UInt64, count: Int, to file: DiskFile) {
        guard file.partition == nil,
            offset < Self.margin || offset &+ UInt64(count) > size &- min(size, Self.margin) || watchesEverything
        else { return }
        if !tableIsTouched.load(ordering: .relaxed) { tableIsTouched.store(true, ordering: .relaxed) }
    }

    /// What was written is complete for now.
    func flushed(_ file: DiskFile) {
        guard file.partition == nil, tableIsTouched.load(ordering: .relaxed) else { return }
        if tableIsTouched.exchange(false, ordering: .acquiringAndReleasing) { tableChanged() }
    }
}

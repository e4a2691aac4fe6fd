import Glibc
import Synchronization

/// One file of a mount. A subclass says where its bytes come from.
///
/// All functions are called on lanes, several at once, and answer 0 or an errno value. The size of a stable file never
/// changes.
/// `read` and `write` are the hot path: they get ranges that lie inside the file and at most
/// ``MountSession/maximumTransfer`` bytes, in page-aligned memory of the lane, and should neither allocate nor count
/// references.
// Sendable: the stored properties are constants and atomics; a subclass promises the same of its own.
open class ExposedFile: @unchecked Sendable {
    /// The name in the mounted folder; of no meaning where the mountpoint is a file.
    public let name: String
    /// Size in bytes.
    public final var size: UInt64 { currentSize.load(ordering: .relaxed) }
    /// Whether openers may write.
    public final let isWritable: Bool
    /// Permission bits, such as 0o600.
    public let mode: UInt32
    public let owner: UInt32
    public let group: UInt32
    /// Whether the bytes change only by writes through this mount, so that the page cache may keep them from one
    /// opener to the next. Otherwise every read comes here.
    public final let isStable: Bool

    let readBytes: TrafficCounter
    let writtenBytes: TrafficCounter
    private let currentSize: Atomic<UInt64>
    private let written = Atomic<Bool>(false)
    private let modifiedNanoseconds: Atomic<Int64>

    /// - Parameter modified: the modification time shown until the first write, in nanoseconds since 1970.
    /// - Parameter whole: the file of which this one is a part; their traffic is counted together.
    public init(
        name: String, size: UInt64, isWritable: Bool, mode: UInt32, owner: UInt32, group: UInt32,
        modified: Int64, isStable: Bool = true, partOf whole: ExposedFile? = nil
    ) {
        readBytes = whole?.readBytes ?? TrafficCounter()
        writtenBytes = whole?.writtenBytes ?? TrafficCounter()
        self.name = name
        currentSize = Atomic(size)
        self.isWritable = isWritable
        self.mode = mode & 0o777
        self.owner = owner
        self.group = group
        self.isStable = isStable
        modifiedNanoseconds = Atomic(modified)
    }

    /// Bytes read and written through the mount so far, by direct requests or to fill the page cache; also through the
    /// files that are parts of this one.
    public final var traffic: (read: UInt64, written: UInt64) { (readBytes.total, writtenBytes.total) }

    /// Somebody opens it: whether he may, and whether what the page cache holds of it is still right.
    open func opened(forWriting: Bool) -> OpenResult { .opened(keepsCache: isStable) }

    /// An opener is gone, for good.
    open func closed(forWriting: Bool) {}

    /// Fills the whole buffer with the bytes at the offset.
    open func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) -> Int32 { EIO }

    /// Stores the whole buffer at the offset.
    open func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) -> Int32 { EROFS }

    /// Makes durable what was written before. Called for fsync(2) and, on a writable file, for every close(2).
    open func flush() -> Int32 { 0 }

    /// Reads as zeros from now on, and gives the space back where that is possible.
    open func discard(offset: UInt64, length: UInt64) -> Int32 { EOPNOTSUPP }

    /// Reads as zeros from now on; the space may stay allocated.
    open func zero(offset: UInt64, length: UInt64) -> Int32 { EOPNOTSUPP }

    /// Makes sure that later writes to the range find space.
    open func allocate(offset: UInt64, length: UInt64) -> Int32 { EOPNOTSUPP }

    /// The next data (or, with `data` false, the next hole) at or after an offset inside the file. The end of the file
    /// counts as a hole. No more data: ENXIO.
    open func seek(from offset: UInt64, data: Bool) -> SeekResult { data ? .found(offset) : .found(size) }

    /// Bytes of storage the file takes up: st_blocks.
    open var allocatedBytes: UInt64 { size }

    /// What ``opened(forWriting:)`` answers.
    public enum OpenResult: Sendable {
        case opened(keepsCache: Bool)
        case refused(Int32)
    }

    /// What ``seek(from:data:)`` answers.
    public enum SeekResult: Sendable {
        case found(UInt64)
        case failed(Int32)
    }

    /// Gives a file that is not stable another size, while nobody has it open.
    public final func resize(to size: UInt64) { currentSize.store(size, ordering: .relaxed) }

    /// Notes that the content changed; the time is taken when somebody asks for it.
    final func noteWrite() {
        if !written.load(ordering: .relaxed) { written.store(true, ordering: .relaxed) }
    }

    /// Nanoseconds since 1970 of the last change.
    public final var modified: Int64 {
        if written.exchange(false, ordering: .relaxed) {
            var now = timespec()
            unsafe clock_gettime(CLOCK_REALTIME, &now)
            modifiedNanoseconds.store(Int64(now.tv_sec) * 1_000_000_000 + Int64(now.tv_nsec), ordering: .relaxed)
        }
        return modifiedNanoseconds.load(ordering: .relaxed)
    }
}

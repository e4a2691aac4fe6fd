internal import CLinux
internal import DiskImage
internal import DiskStorage
internal import Glibc

/// Writes what a disk holds as an image of encoded blocks: several threads read and encode, and write one after the
/// other in the order of the disk.
final class StreamCopier: @unchecked Sendable {  // the writer is used by who has the turn alone
    private let source: Disk
    private let writer: any ImageStreamWriter
    private let control: OperationControl
    private let state: Turns

    /// Bytes of the disk that a thread encodes before it writes.
    private static let batch: UInt64 = 1 << 20

    init(_ source: Disk, _ writer: any ImageStreamWriter, _ control: OperationControl) {
        self.source = source
        self.writer = writer
        self.control = control
        state = Turns()
    }

    /// Writes the whole disk and finishes the image.
    func run() throws(DiskError) {
        control.begin("copying", total: source.size)
        try WorkerThreads.run(WorkerThreads.usualCount) { (_, hasFailed) throws(DiskError) in
            do throws(DiskError) {
                try self.work(hasFailed)
            } catch {
                self.state.giveUp()
                throw error
            }
        }
        try writer.finish()
    }

    private func work(_ hasFailed: () -> Bool) throws(DiskError) {
        let block = writer.blockSize
        let encoder = try writer.makeEncoder()
        let count = max(1, Self.batch / block)
        var input = [UInt8](repeating: 0, count: Int(count * block))
        var output = [UInt8](repeating: 0, count: Int(count) * encoder.bound)
        while !hasFailed(), let (turn, range) = try take(count * block) {
            var blocks: [(number: UInt64, count: Int?)] = []
            try input.withIOBuffer { (buffer) throws(DiskError) in
                let bytes = buffer.slice(0, Int(range.upperBound - range.lowerBound))
                try source.read(into: bytes, at: range.lowerBound)
                let whole = (bytes.count + Int(block) - 1) / Int(block) * Int(block)
                buffer.slice(bytes.count, whole - bytes.count).zero()
                try output.withIOBuffer { (memory) throws(DiskError) in
                    for start in stride(from: 0, to: whole, by: Int(block)) {
                        let piece = buffer.readOnly.slice(start, Int(block))
                        if piece.isZero { continue }
                        let place = memory.slice(blocks.count * encoder.bound, encoder.bound)
                        blocks.append(
                            (range.lowerBound / block + UInt64(start) / block, try encoder.encode(piece, into: place)))
                    }
                }
            }
            guard state.wait(for: turn) else { return }
            try control.checkCancelled()
            try input.withIOBytes { (bytes) throws(DiskError) in
                try output.withIOBytes { (memory) throws(DiskError) in
                    for (index, item) in blocks.enumerated() {
                        if let count = item.count {
                            let stream = memory.slice(index * encoder.bound, count)
                            try writer.write(block: item.number, .compressed(stream))
                        } else {
                            let start = Int(item.number * block - range.lowerBound)
                            try writer.write(block: item.number, .plain(bytes.slice(start, Int(block))))
                        }
                    }
                }
            }
            control.advance(to: range.upperBound)
            state.end(turn)
        }
    }

    /// The next range with data in it, beginning with a block, and whose turn it is then.
    private func take(_ length: UInt64) throws(DiskError) -> (UInt64, Range<UInt64>)? {
        try state.next { (position) throws(DiskError) in
            guard position < source.size, let data = try source.nextData(from: position) else { return nil }
            let start = max(position, data / writer.blockSize * writer.blockSize)
            let end = length < source.size - start ? start + length : source.size
            position = end
            return start..<end
        }
    }
}

/// Who may write when.
@safe
private final class Turns: @unchecked Sendable {  // the mutex guards everything
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>
    private let condition: UnsafeMutablePointer<pthread_cond_t>
    private var position: UInt64 = 0
    private var taken: UInt64 = 0
    private var current: UInt64 = 0
    private var isOver = false

    init() {
        unsafe mutex = .allocate(capacity: 1)
        unsafe mutex.initialize(to: pthread_mutex_t())
        unsafe pthread_mutex_init(mutex, nil)
        unsafe condition = .allocate(capacity: 1)
        unsafe condition.initialize(to: pthread_cond_t())
        unsafe pthread_cond_init(condition, nil)
    }

    deinit {
        unsafe pthread_cond_destroy(condition)
        unsafe condition.deallocate()
        unsafe pthread_mutex_destroy(mutex)
        unsafe mutex.deallocate()
    }

    private func locked<Result>(_ body: () throws(DiskError) -> Result) throws(DiskError) -> Result {
        unsafe pthread_mutex_lock(mutex)
        defer { unsafe pthread_mutex_unlock(mutex) }
        return try body()
    }

    /// Gives out the next range, which `find` takes from the position on, with a turn.
    func next(
        _ find: (inout UInt64) throws(DiskError) -> Range<UInt64>?
    ) throws(DiskError) -> (UInt64, Range<UInt64>)? {
        try locked { () throws(DiskError) in
            guard !isOver, let range = try find(&position) else { return nil }
            defer { taken += 1 }
            return (taken, range)
        }
    }

    /// Returns when all turns before are over; false: there will be none any more.
    func wait(for turn: UInt64) -> Bool {
        unsafe pthread_mutex_lock(mutex)
        defer { unsafe pthread_mutex_unlock(mutex) }
        while current != turn, !isOver { unsafe pthread_cond_wait(condition, mutex) }
        return !isOver
    }

    func end(_ turn: UInt64) {
        unsafe pthread_mutex_lock(mutex)
        current = turn + 1
        unsafe pthread_cond_broadcast(condition)
        unsafe pthread_mutex_unlock(mutex)
    }

    /// Nobody gets a turn any more.
    func giveUp() {
        unsafe pthread_mutex_lock(mutex)
        isOver = true
        unsafe pthread_cond_broadcast(condition)
        unsafe pthread_mutex_unlock(mutex)
    }
}

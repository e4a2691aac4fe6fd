internal import DiskImage
internal import DiskStorage

/// Copies what a disk holds to another one, by several threads, in as few bytes as can be: ranges that both files can
/// share are cloned; zeros take no space; of the rest, what turns out to be zeros is left out.
///
/// The two are nobody else's meanwhile, and no two threads work in one block of the target: no locks are needed.
final class DiskCopier: Sendable {
    /// What is copied, and onto what.
    struct Task: Sendable {
        /// Where the bytes come from.
        var source: Disk
        /// Layers of the source that count, from the top: what those below hold is taken as absent.
        var depth: Int
        /// Where they go: to the top image, over what lies below it.
        var target: Chain
        /// Whether the target reads as zeros, so that zeros need not be copied.
        var isTargetEmpty: Bool
        /// Whether files may share blocks.
        var clones = true
        /// Bytes to copy from the beginning.
        var length: UInt64
    }

    private let task: Task
    private let sourceChain: Chain
    private let control: OperationControl
    /// What one thread takes at a time: whole blocks of the target.
    private let unit: UInt64
    private let next = Locked<UInt64>(0)
    /// The layers that count.
    private let layers: LayerRun
    private let cloner: RangeCloner
    private let buffers = ScratchPool(size: bufferSize)

    /// Bytes read at once.
    private static let bufferSize = 1 << 20
    /// Bytes whose pieces are known at a time.
    private static let window: UInt64 = 8 << 20
    /// A run of zeros that is left out: less is not worth another access to the file.
    private static let zeroRun = 4 << 10

    init(_ task: Task, _ control: OperationControl) {
        self.task = task
        sourceChain = task.source.current.chain
        layers = LayerRun(sourceChain.layers.prefix(task.depth))
        cloner = RangeCloner(isOn: task.clones)
        self.control = control
        unit = max(Self.window, task.target.blockSize)
    }

    /// Copies everything; what is durable then is the target's flush's business.
    func run() throws(DiskError) {
        control.begin("copying", total: task.length)
        try task.target.beginWriting()
        try WorkerThreads.run(WorkerThreads.usualCount) { (_, hasFailed) throws(DiskError) in
            while !hasFailed(), let range = try self.takeRange() {
                try self.copy(range)
                self.control.advance(by: range.upperBound - range.lowerBound)
            }
        }
    }

    /// The next range that nobody has taken; nil if there is none.
    private func takeRange() throws(DiskError) -> Range<UInt64>? {
        try control.checkCancelled()
        return try next.withLock { (position) throws(DiskError) -> Range<UInt64>? in
            // Long runs without data are passed over by their tables alone.
            if task.isTargetEmpty, task.depth >= sourceChain.depth, position < task.length {
                let data = min(try task.source.nextData(from: position) ?? task.length, task.length)
                let start = data / unit * unit
                if start > position || data == task.length {
                    let skipped = max(start, data == task.length ? data : 0)
                    control.advance(by: skipped - position)
                    position = skipped
                }
            }
            guard position < task.length else { return nil }
            let end = unit < task.length - position ? position + unit : task.length
            defer { position = end }
            return position..<end
        }
    }

    private func copy(_ range: Range<UInt64>) throws(DiskError) {
        var position = range.lowerBound
        while position < range.upperBound {
            try control.checkCancelled()
            let end = min(range.upperBound, position + Self.window)
            try cloner.share(position..<end, of: layers, into: task.target, zeros: copyZeros, bytes: copyBytes)
            position = end
        }
    }

    /// Zeros that the target does not have anyway.
    private func copyZeros(_ range: Range<UInt64>) throws(DiskError) {
        guard !task.isTargetEmpty else { return }
        try task.target.discardLocked(range.lowerBound, range.upperBound - range.lowerBound)
    }

    // MARK: - Through memory

    /// Reads and writes; runs of zeros are left out of an empty target.
    private func copyBytes(_ range: Range<UInt64>) throws(DiskError) {
        try buffers.withBuffer { (buffer) throws(DiskError) in
            var position = range.lowerBound
            while position < range.upperBound {
                let count = Int(min(UInt64(buffer.count), range.upperBound - position))
                let piece = buffer.slice(0, count)
                try task.source.read(into: piece, at: position)
                try write(piece.readOnly, at: position)
                position += UInt64(count)
            }
        }
    }

    private func write(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) {
        var start = 0
        while start < bytes.count {
            // Runs begin and end where the target's blocks do.
            var end = start
            let isZero = bytes.slice(start, step(from: offset + UInt64(start), bytes.count - start)).isZero
            repeat {
                end += step(from: offset + UInt64(end), bytes.count - end)
            } while end < bytes.count
                && bytes.slice(end, step(from: offset + UInt64(end), bytes.count - end)).isZero == isZero
            let run = bytes.slice(start, end - start)
            if !isZero {
                try task.target.writeLocked(run, at: offset + UInt64(start))
                try beginWriteback(offset + UInt64(start), run.count)
            } else if !task.isTargetEmpty {
                try task.target.discardLocked(offset + UInt64(start), UInt64(run.count))
            }
            start = end
        }
    }

    /// Of blocks that are allocated the system begins to write out at once (``EarlyWriteback``); here it does of files
    /// in which all blocks have their places already.
    private func beginWriteback(_ offset: UInt64, _ count: Int) throws(DiskError) {
        guard task.isTargetEmpty, task.target.blockSize == 0, count >= EarlyWriteback.smallestWrite else { return }
        var batch = ExtentBatch()
        try task.target.top.map(offset, UInt64(count), into: &batch)
        guard batch[0].kind == .data else { return }
        task.target.earlyWriteback?.note(count, in: task.target.top.storage(batch[0].storage))
    }

    /// Bytes up to the next border at which a run of zeros may begin or end.
    private func step(from offset: UInt64, _ count: Int) -> Int {
        min(count, Self.zeroRun - Int(offset & UInt64(Self.zeroRun - 1)))
    }
}

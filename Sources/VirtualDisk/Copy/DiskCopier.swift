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
    private let transfers = Transfers()
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
            var run: Range<UInt64>?
            for piece in try sourceChain.pieces(position..<end, to: task.depth) {
                let isDone = piece.isData ? try share(piece) : true
                if isDone || run?.upperBound != piece.offset {
                    if let run { try copyBytes(run) }
                    run = nil
                }
                if isDone {
                    try copyZeros(piece)
                } else {
                    run = (run?.lowerBound ?? piece.offset)..<piece.end
                }
            }
            if let run { try copyBytes(run) }
            position = end
        }
    }

    /// Zeros that the target does not have anyway.
    private func copyZeros(_ piece: CopyPiece) throws(DiskError) {
        guard !task.isTargetEmpty, case .zero = piece.content else { return }
        try task.target.discardLocked(piece.offset, piece.length)
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

    // MARK: - Without bytes

    /// Has the kernel copy a piece, as far as it lies at borders of blocks in both files; answers whether all of it is
    /// done.
    private func share(_ piece: CopyPiece) throws(DiskError) -> Bool {
        guard task.clones, case .stored(let file, let place) = piece.content else { return false }
        var done: UInt64 = 0
        while done < piece.length {
            let count = try share(
                CopyPiece(offset: piece.offset + done, length: piece.length - done, content: piece.content), in: file,
                at: place + done)
            guard count > 0 else { break }
            done += count
        }
        if done > 0, done < piece.length { try copyBytes(piece.offset + done..<piece.end) }
        return done > 0
    }

    /// The same for the front of a piece that the target can hold in one place; answers how many bytes are done, 0 if
    /// it cannot be.
    private func share(
        _ piece: CopyPiece, in file: StorageHandle, at place: UInt64
    ) throws(DiskError) -> UInt64 {
        let target = task.target
        var batch = ExtentBatch()
        try target.top.map(piece.offset, piece.length, into: &batch)
        let extent = batch[0]
        if extent.kind == .data {
            let handle = target.top.storage(extent.storage)
            let length = min(piece.length, extent.length)
            return try transfer(piece.offset, from: file, at: place, to: handle, at: extent.fileOffset, length)
        }
        // (All files of an image lie on one file system.)
        guard target.blockSize > 0, extent.kind == .absent || extent.kind == .zero,
            transfers.transfer(from: file, to: target.top.storage(0)) != nil, transfers.mayTransfer(from: file)
        else { return 0 }
        return try shareAllocating(piece, in: file, at: place)
    }

    private func shareAllocating(
        _ piece: CopyPiece, in file: StorageHandle, at place: UInt64
    ) throws(DiskError) -> UInt64 {
        let backend = task.target.layers[0].backend
        let reservation = try backend.reserve(offset: piece.offset, length: piece.length)
        let blocks = reservation.offset..<reservation.offset + reservation.length
        let length = min(piece.end, blocks.upperBound) - piece.offset
        // What of the blocks is not in this piece is copied later; until then it must read as what lies below.
        let coversAll = blocks.lowerBound == piece.offset && blocks.upperBound <= piece.end
        guard coversAll || task.isTargetEmpty else {
            backend.abandon(reservation)
            return 0
        }
        do throws(DiskError) {
            let handle = task.target.top.storage(reservation.storage)
            let start = reservation.fileOffset + (piece.offset - blocks.lowerBound)
            if !coversAll, !reservation.isZero {
                let end = reservation.fileOffset + reservation.length
                try handle.discard(reservation.fileOffset..<start, for: .copyUp)
                try handle.discard(start + length..<end, for: .copyUp)
            }
            if try transfer(piece.offset, from: file, at: place, to: handle, at: start, length) == 0 {
                // A place that was taken is used: one that is given back at the end stays a hole in the file.
                transfers.noteFailure(from: file)
                try copyDirectly(from: file, at: place, to: handle, at: start, length)
            }
        } catch {
            backend.abandon(reservation)
            throw error
        }
        defer { task.target.holes.noteAllocation() }
        try backend.commit(reservation)
        return length
    }

    /// Transfers `length` bytes from one place to another; what lies before the first and behind the last border of a
    /// block goes through memory. Answers 0, with nothing done, if the kernel cannot.
    private func transfer(
        _ offset: UInt64, from file: StorageHandle, at place: UInt64, to handle: StorageHandle, at start: UInt64,
        _ length: UInt64
    ) throws(DiskError) -> UInt64 {
        guard let transfer = transfers.transfer(from: file, to: handle), handle.isWritable else { return 0 }
        let block = transfer.alignment
        guard place & (block - 1) == start & (block - 1) else { return 0 }
        let head = min(length, (block - place & (block - 1)) & (block - 1))
        let middle = (length - head) & ~(block - 1)
        guard middle > 0 else { return 0 }
        do throws(DiskError) {
            guard try transfer.transfer(from: place + head, to: start + head, length: middle) else {
                transfers.giveUp(from: file, to: handle)
                return 0
            }
        } catch {
            throw error.about(handle.storage.name)
        }
        handle.noteWrite()
        try copyDirectly(from: file, at: place, to: handle, at: start, head)
        let tail = head + middle
        try copyDirectly(from: file, at: place + tail, to: handle, at: start + tail, length - tail)
        return length
    }

    private func copyDirectly(
        from file: StorageHandle, at place: UInt64, to handle: StorageHandle, at start: UInt64, _ length: UInt64
    ) throws(DiskError) {
        guard length > 0 else { return }
        try buffers.withBuffer { (buffer) throws(DiskError) in
            var done: UInt64 = 0
            while done < length {
                let piece = buffer.slice(0, Int(min(UInt64(buffer.count), length - done)))
                try file.read(into: piece, at: place + done, for: .guestData)
                try handle.write(piece.readOnly, at: start + done, for: .guestData)
                done += UInt64(piece.count)
            }
        }
    }
}

/// Between which files the kernel copies.
private final class Transfers: Sendable {
    private struct Pair: Hashable {
        let source: ObjectIdentifier
        let target: ObjectIdentifier
    }

    private struct State {
        var known: [Pair: RangeTransfer?] = [:]
        /// How often a file's pieces could not be transferred.
        var failures: [ObjectIdentifier: Int] = [:]
    }

    /// Pieces of a file that lie elsewhere between borders of blocks than the target's, after which no more are tried:
    /// all others will lie so too.
    private static let failureLimit = 16
    private let state = Locked(State())

    func transfer(from source: StorageHandle, to target: StorageHandle) -> RangeTransfer? {
        let pair = Pair(source: ObjectIdentifier(source), target: ObjectIdentifier(target))
        return state.withLock { state in
            if let transfer = state.known[pair] { return transfer }
            let transfer = RangeTransfer(from: source.storage, to: target.storage)
            state.known[pair] = .some(transfer)
            return transfer
        }
    }

    /// Whether it is worth it to take room in the target for a piece of this file.
    func mayTransfer(from source: StorageHandle) -> Bool {
        state.withLock { $0.failures[ObjectIdentifier(source)] ?? 0 } < Self.failureLimit
    }

    /// A piece could not be transferred.
    func noteFailure(from source: StorageHandle) {
        state.withLock { $0.failures[ObjectIdentifier(source), default: 0] += 1 }
    }

    /// It was refused for good.
    func giveUp(from source: StorageHandle, to target: StorageHandle) {
        let pair = Pair(source: ObjectIdentifier(source), target: ObjectIdentifier(target))
        state.withLock { state in
            state.known[pair] = .some(nil)
            state.failures[pair.source] = Self.failureLimit
        }
    }
}

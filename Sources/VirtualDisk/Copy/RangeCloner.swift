internal import DiskStorage

/// Has the kernel make ranges of files share blocks, as far as they lie at borders of blocks in both; it remembers
/// between which files that is not to be had.
final class RangeCloner: Sendable {
    private struct Pair: Hashable {
        let source: ObjectIdentifier
        let target: ObjectIdentifier
    }

    private struct State {
        var known: [Pair: RangeTransfer?] = [:]
        /// How often a file's pieces could not be cloned.
        var failures: [ObjectIdentifier: Int] = [:]
    }

    /// Pieces of a file that lie elsewhere between borders of blocks than the target's, after which no more are tried:
    /// all others will lie so too.
    private static let failureLimit = 16
    private let isOn: Bool
    private let state = Locked(State())
    private let buffers = ScratchPool()

    /// Without `isOn` all goes through memory.
    init(isOn: Bool = true) { self.isOn = isOn }

    /// Has the top image of `target` share what `run` stores of a range, for who has the range's regions alone. Calls,
    /// in order, `zeros` with what `run` has as zeros, and `bytes` with what it holds and must go through memory. What
    /// it says nothing of is left out, or counts as zeros where nothing lies below it (`absentIsZero`).
    func share(
        _ range: Range<UInt64>, of run: LayerRun, into target: Chain, absentIsZero: Bool = false,
        zeros: (Range<UInt64>) throws(DiskError) -> Void, bytes: (Range<UInt64>) throws(DiskError) -> Void
    ) throws(DiskError) {
        var rest: Range<UInt64>?
        func endRest() throws(DiskError) {
            defer { rest = nil }
            if let rest { try bytes(rest) }
        }
        try run.forEachPieceAndHole(of: range) { (piece) throws(DiskError) in
            guard piece.holding == .data else {
                try endRest()
                if piece.holding == .zero || absentIsZero { try zeros(piece.range) }
                return true
            }
            let done = try clone(piece, of: run, into: target)
            if done > 0 { try endRest() }
            if done < piece.length { rest = (rest?.lowerBound ?? piece.offset + done)..<piece.end }
            return true
        }
        try endRest()
    }

    /// Clones the front of a piece; answers how many bytes that is.
    private func clone(_ piece: ChainPiece, of run: LayerRun, into target: Chain) throws(DiskError) -> UInt64 {
        guard case .stored(_, let place) = piece.content, let file = run.handle(of: piece) else { return 0 }
        var done: UInt64 = 0
        while done < piece.length {
            let count = try target.cloneLocked(
                file, at: place + done, to: piece.offset + done, piece.length - done, by: self)
            if count == 0 { break }
            done += count
        }
        return done
    }

    // MARK: - Files

    /// Whether the two files could share blocks.
    func canClone(from source: StorageHandle, to target: StorageHandle) -> Bool {
        isOn && transfer(from: source, to: target) != nil
    }

    private func transfer(from source: StorageHandle, to target: StorageHandle) -> RangeTransfer? {
        let pair = Pair(source: ObjectIdentifier(source), target: ObjectIdentifier(target))
        return state.withLock { state in
            if let transfer = state.known[pair] { return transfer }
            let transfer = RangeTransfer(from: source.storage, to: target.storage)
            state.known[pair] = .some(transfer)
            return transfer
        }
    }

    /// Whether it is worth it to take room in the target for a piece of this file.
    func isWorthwhile(from source: StorageHandle) -> Bool {
        state.withLock { $0.failures[ObjectIdentifier(source)] ?? 0 } < Self.failureLimit
    }

    /// A piece could not be cloned.
    func noteFailure(from source: StorageHandle) {
        state.withLock { $0.failures[ObjectIdentifier(source), default: 0] += 1 }
    }

    /// It was refused for good.
    private func giveUp(from source: StorageHandle, to target: StorageHandle) {
        let pair = Pair(source: ObjectIdentifier(source), target: ObjectIdentifier(target))
        state.withLock { state in
            state.known[pair] = .some(nil)
            state.failures[pair.source] = Self.failureLimit
        }
    }

    // MARK: - Ranges

    /// Clones `length` bytes from one place to another; what lies before the first and behind the last border of a
    /// block goes through memory. Answers 0, with nothing done, if the kernel cannot.
    func clone(
        from file: StorageHandle, at place: UInt64, to handle: StorageHandle, at start: UInt64, _ length: UInt64
    ) throws(DiskError) -> UInt64 {
        guard let transfer = transfer(from: file, to: handle), handle.isWritable else { return 0 }
        let block = transfer.alignment
        guard place & (block - 1) == start & (block - 1) else { return 0 }
        let head = min(length, (block - place & (block - 1)) & (block - 1))
        let middle = (length - head) & ~(block - 1)
        guard middle > 0 else { return 0 }
        do throws(DiskError) {
            guard try transfer.transfer(from: place + head, to: start + head, length: middle) else {
                giveUp(from: file, to: handle)
                return 0
            }
        } catch {
            throw error.about(handle.storage.name)
        }
        handle.noteWrite()
        try copy(from: file, at: place, to: handle, at: start, head)
        let tail = head + middle
        try copy(from: file, at: place + tail, to: handle, at: start + tail, length - tail)
        return length
    }

    /// Copies through memory.
    func copy(
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

public import DiskStorage

/// Places in a file that blocks of it gave up or never used, to be used again.
///
/// What is given up may still be pointed to from the disk; it can be taken when a flush that began after that is done.
public final class ReusableBlocks: Sendable {
    private struct State {
        /// Usable now.
        var free: FreeBlocks
        /// Given up since the last flush began.
        var givenUp: FreeBlocks
    }

    private let blockSize: UInt64
    private let state: Locked<State>

    /// None, of blocks of so many bytes each.
    public init(blockSize: UInt64) {
        self.blockSize = blockSize
        let none = FreeBlocks(blockSize: blockSize)
        state = Locked(State(free: none, givenUp: none))
    }

    /// Takes up to `count` blocks in one piece; nil if there are none.
    public func take(_ count: UInt64) -> FreeBlocks.Run? { state.withLock { $0.free.take(count) } }

    /// Takes back a block that was taken and not used; it may hold anything.
    public func putBack(_ offset: UInt64) { state.withLock { $0.free.add(offset, isZero: false) } }

    /// Adds blocks that nothing points to.
    public func add(_ run: FreeBlocks.Run) { state.withLock { $0.free.add(run) } }

    /// A block whose entry was just removed, and which reads as zeros unless `isZero` says otherwise.
    public func giveUp(_ offset: UInt64, isZero: Bool = true) {
        state.withLock { $0.givenUp.add(offset, isZero: isZero) }
    }

    /// Forgets all that could be taken.
    public func removeAll() { state.withLock { $0.free = FreeBlocks(blockSize: blockSize) } }

    /// The blocks that were given up before a flush begins.
    public func beginFlush() -> FreeBlocks {
        state.withLock { state in
            defer { state.givenUp = FreeBlocks(blockSize: blockSize) }
            return state.givenUp
        }
    }

    /// After the flush: nothing on the disk points to those blocks any more (or, if it failed, perhaps still).
    public func endFlush(_ givenUp: FreeBlocks, succeeded: Bool) {
        guard !givenUp.isEmpty else { return }
        state.withLock { state in
            if succeeded { state.free.add(givenUp) } else { state.givenUp.add(givenUp) }
        }
    }

    /// Runs a flush of everything; what was given up before it can be taken after it.
    public func release(after flush: () throws(DiskError) -> Void) throws(DiskError) {
        let givenUp = beginFlush()
        do throws(DiskError) {
            try flush()
        } catch {
            endFlush(givenUp, succeeded: false)
            throw error
        }
        endFlush(givenUp, succeeded: true)
    }

    /// Whether there is nothing that could be taken now.
    public var isEmpty: Bool { state.withLock { $0.free.isEmpty } }
}

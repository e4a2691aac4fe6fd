internal import DiskStorage
internal import Dispatch

/// Has the system begin to write out what went into newly allocated space while more is coming, so that the flush at
/// the end has little left to wait for.
///
/// Space that is just being allocated by large writes is being filled: by a restore, a copy, an installation. What is
/// overwritten in place is left to the system, which waits longer in case it is overwritten again.
final class EarlyWriteback: Sendable {
    /// Bytes after which the system is asked. Less keeps a disk busy as well, and is asked for more often.
    private static let step = 8 << 20
    /// Bytes of the shortest write that counts: to what small ones leave, their neighbours may come yet.
    static let smallestWrite = 64 << 10

    private let queue = DispatchQueue(label: "vdmount.writeback", qos: .utility)
    private let state = Locked(State())

    private struct State {
        /// Bytes written since the system was asked.
        var waiting = 0
        var isAsking = false
        /// Blocks of which a part was written so far; the one that began last is the last.
        var fronts: [Front] = []
    }

    /// How far a large block has been filled that was allocated by a write of a part of it: bytes of the disk.
    private struct Front {
        var next: UInt64
        let end: UInt64
    }

    /// Blocks that may be being filled at the same time.
    private static let frontLimit = 8
    /// How far ahead of the others a write may come; they arrive in any order.
    private static let reach: UInt64 = 16 << 20

    /// Notes that a block was allocated up to `end` and written up to `next`.
    func begin(filling next: UInt64, end: UInt64) {
        guard next < end else { return }
        state.withLock { state in
            if state.fronts.count == Self.frontLimit { state.fronts.removeFirst() }
            state.fronts.append(Front(next: next, end: end))
        }
    }

    /// Whether a write in place goes on with filling a block, and is not the second one there.
    func continues(at offset: UInt64, _ count: Int) -> Bool {
        state.withLock { state in
            let found = state.fronts.firstIndex {
                $0.next <= offset && offset < $0.end && offset - $0.next <= Self.reach
            }
            guard let found else { return false }
            state.fronts[found].next = offset + UInt64(count)
            if state.fronts[found].next >= state.fronts[found].end { state.fronts.remove(at: found) }
            return true
        }
    }

    /// Notes that so many bytes were written to a storage. Does not wait.
    func note(_ count: Int, in handle: StorageHandle) {
        let isDue = state.withLock { state in
            state.waiting += count
            guard state.waiting >= Self.step, !state.isAsking else { return false }
            (state.waiting, state.isAsking) = (0, true)
            return true
        }
        guard isDue else { return }
        queue.async { [storage = handle.storage] in
            storage.startWriteback()
            self.state.withLock { $0.isAsking = false }
        }
    }

    /// Returns when no storage is in use by it any more.
    func wait() { queue.sync {} }
}

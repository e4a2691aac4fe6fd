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
    }

    /// Notes that so many bytes were written to a storage. Does not wait.
    func note(_ count: Int, in handle: StorageHandle) {
        let isDue = state.withLock { state in
            state.waiting += count
            guard state.waiting >= Self.step, !state.isAsking else { return false }
            state = State(waiting: 0, isAsking: true)
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

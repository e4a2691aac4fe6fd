internal import DiskStorage
internal import Glibc

/// The chain that a disk has at the moment, and who uses it.
///
/// Requests reach it through a plain pointer, without counting references, while they hold a region lock; it is
/// replaced by who holds all of them. Whoever uses it without such a lock (a flush, a map, a search for data) is
/// counted, so that layers which are taken out of a disk are closed when nobody can be in them any more.
@safe
final class CurrentChain: @unchecked Sendable {  // the pointer changes under all region locks; the rest under the mutex
    private struct State {
        var chain: Chain
        /// Who uses this chain, and those before it that somebody still uses.
        var users: [ObjectIdentifier: Int] = [:]
    }

    private let state: Locked<State>
    private let pointer: UnsafeMutablePointer<Unmanaged<Chain>>

    init(_ chain: Chain) {
        state = Locked(State(chain: chain))
        unsafe pointer = .allocate(capacity: 1)
        unsafe pointer.initialize(to: .passUnretained(chain))
    }

    deinit { unsafe pointer.deallocate() }

    /// The chain, retained: to ask what does not depend on its images being open.
    var chain: Chain { state.withLock { $0.chain } }

    /// Runs `body` with the chain, for who holds a region lock meanwhile.
    @inline(__always)
    func withHeld(_ body: (Chain) throws(DiskError) -> Void) throws(DiskError) {
        let failure: DiskError? = unsafe pointer.pointee._withUnsafeGuaranteedRef { chain in
            do throws(DiskError) {
                try body(chain)
                return nil
            } catch {
                return error
            }
        }
        if let failure { throw failure }
    }

    /// Runs `body` with the chain, whose images stay open meanwhile; for who holds no region lock.
    func use(_ body: (Chain) throws(DiskError) -> Void) throws(DiskError) {
        let chain = state.withLock { state in
            state.users[ObjectIdentifier(state.chain), default: 0] += 1
            return state.chain
        }
        defer {
            state.withLock { state in
                let key = ObjectIdentifier(chain)
                let left = (state.users[key] ?? 1) - 1
                state.users[key] = left > 0 ? left : nil
            }
        }
        try body(chain)
    }

    /// Puts another chain in its place, for who holds all region locks; answers the one before.
    func replace(with chain: Chain) -> Chain {
        state.withLock { state in
            let old = state.chain
            state.chain = chain
            unsafe pointer.pointee = .passUnretained(chain)
            return old
        }
    }

    /// Returns when nobody uses a chain that was replaced.
    func waitUntilUnused(_ chain: Chain) {
        while state.withLock({ $0.users[ObjectIdentifier(chain)] != nil }) { usleep(1000) }
    }
}

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
        /// How many use it without a region lock.
        var users = 0
        /// Whether it is about to be replaced: nobody new may use it.
        var isChanging = false
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
        var chain: Chain?
        while chain == nil {
            chain = state.withLock { state in
                guard !state.isChanging else { return nil }
                state.users += 1
                return state.chain
            }
            if chain == nil { usleep(500) }
        }
        defer { state.withLock { $0.users -= 1 } }
        if let chain { try body(chain) }
    }

    /// Runs `body`, which may put another chain in the place of this one, while nobody uses it and all regions are
    /// locked. The chain that `body` leaves is there afterwards, also if it throws.
    func change(_ locks: RegionLocks, _ body: (inout Chain) throws(DiskError) -> Void) throws(DiskError) {
        // Who uses it may use it again inside: nobody new is kept out before all are gone.
        while !state.withLock({ state in
            guard state.users == 0, !state.isChanging else { return false }
            state.isChanging = true
            return true
        }) { usleep(500) }
        locks.lockAll()
        var chain = state.withLock { $0.chain }
        defer {
            state.withLock { state in
                state.chain = chain
                unsafe pointer.pointee = .passUnretained(chain)
            }
            locks.unlockAll()
            state.withLock { $0.isChanging = false }
        }
        try body(&chain)
    }
}

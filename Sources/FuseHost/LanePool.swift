import Dispatch
internal import FuseShim
import Glibc
import Synchronization

/// The lanes of a session: each is a long-lived work item on a Dispatch queue of its own (so that it surely gets a
/// thread), which receives a request, answers it, and waits for the next.
///
/// The pool grows with the load: a lane that takes a request while no other lane waits for one starts another, up to
/// a maximum. It shrinks when more lanes wait than are worth keeping: a lane that would be one too many ends and frees
/// its buffer. All end when the kernel says that the mount is gone.
// Sendable: constants and one atomic; the session is only used in ways libfuse allows on any thread.
@safe final class LanePool: @unchecked Sendable {
    private let session: OpaquePointer
    private let maximum: Int
    private let kept: Int
    private let ended: Int32
    /// Two counters in one word, so that one atomic instruction a transition suffices: lanes that exist in the upper
    /// half, lanes that wait for a request in the lower.
    private let counts = Atomic<UInt64>(0)
    private let failure = Atomic<Int32>(0)

    private static let oneLane: UInt64 = 1 << 32
    private static let waitingMask: UInt64 = oneLane - 1

    /// - Parameter ended: an event descriptor, raised when the last lane has ended.
    init(session: OpaquePointer, maximum: Int, kept: Int, ended: Int32) {
        unsafe self.session = unsafe session
        self.maximum = max(1, maximum)
        self.kept = max(1, kept)
        self.ended = ended
    }

    /// The errno value a lane ended with, 0 if all ended because the mount was gone.
    var endFailure: Int32 { failure.load(ordering: .relaxed) }

    func start(_ count: Int) {
        let count = min(max(1, count), maximum)
        // All at once, so that the pool is not empty before the last has started.
        counts.add(UInt64(count) * (Self.oneLane + 1), ordering: .relaxed)
        for _ in 0..<count { launch() }
    }

    /// A lane that is launched counts as waiting from now on.
    private func launch() {
        DispatchQueue(label: "vdmount.lane", qos: .default).async { self.run() }
    }

    private func run() {
        guard let lane = unsafe fuseshim_lane_new(session) else {
            // Without memory for one more, the others go on.
            leave(failure: ENOMEM)
            return
        }
        while true {
            let size = unsafe fuseshim_lane_receive(lane)
            guard size > 0 else {
                unsafe fuseshim_lane_free(lane)
                leave(failure: Int32(clamping: -size))
                return
            }
            let counted = counts.wrappingSubtract(1, ordering: .relaxed).newValue
            if counted & Self.waitingMask == 0 { grow(counted) }
            unsafe fuseshim_lane_process(lane)
            if shrink() {
                unsafe fuseshim_lane_free(lane)
                return
            }
        }
    }

    /// Starts one more lane unless there are enough or somebody else just did.
    private func grow(_ counted: UInt64) {
        guard counted >> 32 < UInt64(maximum) else { return }
        let wanted = counted + Self.oneLane + 1
        if counts.compareExchange(expected: counted, desired: wanted, ordering: .relaxed).exchanged { launch() }
    }

    /// Whether this lane, done with its request, is one too many; otherwise it counts as waiting.
    private func shrink() -> Bool {
        let counted = counts.load(ordering: .relaxed)
        if counted & Self.waitingMask >= UInt64(kept),
            counts.compareExchange(expected: counted, desired: counted - Self.oneLane, ordering: .relaxed).exchanged
        {
            return true
        }
        counts.add(1, ordering: .relaxed)
        return false
    }

    /// The end of a lane that was waiting.
    private func leave(failure code: Int32) {
        if code != 0 { failure.store(code, ordering: .relaxed) }
        let left = counts.wrappingSubtract(Self.oneLane + 1, ordering: .acquiringAndReleasing).newValue
        if left >> 32 == 0 { fuseshim_event_raise(ended) }
    }
}

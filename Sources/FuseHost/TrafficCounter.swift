import Synchronization

/// Counts bytes without the lanes meeting in one word: each adds to one of a few counters, by where its buffer lies.
final class TrafficCounter: Sendable {
    /// Alone on its cache lines.
    private struct Stripe: ~Copyable {
        let bytes = Atomic<UInt64>(0)
        private let padding = InlineArray<15, UInt64>(repeating: 0)
    }

    private let stripes = InlineArray<8, Stripe> { _ in Stripe() }

    /// Adds bytes that are, or were, in a lane's buffer.
    @inline(__always)
    func add(_ count: Int, _ buffer: UnsafeRawPointer?) {
        let address = UInt(bitPattern: buffer)
        stripes[Int((address >> 20 ^ address >> 12) & 7)].bytes.add(UInt64(count), ordering: .relaxed)
    }

    /// All that was added.
    var total: UInt64 {
        var sum: UInt64 = 0
        for index in stripes.indices { sum &+= stripes[index].bytes.load(ordering: .relaxed) }
        return sum
    }
}

internal import CLinux

/// Which chunk of the disk is in which slot of the cache, and when it was used last.
///
/// Looking up and noting a use take no lock. Everything else is called under the cache's. A slot's *generation* is odd
/// while it holds nothing: who finds a chunk and reads it knows by the same even number afterwards that the slot held
/// it all the time. Who misses a chunk only because its chain was being changed finds it under the lock.
///
/// Time is the number of bytes that were found so far. When a slot is needed, the chunk that was used longest ago goes:
/// in a heap, in which a chunk has the time when it was looked at last; only when it comes to the top it gets the time
/// of its last use, and its place by that.
///
/// What large sequential reads bring goes to the *window*, a short queue in which it stays while they still use it, and
/// from there to the end of the order, where it is evicted next: such reads cost the others no more than the window's
/// slots, however long they go on.
@safe
final class CacheIndex: @unchecked Sendable {  // what is read without the lock is accessed atomically
    /// No slot.
    static let none: Int32 = -1
    /// The first time of use. Those before it are of chunks that large sequential reads brought.
    private static let timeBase: UInt64 = 1 << 62
    /// The time of a chunk in the window.
    private static let inWindow = UInt64.max

    private enum Place {
        static let free: UInt8 = 0
        /// Taken for a chunk that is being written.
        static let taken: UInt8 = 1
        static let used: UInt8 = 2
        static let window: UInt8 = 3
    }

    private let slotCount: Int
    /// For each slot: its chunk, when it was used last, the next slot with the same hash, the generation.
    private let chunks: UnsafeMutablePointer<UInt64>
    private let times: UnsafeMutablePointer<UInt64>
    private let hashNext: UnsafeMutablePointer<Int32>
    private let generations: UnsafeMutablePointer<UInt32>
    /// The first slot of each hash.
    private let buckets: UnsafeMutablePointer<Int32>
    private let hashShift: UInt64
    /// Bytes that were found; alone in what processors share.
    private let clock: UnsafeMutablePointer<UInt64>
    private static let clockWords = 32

    private var places: [UInt8]
    private var order = EvictionOrder()
    private var window: [Int32] = []
    private let windowLimit: Int
    /// The next time of a chunk that leaves the window: before those that left it earlier.
    private var coldTime = CacheIndex.timeBase
    /// Free slots, the next one last.
    private var free: [Int32]
    private var startTime = CacheIndex.timeBase

    /// An empty index. There is at least one slot, and no more than 2^30.
    init(slotCount: Int) {
        self.slotCount = slotCount
        var bits: UInt64 = 1
        while 1 << bits < slotCount { bits += 1 }
        hashShift = 64 - bits
        unsafe chunks = .allocate(capacity: slotCount)
        unsafe chunks.initialize(repeating: 0, count: slotCount)
        unsafe times = .allocate(capacity: slotCount)
        unsafe times.initialize(repeating: 0, count: slotCount)
        unsafe hashNext = .allocate(capacity: slotCount)
        unsafe hashNext.initialize(repeating: Self.none, count: slotCount)
        unsafe generations = .allocate(capacity: slotCount)
        unsafe generations.initialize(repeating: 1, count: slotCount)
        unsafe buckets = .allocate(capacity: 1 << bits)
        unsafe buckets.initialize(repeating: Self.none, count: 1 << bits)
        unsafe clock = .allocate(capacity: Self.clockWords)
        unsafe clock.initialize(repeating: 0, count: Self.clockWords)
        places = Array(repeating: Place.free, count: slotCount)
        windowLimit = min(64, max(1, slotCount / 8))
        free = (0..<Int32(slotCount)).reversed()
    }

    deinit {
        unsafe chunks.deallocate()
        unsafe times.deallocate()
        unsafe hashNext.deallocate()
        unsafe generations.deallocate()
        unsafe buckets.deallocate()
        unsafe clock.deallocate()
    }

    // MARK: - Without the lock

    @inline(__always)
    private func bucket(_ chunk: UInt64) -> Int { Int((chunk &* 0x9e37_79b9_7f4a_7c15) >> hashShift) }

    /// The slot with a chunk, and its generation; ``none`` if it was not found.
    @inline(__always)
    func find(_ chunk: UInt64) -> (slot: Int32, generation: UInt32) {
        var slot = unsafe Int32(bitPattern: clinux_load32_acquire(buckets + bucket(chunk)))
        // A chain that is being changed may lead into another one, and round.
        var steps = 0
        while slot >= 0, steps < 64 {
            let generation = unsafe clinux_load32_acquire(generations + Int(slot))
            if generation & 1 == 0, unsafe clinux_load64_relaxed(chunks + Int(slot)) == chunk {
                return (slot, generation)
            }
            slot = unsafe Int32(bitPattern: clinux_load32_relaxed(hashNext + Int(slot)))
            steps &+= 1
        }
        return (Self.none, 0)
    }

    /// Whether a slot is still of the generation that was found, after what was read in between.
    @inline(__always)
    func isStill(_ slot: Int32, _ generation: UInt32) -> Bool {
        unsafe clinux_fence_acquire(clock + 1)
        return unsafe clinux_load32_relaxed(generations + Int(slot)) == generation
    }

    /// So many bytes are read from chunks that were found: the time for ``touch(_:_:)``.
    @inline(__always)
    func advance(_ bytes: Int) -> UInt64 {
        unsafe Self.timeBase &+ clinux_fetch_add64_relaxed(clock, UInt64(bytes))
    }

    /// A chunk that was found is used. Reading one piece by piece is no reason to keep what a large sequential read
    /// brought.
    @inline(__always)
    func touch(_ slot: Int32, _ time: UInt64) {
        guard unsafe clinux_load64_relaxed(times + Int(slot)) != Self.inWindow else { return }
        unsafe clinux_store64_relaxed(times + Int(slot), time)
    }

    /// Bytes that were found so far.
    var foundBytes: UInt64 { unsafe clinux_load64_relaxed(clock) &- (startTime &- Self.timeBase) }

    // MARK: - Under the lock

    /// How many chunks there are.
    var count: Int { order.count + window.count }

    /// Takes a slot for a chunk that is to be written: a free one, or the one whose chunk is evicted. ``none``: all are
    /// taken. Who finds what was in it knows from now on that it is gone.
    func take() -> Int32 {
        var slot = free.popLast() ?? Self.none
        if slot < 0 {
            slot = evict()
            guard slot >= 0 else { return Self.none }
        }
        places[Int(slot)] = Place.taken
        return slot
    }

    /// Gives a taken slot back.
    func giveBack(_ slot: Int32) {
        places[Int(slot)] = Place.free
        free.append(slot)
    }

    /// A taken slot holds a chunk from now on, which is in no other. `isCold`: it came with a large sequential read.
    func insert(_ chunk: UInt64, in slot: Int32, isCold: Bool) {
        unsafe clinux_store64_relaxed(chunks + Int(slot), chunk)
        if isCold {
            unsafe clinux_store64_relaxed(times + Int(slot), Self.inWindow)
            places[Int(slot)] = Place.window
            window.append(slot)
            if window.count > windowLimit { leaveWindow() }
        } else {
            let time = advance(1)
            startTime &+= 1
            unsafe clinux_store64_relaxed(times + Int(slot), time)
            places[Int(slot)] = Place.used
            order.insert(slot, time)
        }
        let bucket = bucket(chunk)
        unsafe clinux_store32_relaxed(hashNext + Int(slot), clinux_load32_relaxed(buckets + bucket))
        unsafe clinux_store32_release(generations + Int(slot), clinux_load32_relaxed(generations + Int(slot)) &+ 1)
        unsafe clinux_store32_release(buckets + bucket, UInt32(bitPattern: slot))
    }

    /// Fills an empty index: slots and chunks, in the order of use, none of them twice.
    func fill(_ chunks: some Sequence<(slot: Int32, chunk: UInt64)>) {
        for (slot, chunk) in chunks {
            precondition(places[Int(slot)] == Place.free)
            places[Int(slot)] = Place.taken
            insert(chunk, in: slot, isCold: false)
        }
        free = (0..<Int32(slotCount)).reversed().filter { places[Int($0)] == Place.free }
    }

    /// Slots and chunks in the order of use, the one that is evicted first first.
    func all() -> [(slot: Int32, chunk: UInt64)] {
        var slots = (0..<Int32(slotCount)).filter { places[Int($0)] == Place.used }
        slots.sort { time($0) < time($1) }
        // The window's oldest would leave it first, and the others would go before it.
        return (window.reversed() + slots).map { ($0, unsafe chunks[Int($0)]) }
    }

    private func time(_ slot: Int32) -> UInt64 { unsafe clinux_load64_relaxed(times + Int(slot)) }

    private func leaveWindow() {
        let slot = window.removeFirst()
        coldTime &-= 1
        unsafe clinux_store64_relaxed(times + Int(slot), coldTime)
        places[Int(slot)] = Place.used
        order.insert(slot, coldTime)
    }

    private func evict() -> Int32 {
        // Each chunk may have been used since it was looked at; who uses them all the time ends here too.
        var steps = 0
        while let (slot, known) = order.first {
            let time = time(slot)
            if time != known, steps < 2 * slotCount {
                order.replaceFirst(time)
                steps += 1
                continue
            }
            order.removeFirst()
            forget(slot)
            return slot
        }
        guard !window.isEmpty else { return Self.none }
        let slot = window.removeFirst()
        forget(slot)
        return slot
    }

    private func forget(_ slot: Int32) {
        unsafe clinux_store32_relaxed(generations + Int(slot), clinux_load32_relaxed(generations + Int(slot)) &+ 1)
        // Before anything else of the slot changes, in the file too.
        clinux_fence_release()
        let bucket = unsafe bucket(chunks[Int(slot)])
        let next = unsafe clinux_load32_relaxed(hashNext + Int(slot))
        var other = unsafe Int32(bitPattern: clinux_load32_relaxed(buckets + bucket))
        guard other != slot else { return unsafe clinux_store32_release(buckets + bucket, next) }
        while other >= 0 {
            let after = unsafe Int32(bitPattern: clinux_load32_relaxed(hashNext + Int(other)))
            if after == slot { return unsafe clinux_store32_relaxed(hashNext + Int(other), next) }
            other = after
        }
    }
}

/// Slots by a time each, the smallest first: a binary heap.
private struct EvictionOrder {
    private var entries: [(slot: Int32, time: UInt64)] = []

    var count: Int { entries.count }
    var first: (slot: Int32, time: UInt64)? { entries.first }

    mutating func insert(_ slot: Int32, _ time: UInt64) {
        var index = entries.count
        entries.append((slot, time))
        while index > 0, time < entries[(index - 1) / 2].time {
            entries[index] = entries[(index - 1) / 2]
            index = (index - 1) / 2
        }
        entries[index] = (slot, time)
    }

    /// Gives the first one another time.
    mutating func replaceFirst(_ time: UInt64) { sink((entries[0].slot, time)) }

    mutating func removeFirst() {
        let last = entries.removeLast()
        if !entries.isEmpty { sink(last) }
    }

    /// Puts an entry in the place of the first one, and from there where it belongs.
    private mutating func sink(_ entry: (slot: Int32, time: UInt64)) {
        var index = 0
        while true {
            var child = 2 * index + 1
            guard child < entries.count else { break }
            if child + 1 < entries.count, entries[child + 1].time < entries[child].time { child += 1 }
            guard entries[child].time < entry.time else { break }
            entries[index] = entries[child]
            index = child
        }
        entries[index] = entry
    }
}

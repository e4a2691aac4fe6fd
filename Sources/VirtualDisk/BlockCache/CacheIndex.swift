/// Which chunk of the disk is in which slot of the cache, and in which order they were used. Nothing of it is locked.
///
/// Chunks are in a list by use, the last used one first. What large sequential reads bring goes to the *window*, a
/// short queue in which it stays while they still use it, and from there to the end of the list, where it is evicted
/// next: such reads cost the others no more than the window's slots, however long they go on.
struct CacheIndex {
    /// No slot.
    static let none: Int32 = -1

    private enum Place {
        static let free: UInt8 = 0
        /// Taken for a chunk that is being written.
        static let taken: UInt8 = 1
        static let used: UInt8 = 2
        static let window: UInt8 = 3
    }

    /// A list of slots, linked by ``next`` and ``previous``.
    private struct List {
        var head = CacheIndex.none
        var tail = CacheIndex.none
        var count = 0
    }

    /// For each slot: its chunk, its place, its neighbours in the list it is in, the next one with the same hash.
    private var chunks: [UInt64]
    private var places: [UInt8]
    private var next: [Int32]
    private var previous: [Int32]
    private var hashNext: [Int32]
    /// The first slot of each hash.
    private var buckets: [Int32]
    private let hashShift: UInt64
    private var used = List()
    private var window = List()
    private let windowLimit: Int
    private var firstFree: Int32

    /// An empty index. There is at least one slot, and no more than 2^30.
    init(slotCount: Int) {
        chunks = Array(repeating: 0, count: slotCount)
        places = Array(repeating: Place.free, count: slotCount)
        next = (0..<slotCount).map { $0 + 1 < slotCount ? Int32($0 + 1) : Self.none }
        previous = Array(repeating: Self.none, count: slotCount)
        hashNext = Array(repeating: Self.none, count: slotCount)
        var bits: UInt64 = 1
        while 1 << bits < slotCount { bits += 1 }
        buckets = Array(repeating: Self.none, count: 1 << bits)
        hashShift = 64 - bits
        windowLimit = min(64, max(1, slotCount / 8))
        firstFree = 0
    }

    /// How many chunks there are.
    var count: Int { used.count + window.count }

    @inline(__always)
    private func bucket(_ chunk: UInt64) -> Int { Int((chunk &* 0x9e37_79b9_7f4a_7c15) >> hashShift) }

    /// The slot with a chunk, or ``none``.
    @inline(__always)
    func slot(of chunk: UInt64) -> Int32 {
        var slot = buckets[bucket(chunk)]
        while slot >= 0, chunks[Int(slot)] != chunk { slot = hashNext[Int(slot)] }
        return slot
    }

    /// A chunk was used. Answers whether that changed the order.
    @inline(__always)
    mutating func touch(_ slot: Int32) -> Bool {
        if used.head == slot { return false }
        unlink(slot)
        append(slot)
        return true
    }

    // MARK: - Coming and going

    /// Takes a slot for a chunk that is to be written: a free one, or the one whose chunk is evicted. ``none``: all are
    /// taken.
    mutating func take() -> Int32 {
        var slot = firstFree
        if slot >= 0 {
            firstFree = next[Int(slot)]
        } else {
            slot = used.tail >= 0 ? used.tail : window.tail
            guard slot >= 0 else { return Self.none }
            unlink(slot)
            removeHash(slot)
        }
        places[Int(slot)] = Place.taken
        return slot
    }

    /// Takes that very slot, which is free, out of an index that is being filled; ``rebuildFree()`` follows.
    mutating func takeFree(_ slot: Int32) -> Bool {
        guard places[Int(slot)] == Place.free else { return false }
        places[Int(slot)] = Place.taken
        return true
    }

    /// Gives a taken slot back.
    mutating func giveBack(_ slot: Int32) {
        places[Int(slot)] = Place.free
        next[Int(slot)] = firstFree
        firstFree = slot
    }

    /// A taken slot holds a chunk from now on, which is in no other. `isCold`: it came with a large sequential read.
    mutating func insert(_ chunk: UInt64, in slot: Int32, isCold: Bool) {
        chunks[Int(slot)] = chunk
        let bucket = bucket(chunk)
        hashNext[Int(slot)] = buckets[bucket]
        buckets[bucket] = slot
        guard isCold else { return append(slot) }
        link(slot, Place.window, isInFront: true)
        guard window.count > windowLimit else { return }
        let oldest = window.tail
        unlink(oldest)
        link(oldest, Place.used, isInFront: false)
    }

    /// The free slots are those that are not taken, in the order of the file.
    mutating func rebuildFree() {
        firstFree = Self.none
        for slot in places.indices.reversed() where places[slot] == Place.free {
            next[slot] = firstFree
            firstFree = Int32(slot)
        }
    }

    /// Calls `body` with slots and chunks, the one that is evicted first first.
    func forEachByUse(_ body: (Int32, UInt64) -> Void) {
        // The window's oldest would go to the list's end first, and the others behind it.
        var slot = window.head
        while slot >= 0 {
            body(slot, chunks[Int(slot)])
            slot = next[Int(slot)]
        }
        slot = used.tail
        while slot >= 0 {
            body(slot, chunks[Int(slot)])
            slot = previous[Int(slot)]
        }
    }

    // MARK: - Lists

    @inline(__always)
    private mutating func append(_ slot: Int32) {
        link(slot, Place.used, isInFront: true)
    }

    /// Puts a slot in front of the list of a place, or behind it.
    private mutating func link(_ slot: Int32, _ place: UInt8, isInFront: Bool) {
        var list = place == Place.window ? window : used
        let (before, after) = isInFront ? (Self.none, list.head) : (list.tail, Self.none)
        previous[Int(slot)] = before
        next[Int(slot)] = after
        if before >= 0 { next[Int(before)] = slot } else { list.head = slot }
        if after >= 0 { previous[Int(after)] = slot } else { list.tail = slot }
        list.count += 1
        if place == Place.window { window = list } else { used = list }
        places[Int(slot)] = place
    }

    private mutating func unlink(_ slot: Int32) {
        let isInWindow = places[Int(slot)] == Place.window
        var list = isInWindow ? window : used
        let (before, after) = (previous[Int(slot)], next[Int(slot)])
        if before >= 0 { next[Int(before)] = after } else { list.head = after }
        if after >= 0 { previous[Int(after)] = before } else { list.tail = before }
        list.count -= 1
        if isInWindow { window = list } else { used = list }
    }

    private mutating func removeHash(_ slot: Int32) {
        let bucket = bucket(chunks[Int(slot)])
        var other = buckets[bucket]
        if other == slot {
            buckets[bucket] = hashNext[Int(slot)]
            return
        }
        while hashNext[Int(other)] != slot { other = hashNext[Int(other)] }
        hashNext[Int(other)] = hashNext[Int(slot)]
    }
}

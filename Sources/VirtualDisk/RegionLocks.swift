internal import CLinux

/// Shared and exclusive locks on regions of the disk, for as long as a request works there.
///
/// Reads and writes in place share a region; whatever changes the mapping (allocation, discard) has it alone. Taking
/// and giving back an uncontended shared lock is one atomic operation each, in a cache line that only requests to the
/// same region touch. Regions are hashed onto a fixed number of locks; two neighbours never get the same one.
@safe
final class RegionLocks: @unchecked Sendable {  // the words are only accessed atomically
    private static let count = 64
    private static let stride = 64
    /// Set while one has the region alone.
    private static let exclusive: UInt32 = 1 << 31
    /// Set while one wants the region alone: nobody new may share it.
    private static let wanted: UInt32 = 1 << 30

    private let words: UnsafeMutableRawPointer
    private let shift: UInt64

    /// Regions of 1 MiB, or of a block where blocks are larger.
    init(blockSize: UInt64) {
        shift = UInt64(max(blockSize, 1 << 20).trailingZeroBitCount)
        unsafe words = .allocate(byteCount: Self.count * Self.stride, alignment: Self.stride)
        unsafe words.initializeMemory(as: UInt8.self, repeating: 0, count: Self.count * Self.stride)
    }

    deinit { unsafe words.deallocate() }

    /// The bytes of a region.
    var regionSize: UInt64 { 1 << shift }

    /// The locks of a range that touches at most two regions, in the order in which they are taken.
    @inline(__always)
    private func locks(_ offset: UInt64, _ length: UInt64) -> (UnsafeMutableRawPointer, UnsafeMutableRawPointer?) {
        let first = offset >> shift
        let last = (offset &+ max(length, 1) &- 1) >> shift
        precondition(last &- first <= 1)
        let a = Int(first & UInt64(Self.count - 1))
        guard last != first else { return unsafe (words + a &* Self.stride, nil) }
        let b = Int(last & UInt64(Self.count - 1))
        return unsafe (words + min(a, b) &* Self.stride, words + max(a, b) &* Self.stride)
    }

    @inline(__always)
    func lockShared(_ offset: UInt64, _ length: UInt64) {
        let (first, second) = unsafe locks(offset, length)
        unsafe Self.share(first)
        if let second = unsafe second { unsafe Self.share(second) }
    }

    @inline(__always)
    func unlockShared(_ offset: UInt64, _ length: UInt64) {
        let (first, second) = unsafe locks(offset, length)
        if let second = unsafe second { unsafe Self.unshare(second) }
        unsafe Self.unshare(first)
    }

    func lockExclusive(_ offset: UInt64, _ length: UInt64) {
        let (first, second) = unsafe locks(offset, length)
        unsafe Self.take(first)
        if let second = unsafe second { unsafe Self.take(second) }
    }

    /// The same, if nobody has a region of the range, or waits for one. Answers whether it was locked.
    func tryLockExclusive(_ offset: UInt64, _ length: UInt64) -> Bool {
        let (first, second) = unsafe locks(offset, length)
        guard unsafe clinux_compare_exchange32(first, 0, Self.exclusive) else { return false }
        guard let second = unsafe second, unsafe !clinux_compare_exchange32(second, 0, Self.exclusive) else {
            return true
        }
        unsafe Self.giveBack(first)
        return false
    }

    func unlockExclusive(_ offset: UInt64, _ length: UInt64) {
        let (first, second) = unsafe locks(offset, length)
        if let second = unsafe second { unsafe Self.giveBack(second) }
        unsafe Self.giveBack(first)
    }

    /// All regions at once.
    func lockAll() { for number in 0..<Self.count { unsafe Self.take(words + number &* Self.stride) } }

    func unlockAll() {
        for number in (0..<Self.count).reversed() { unsafe Self.giveBack(words + number &* Self.stride) }
    }

    @inline(__always)
    private static func share(_ word: UnsafeMutableRawPointer) {
        if unsafe clinux_fetch_add32(word, 1) & (exclusive | wanted) != 0 { unsafe shareSlowly(word) }
    }

    @inline(never)
    private static func shareSlowly(_ word: UnsafeMutableRawPointer) {
        while true {
            unsafe unshare(word)
            var value = unsafe clinux_load32_acquire(word)
            while value & (exclusive | wanted) != 0 {
                unsafe clinux_futex_wait(word.assumingMemoryBound(to: UInt32.self), value)
                value = unsafe clinux_load32_acquire(word)
            }
            if unsafe clinux_fetch_add32(word, 1) & (exclusive | wanted) == 0 { return }
        }
    }

    @inline(__always)
    private static func unshare(_ word: UnsafeMutableRawPointer) {
        let before = unsafe clinux_fetch_sub32(word, 1)
        if before & wanted != 0 { unsafe clinux_futex_wake_all(word.assumingMemoryBound(to: UInt32.self)) }
    }

    private static func take(_ word: UnsafeMutableRawPointer) {
        while true {
            let value = unsafe clinux_load32_acquire(word)
            if value & ~wanted == 0 {
                if unsafe clinux_compare_exchange32(word, value, exclusive) { return }
                continue
            }
            if value & wanted == 0 {
                _ = unsafe clinux_fetch_or32(word, wanted)
                continue
            }
            unsafe clinux_futex_wait(word.assumingMemoryBound(to: UInt32.self), value)
        }
    }

    private static func giveBack(_ word: UnsafeMutableRawPointer) {
        _ = unsafe clinux_fetch_and32(word, ~(exclusive | wanted))
        unsafe clinux_futex_wake_all(word.assumingMemoryBound(to: UInt32.self))
    }
}

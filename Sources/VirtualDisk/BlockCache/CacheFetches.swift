internal import CLinux
internal import Glibc

/// What is being read from the images into the cache: who misses the same meanwhile waits for it.
///
/// Entries are only touched under the cache's lock. Each has a word that changes when it is done, to wait for without
/// the lock.
@safe
final class CacheFetches: @unchecked Sendable {  // the words are only accessed atomically, the entries under a lock
    private struct Entry {
        var chunks: Range<UInt64> = 0..<0
        var waiters = 0
    }

    private static let count = 32
    private var entries = [Entry](repeating: Entry(), count: CacheFetches.count)
    private let words: UnsafeMutablePointer<UInt32>

    init() {
        unsafe words = .allocate(capacity: Self.count)
        unsafe words.initialize(repeating: 0, count: Self.count)
    }

    deinit { unsafe words.deallocate() }

    /// Which entry a chunk is in, if it is in one.
    func number(of chunk: UInt64) -> Int? { entries.firstIndex { $0.chunks.contains(chunk) } }

    /// Enters chunks; nil if there is no room.
    func begin(_ chunks: Range<UInt64>) -> Int? {
        guard let number = entries.firstIndex(where: { $0.chunks.isEmpty }) else { return nil }
        entries[number] = Entry(chunks: chunks)
        return number
    }

    /// Announces that ``wait(_:_:)`` follows, and answers what to give to it.
    func willWait(_ number: Int) -> UInt32 {
        entries[number].waiters += 1
        return unsafe clinux_load32_acquire(words + number)
    }

    /// Waits, without the lock, until an entry is done.
    func wait(_ number: Int, _ word: UInt32) {
        while unsafe clinux_load32_acquire(words + number) == word { unsafe clinux_futex_wait(words + number, word) }
    }

    /// An entry is done; answers whether somebody is to be woken.
    func end(_ number: Int) -> Bool {
        defer { entries[number] = Entry() }
        _ = unsafe clinux_fetch_add32(words + number, 1)
        return entries[number].waiters > 0
    }

    /// Wakes, without the lock, who waits for an entry that is done.
    func wake(_ number: Int) { unsafe clinux_futex_wake_all(words + number) }
}

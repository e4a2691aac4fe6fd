internal import CLinux
internal import DiskStorage

/// What is done with writes that change nothing: ``DiskOptions/honorsZeros`` and ``DiskOptions/honorsSame``.
struct WritePolicy: Sendable {
    var honorsZeros = false
    var honorsSame = true
}

extension DiskOptions {
    var writePolicy: WritePolicy { WritePolicy(honorsZeros: honorsZeros, honorsSame: honorsSame) }
}

/// Whether the top image has been told that changes are coming, and whether there were any since the last flush.
@safe
final class WritingState: @unchecked Sendable {  // two words that are only accessed atomically
    private let words: UnsafeMutablePointer<UInt32>
    private let beginning = Locked(false)

    init() {
        unsafe words = .allocate(capacity: 2)
        unsafe words.initialize(repeating: 0, count: 2)
    }

    deinit { unsafe words.deallocate() }

    /// Whether changes were announced.
    var hasBegun: Bool { unsafe clinux_load32_acquire(words) != 0 }
    /// Whether there may have been changes since the last flush.
    @inline(__always) var isChanged: Bool { unsafe clinux_load32_acquire(words + 1) != 0 }

    func noteFlush() { unsafe clinux_store32_release(words + 1, 0) }
    func noteChange() { unsafe clinux_store32_release(words + 1, 1) }

    func begin(_ body: () throws(DiskError) -> Void) throws(DiskError) {
        try beginning.withLock { (_) throws(DiskError) in
            if unsafe clinux_load32_acquire(words) == 0 {
                try body()
                unsafe clinux_store32_release(words, 1)
            }
            noteChange()
        }
    }
}

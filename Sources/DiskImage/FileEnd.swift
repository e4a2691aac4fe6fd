internal import CLinux

/// Where a growing file ends: written by its allocator, read by translation without a lock.
@safe
public final class FileEndCell: @unchecked Sendable {  // one word that is only accessed atomically
    private let word: UnsafeMutablePointer<UInt64>

    public init(_ value: UInt64) {
        unsafe word = .allocate(capacity: 1)
        unsafe word.initialize(to: value)
    }

    deinit { unsafe word.deallocate() }

    /// The end in bytes; whoever sets it is the only one who does.
    public var value: UInt64 {
        get { unsafe clinux_load64_acquire(word) }
        set { unsafe clinux_store64_release(word, newValue) }
    }

    /// For plain values that live no longer than this object.
    public var reader: FileEnd { unsafe FileEnd(word: word) }
}

/// Reads a ``FileEndCell`` without counting references.
@safe
public struct FileEnd: @unchecked Sendable {  // only reads, atomically
    fileprivate let word: UnsafeMutablePointer<UInt64>
    /// The end in bytes.
    @inline(__always) public var value: UInt64 { unsafe clinux_load64_relaxed(word) }
}

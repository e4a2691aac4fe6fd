internal import CLinux
internal import Glibc

/// What is known of each block of an image, a byte each: set and read by many threads without a lock.
///
/// The memory is taken from the system as it is touched, so that it costs what is looked at.
@safe
public final class BlockMarks: @unchecked Sendable {  // bytes that are only accessed atomically
    /// The most blocks; images with more do without.
    public static let limit: UInt64 = 1 << 24

    private let bytes: UnsafeMutablePointer<UInt8>
    private let count: UInt64

    /// All marks 0; nil if there are too many blocks, or no memory.
    public init?(count: UInt64) {
        guard count <= Self.limit, let memory = unsafe calloc(max(1, Int(count)), 1) else { return nil }
        unsafe bytes = memory.assumingMemoryBound(to: UInt8.self)
        self.count = count
    }

    deinit { unsafe free(bytes) }

    /// A block's mark.
    @inline(__always)
    public subscript(block: UInt64) -> UInt8 {
        get {
            precondition(block < count)
            return unsafe clinux_load8_relaxed(bytes + Int(truncatingIfNeeded: block))
        }
        set {
            precondition(block < count)
            unsafe clinux_store8_relaxed(bytes + Int(truncatingIfNeeded: block), newValue)
        }
    }
}

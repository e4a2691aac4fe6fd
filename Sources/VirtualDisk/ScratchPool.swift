internal import DiskStorage

/// Buffers for copy-up, for splicing edges to blocks, and for what goes into a block cache; kept for reuse.
@safe
final class ScratchPool: @unchecked Sendable {  // a buffer is either in the list or with one borrower
    /// Bytes of a buffer, unless said otherwise.
    static let size = 256 << 10
    private let size: Int
    private let free = unsafe Locked<[UnsafeMutableRawPointer]>([])

    init(size: Int = ScratchPool.size) { self.size = size }

    deinit {
        unsafe free.withLock { list in
            while let memory = unsafe list.popLast() { unsafe memory.deallocate() }
        }
    }

    /// Lends a buffer.
    func withBuffer<R>(_ body: (IOBuffer) throws(DiskError) -> R) throws(DiskError) -> R {
        let memory = unsafe free.withLock { unsafe $0.popLast() } ?? .allocate(byteCount: size, alignment: 4096)
        defer {
            let isKept = unsafe free.withLock { list in
                guard unsafe list.count < 8 else { return false }
                unsafe list.append(memory)
                return true
            }
            if !isKept { unsafe memory.deallocate() }
        }
        return unsafe try body(IOBuffer(start: memory, count: size))
    }
}

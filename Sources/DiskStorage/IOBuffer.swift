internal import Glibc

/// Memory that a read fills: a borrowed, bounds-checked range of bytes.
///
/// It owns nothing and is valid for the duration of the call it is passed to, no longer; slicing is checked. This and
/// ``IOBytes`` are the only form in which raw memory crosses between parts, so that pointers stay in a few files.
@safe
public struct IOBuffer: @unchecked Sendable {  // the caller of a read vouches that nobody else uses the memory
    @usableFromInline let start: UnsafeMutableRawPointer
    /// The number of bytes.
    public let count: Int

    /// Borrows `count` bytes at `start`.
    @inlinable
    public init(start: UnsafeMutableRawPointer, count: Int) {
        precondition(count >= 0)
        unsafe self.start = start
        self.count = count
    }

    /// The memory itself, for the system call at the end of the line.
    @inlinable public var pointer: UnsafeMutableRawPointer { unsafe start }

    /// The same memory, for a write.
    @inlinable public var readOnly: IOBytes { unsafe IOBytes(start: UnsafeRawPointer(start), count: count) }

    /// `count` bytes from `offset` on.
    @inlinable
    public func slice(_ offset: Int, _ count: Int) -> IOBuffer {
        precondition(offset >= 0 && count >= 0 && count <= self.count && offset <= self.count - count)
        return unsafe IOBuffer(start: start + offset, count: count)
    }

    /// Sets every byte to zero.
    @inlinable
    public func zero() {
        unsafe start.initializeMemory(as: UInt8.self, repeating: 0, count: count)
    }

    /// Copies `bytes` to the front.
    @inlinable
    public func copy(from bytes: IOBytes) {
        precondition(bytes.count <= count)
        unsafe start.copyMemory(from: bytes.pointer, byteCount: bytes.count)
    }
}

/// Memory that a write takes its bytes from: a borrowed, bounds-checked range; see ``IOBuffer``.
@safe
public struct IOBytes: @unchecked Sendable {  // only read through, and only during the call it is passed to
    @usableFromInline let start: UnsafeRawPointer
    /// The number of bytes.
    public let count: Int

    /// Borrows `count` bytes at `start`.
    @inlinable
    public init(start: UnsafeRawPointer, count: Int) {
        precondition(count >= 0)
        unsafe self.start = start
        self.count = count
    }

    /// The memory itself, for the system call at the end of the line.
    @inlinable public var pointer: UnsafeRawPointer { unsafe start }

    /// `count` bytes from `offset` on.
    @inlinable
    public func slice(_ offset: Int, _ count: Int) -> IOBytes {
        precondition(offset >= 0 && count >= 0 && count <= self.count && offset <= self.count - count)
        return unsafe IOBytes(start: start + offset, count: count)
    }

    /// Whether every byte is zero.
    @inlinable
    public var isZero: Bool {
        var offset = 0
        while offset + 8 <= count {
            if unsafe start.loadUnaligned(fromByteOffset: offset, as: UInt64.self) != 0 { return false }
            offset += 8
        }
        while offset < count {
            if unsafe start.load(fromByteOffset: offset, as: UInt8.self) != 0 { return false }
            offset += 1
        }
        return true
    }

    /// Whether another range has the same bytes.
    public func isEqual(to other: IOBytes) -> Bool {
        unsafe count == other.count && memcmp(start, other.start, count) == 0
    }

    /// A copy.
    public var array: [UInt8] { unsafe Array(UnsafeRawBufferPointer(start: start, count: count)) }
}

extension [UInt8] {
    /// Lends the array's memory to a read.
    public mutating func withIOBuffer<R>(_ body: (IOBuffer) throws(DiskError) -> R) throws(DiskError) -> R {
        let result: Result<R, DiskError> = unsafe withUnsafeMutableBytes { memory in
            Result { () throws(DiskError) in
                try body(unsafe IOBuffer(start: memory.baseAddress ?? nowhere(), count: memory.count))
            }
        }
        return try result.get()
    }

    /// Lends the array's memory to a write.
    public func withIOBytes<R>(_ body: (IOBytes) throws(DiskError) -> R) throws(DiskError) -> R {
        let result: Result<R, DiskError> = unsafe withUnsafeBytes { memory in
            Result { () throws(DiskError) in
                try body(unsafe IOBytes(start: memory.baseAddress ?? UnsafeRawPointer(nowhere()), count: memory.count))
            }
        }
        return try result.get()
    }
}

/// An address for zero bytes.
private func nowhere() -> UnsafeMutableRawPointer {
    guard let pointer = unsafe UnsafeMutableRawPointer(bitPattern: 4096) else {
        preconditionFailure("4096 is no null pointer")
    }
    return unsafe pointer
}

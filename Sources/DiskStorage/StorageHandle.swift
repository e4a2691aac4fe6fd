internal import CLinux

/// The way from the hot path to a storage: straight to the descriptor where there is one, else through the protocol.
///
/// A final class so that layers can hold it as an unmanaged reference: no reference counting on a request. It remembers
/// whether anything was written since the last flush, so that an image of many files flushes only those it must.
@safe
public final class StorageHandle: @unchecked Sendable {  // the flag is only accessed atomically
    /// The storage, kept alive by this handle.
    public let storage: any Storage
    private let descriptor: Int32
    /// Whether writes are possible.
    public let isWritable: Bool
    private let written: UnsafeMutablePointer<UInt8>

    public init(_ storage: any Storage) {
        self.storage = storage
        descriptor = storage.traits.descriptor
        isWritable = storage.traits.isWritable
        unsafe written = .allocate(capacity: 1)
        unsafe written.initialize(to: 0)
    }

    deinit { unsafe written.deallocate() }

    /// Reads; what lies beyond the end is zeros.
    @inline(__always)
    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        guard descriptor >= 0 else { return try storage.readPadded(into: buffer, at: offset, for: purpose) }
        let done: Int
        do throws(DiskError) {
            done = try FileStorage.read(descriptor, into: buffer, at: offset)
        } catch {
            throw error.about(storage.name)
        }
        if done < buffer.count { buffer.slice(done, buffer.count - done).zero() }
    }

    /// Writes all of `bytes`.
    @inline(__always)
    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        defer { noteWrite() }
        guard descriptor >= 0 else { return try storage.write(bytes, at: offset, for: purpose) }
        do throws(DiskError) {
            try FileStorage.write(descriptor, bytes, at: offset)
        } catch {
            throw error.about(storage.name)
        }
    }

    /// ``Storage/discard(_:mustZero:for:)``, with zeros for certain.
    public func discard(_ range: Range<UInt64>, for purpose: StoragePurpose) throws(DiskError) {
        defer { noteWrite() }
        try storage.discard(range, mustZero: true, for: purpose)
    }

    /// Notes that there is something to flush. After the write, so that a flush which does not see the note was asked
    /// for before the write was done.
    @inline(__always)
    public func noteWrite() {
        if unsafe clinux_load8_relaxed(written) == 0 { unsafe clinux_store8_relaxed(written, 1) }
    }

    /// Flushes if anything was written since the last flush.
    public func flushIfWritten() throws(DiskError) {
        guard isWritable, unsafe clinux_load8_relaxed(written) != 0 else { return }
        unsafe clinux_store8_relaxed(written, 0)
        do throws(DiskError) {
            try storage.flush()
        } catch {
            unsafe clinux_store8_relaxed(written, 1)
            throw error
        }
    }
}

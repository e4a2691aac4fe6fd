/// The way from the hot path to a storage: straight to the descriptor where there is one, else through the protocol.
///
/// A final class so that layers can hold it as an unmanaged reference: no reference counting on a request.
public final class StorageHandle: Sendable {
    /// The storage, kept alive by this handle.
    public let storage: any Storage
    private let descriptor: Int32
    /// Whether writes are possible.
    public let isWritable: Bool

    public init(_ storage: any Storage) {
        self.storage = storage
        descriptor = storage.traits.descriptor
        isWritable = storage.traits.isWritable
    }

    /// Reads; what lies beyond the end is zeros.
    @inline(__always)
    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        guard descriptor >= 0 else { return try storage.readPadded(into: buffer, at: offset, for: purpose) }
        let done = try FileStorage.read(descriptor, into: buffer, at: offset)
        if done < buffer.count { buffer.slice(done, buffer.count - done).zero() }
    }

    /// Writes all of `bytes`.
    @inline(__always)
    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        guard descriptor >= 0 else { return try storage.write(bytes, at: offset, for: purpose) }
        try FileStorage.write(descriptor, bytes, at: offset)
    }
}

/// A file that is being made and counts for nothing until it is complete: what asks for durability in between is told
/// that it is there, and ``settle()`` makes all of it durable at the end.
public final class UnsyncedStorage: Storage {
    private let base: any Storage
    private let writesBack: Bool

    /// `writesBack`: whether the system may be asked to begin writing out early; not where ``settle()`` is not called.
    public init(_ base: any Storage, writesBack: Bool = true) {
        self.base = base
        self.writesBack = writesBack
    }

    public var traits: StorageTraits { base.traits }
    public var name: String { base.name }
    public func length() throws(DiskError) -> UInt64 { try base.length() }
    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        try base.read(into: buffer, at: offset, for: purpose)
    }
    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        try base.write(bytes, at: offset, for: purpose)
    }
    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        try base.discard(range, mustZero: mustZero, for: purpose)
    }
    public func setLength(_ length: UInt64) throws(DiskError) { try base.setLength(length) }
    public func allocate(_ length: UInt64) throws(DiskError) { try base.allocate(length) }
    public func startWriteback() {
        if writesBack { base.startWriteback() }
    }
    public func allocatedBytes() throws(DiskError) -> UInt64 { try base.allocatedBytes() }
    public func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? { try base.nextData(from: offset) }

    /// Nothing yet.
    public func flush() throws(DiskError) {}

    /// Returns when everything written before is on stable storage.
    public func settle() throws(DiskError) { try base.flush() }
}

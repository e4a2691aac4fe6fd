/// A storage of which this user may only read, although others may write through it.
public final class ReadOnlyStorage: Storage {
    public let traits: StorageTraits
    public let name: String
    private let inner: any Storage

    public init(_ inner: any Storage) {
        self.inner = inner
        name = inner.name
        var traits = inner.traits
        (traits.isWritable, traits.canDiscard) = (false, false)
        self.traits = traits
    }

    public func length() throws(DiskError) -> UInt64 { try inner.length() }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        try inner.read(into: buffer, at: offset, for: purpose)
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        throw refusal
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        throw refusal
    }

    public func setLength(_ length: UInt64) throws(DiskError) { throw refusal }
    public func flush() {}
    public func allocatedBytes() throws(DiskError) -> UInt64 { try inner.allocatedBytes() }
    public func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? { try inner.nextData(from: offset) }

    private var refusal: DiskError { DiskError(.readOnly, "this part of the disk is read-only", image: name) }
}

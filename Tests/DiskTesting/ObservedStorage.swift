public import DiskStorage

/// Passes everything on to another storage, and tells what is done before it is done, and after; who is told may throw
/// instead.
public final class ObservedStorage: Storage {
    /// What is done to a storage.
    public enum Access: Sendable {
        case read(offset: UInt64, count: Int, StoragePurpose)
        /// (The bytes are there for as long as the call takes.)
        case write(offset: UInt64, IOBytes, StoragePurpose)
        case discard(Range<UInt64>)
        case setLength(UInt64)
        case flush
        case replaceContents([UInt8])
        case startWriteback

        /// Whether bytes change, or become durable.
        public var isChange: Bool {
            switch self {
            case .read, .startWriteback: false
            default: true
            }
        }

        /// The words for it in messages.
        public var description: String {
            switch self {
            case .read: "read"
            case .write: "write"
            case .discard: "discard"
            case .setLength: "set the length"
            case .flush: "flush"
            case .replaceContents: "replace the contents"
            case .startWriteback: "start writing"
            }
        }
    }

    public typealias Observer = @Sendable (Access) throws(DiskError) -> Void

    public let traits: StorageTraits
    public let name: String
    public let fileIdentity: FileIdentity?
    private let inner: any Storage
    private let before: Observer
    private let after: Observer?

    /// - Parameters:
    ///   - traits: What it says that it can do; nil: what the other can, but through no descriptor.
    ///   - tellsFile: Whether it says which file it is.
    public init(
        _ inner: any Storage, traits: StorageTraits? = nil, tellsFile: Bool = false, after: Observer? = nil,
        before: @escaping Observer
    ) {
        self.inner = inner
        (self.before, self.after) = (before, after)
        name = inner.name
        fileIdentity = tellsFile ? inner.fileIdentity : nil
        var changed = inner.traits
        changed.descriptor = -1
        self.traits = traits ?? changed
    }

    private func observe(_ access: Access, _ body: () throws(DiskError) -> Void) throws(DiskError) {
        try before(access)
        try body()
        try after?(access)
    }

    public func length() throws(DiskError) -> UInt64 { try inner.length() }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        var count = 0
        try observe(.read(offset: offset, count: buffer.count, purpose)) { () throws(DiskError) in
            count = try inner.read(into: buffer, at: offset, for: purpose)
        }
        return count
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        try observe(.write(offset: offset, bytes, purpose)) { () throws(DiskError) in
            try inner.write(bytes, at: offset, for: purpose)
        }
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        try observe(.discard(range)) { () throws(DiskError) in
            try inner.discard(range, mustZero: mustZero, for: purpose)
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        try observe(.setLength(length)) { () throws(DiskError) in try inner.setLength(length) }
    }

    public func flush() throws(DiskError) { try observe(.flush) { () throws(DiskError) in try inner.flush() } }

    public func replaceContents(with bytes: [UInt8], for purpose: StoragePurpose) throws(DiskError) {
        try observe(.replaceContents(bytes)) { () throws(DiskError) in
            try inner.replaceContents(with: bytes, for: purpose)
        }
    }

    public func startWriteback() {
        try? before(.startWriteback)  // a hint cannot fail
        inner.startWriteback()
    }

    public func allocatedBytes() throws(DiskError) -> UInt64 { try inner.allocatedBytes() }
    public func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? { try inner.nextData(from: offset) }
}

/// What an access to storage is for. Tests fail, cut or record exactly there; the library itself does not look at it.
public enum StoragePurpose: UInt8, Sendable, CaseIterable {
    /// Bytes that the guest reads or writes.
    case guestData
    /// Bytes of a lower layer, copied round a partial write into a new block.
    case copyUp
    /// A header or superblock.
    case header
    /// A mapping table (grain table, block map, BAT, L2, …).
    case table
    /// Allocation records (refcounts, bitmaps, free pointers).
    case allocation
    /// A journal.
    case log
    /// A text descriptor.
    case descriptor
    /// A footer or trailer.
    case footer
}

/// What a storage can do, asked once when it is opened.
public struct StorageTraits: Sendable {
    /// The file descriptor that reads and writes may go to directly, or -1: the storage must be called.
    public var descriptor: Int32
    /// Whether writes are possible.
    public var isWritable: Bool
    /// Whether ``Storage/discard(_:mustZero:for:)`` gives space back and leaves zeros.
    public var canDiscard: Bool
    /// Whether the length is fixed (a block device).
    public var hasFixedLength: Bool

    public init(
        descriptor: Int32 = -1, isWritable: Bool = false, canDiscard: Bool = false, hasFixedLength: Bool = false
    ) {
        self.descriptor = descriptor
        self.isWritable = isWritable
        self.canDiscard = canDiscard
        self.hasFixedLength = hasFixedLength
    }
}

/// Bytes at offsets: a file, a device, memory, or a test's faulty, recording or crashing wrapper of another storage.
///
/// All calls may come from several threads at once. Offsets and lengths are in bytes.
public protocol Storage: AnyObject, Sendable {
    /// What it can do; does not change after opening.
    var traits: StorageTraits { get }
    /// The name for messages.
    var name: String { get }
    /// What tells its file from all others; nil where there is none. Storages with the same one hold the same bytes.
    var fileIdentity: FileIdentity? { get }

    /// The length in bytes.
    func length() throws(DiskError) -> UInt64
    /// Fills `buffer` from `offset` on and returns how many bytes there were: fewer only at the end.
    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int
    /// Writes all of `bytes` at `offset`; beyond the end the storage grows.
    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError)
    /// Makes a range inside the storage read as zeros and gives its space back, where that can be done; a storage
    /// that cannot writes zeros or, if `mustZero` is false, does nothing.
    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError)
    /// Makes it shorter or (with zeros) longer.
    func setLength(_ length: UInt64) throws(DiskError)
    /// Makes it `length` bytes long with all space taken, so that later writes cannot lack it.
    func allocate(_ length: UInt64) throws(DiskError)
    /// Returns when everything written before is on stable storage.
    func flush() throws(DiskError)
    /// Makes `bytes` all that there is, durably and, where that can be done, in one step: after a crash at any moment
    /// there is what was there before, or these.
    func replaceContents(with bytes: [UInt8], for purpose: StoragePurpose) throws(DiskError)
    /// Begins to write what was written before to the medium, where that can be done, and promises nothing: a hint.
    func startWriteback()
    /// Bytes of the medium that it occupies.
    func allocatedBytes() throws(DiskError) -> UInt64
    /// The range of bytes at or after `offset` that may hold data (the rest is known to be holes), or nil if none.
    func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>?
}

extension Storage {
    public var fileIdentity: FileIdentity? { nil }
    public func allocate(_ length: UInt64) throws(DiskError) { try setLength(length) }
    public func startWriteback() {}

    /// In several steps: what has no name that another file could take over can do no better.
    public func replaceContents(with bytes: [UInt8], for purpose: StoragePurpose) throws(DiskError) {
        try write(bytes, at: 0, for: purpose)
        try setLength(UInt64(bytes.count))
        try flush()
    }

    /// Reads exactly `count` bytes; an end before that is an error which names `what`.
    public func bytes(
        at offset: UInt64, count: Int, for purpose: StoragePurpose, _ what: StaticString
    ) throws(DiskError) -> [UInt8] {
        let bytes = try availableBytes(at: offset, count: count, for: purpose)
        guard bytes.count == count else {
            throw DiskError(
                .invalidImage,
                "the file is cut short: \(what) needs \(count) bytes, \(bytes.count) are there", image: name,
                offset: offset)
        }
        return bytes
    }

    /// Reads up to `count` bytes; fewer at the end.
    public func availableBytes(
        at offset: UInt64, count: Int, for purpose: StoragePurpose
    ) throws(DiskError) -> [UInt8] {
        var outcome: Result<Int, DiskError> = .success(0)
        // What is read into needs no zeros before.
        let bytes = unsafe [UInt8](unsafeUninitializedCapacity: count) { (memory, done) in
            guard let start = memory.baseAddress else { return }
            let buffer = unsafe IOBuffer(start: UnsafeMutableRawPointer(start), count: count)
            outcome = Result { () throws(DiskError) in try read(into: buffer, at: offset, for: purpose) }
            done = (try? outcome.get()) ?? 0
        }
        _ = try outcome.get()
        return bytes
    }

    /// Writes an array.
    public func write(_ bytes: [UInt8], at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        try bytes.withIOBytes { (memory) throws(DiskError) in try write(memory, at: offset, for: purpose) }
    }

    /// Reads, and fills with zeros what lies beyond the end.
    public func readPadded(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        let done = try read(into: buffer, at: offset, for: purpose)
        if done < buffer.count { buffer.slice(done, buffer.count - done).zero() }
    }

    /// Writes zeros, without giving space back.
    public func writeZeros(_ range: Range<UInt64>, for purpose: StoragePurpose) throws(DiskError) {
        let zeros = [UInt8](repeating: 0, count: Int(min(64 << 10, range.upperBound - range.lowerBound)))
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = Int(min(UInt64(zeros.count), range.upperBound - offset))
            try zeros.withIOBytes { (memory) throws(DiskError) in
                try write(memory.slice(0, count), at: offset, for: purpose)
            }
            offset += UInt64(count)
        }
    }
}

import DiskStorage
import Glibc

/// Memory that does not grow beyond what a small file system would hold.
public final class BoundedStorage: Storage {
    private static let limit: UInt64 = 16 << 20
    public let traits = StorageTraits(isWritable: true, canDiscard: true)
    public let name: String
    private let memory: MemoryStorage

    public init(_ bytes: [UInt8], name: String) {
        self.name = name
        memory = MemoryStorage(bytes, name: name)
    }

    private func check(_ end: UInt64, _ overflow: Bool = false) throws(DiskError) {
        if overflow || end > Self.limit { throw .system(ENOSPC, "grow") }
    }

    public func length() -> UInt64 { memory.length() }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) -> Int {
        memory.read(into: buffer, at: offset, for: purpose)
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        let (end, overflow) = offset.addingReportingOverflow(UInt64(bytes.count))
        try check(end, overflow)
        try memory.write(bytes, at: offset, for: purpose)
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        try memory.discard(range, mustZero: mustZero, for: purpose)
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        try check(length)
        try memory.setLength(length)
    }

    public func flush() {}
    public func allocatedBytes() -> UInt64 { memory.length() }
    public func nextData(from offset: UInt64) -> Range<UInt64>? { memory.nextData(from: offset) }
}

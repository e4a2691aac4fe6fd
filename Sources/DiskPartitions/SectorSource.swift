public import DiskStorage

/// What a partition table or a file system is looked for in: a disk, or anything else that has a size and is read.
public protocol SectorSource: Sendable {
    /// The size in bytes.
    var size: UInt64 { get }
    /// The bytes of a sector, where more is known of it than what lies on it tells.
    var sectorSize: UInt32? { get }
    /// Fills `buffer` from `offset` on. The range lies inside the size.
    func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError)
}

/// A ``Storage`` as a source; what it turns out not to hold, since it was cut meanwhile, reads as zeros.
public struct StorageSource: SectorSource {
    private let storage: any Storage
    public let size: UInt64

    /// The source of `size` bytes, or of all that the storage holds.
    public init(_ storage: any Storage, size: UInt64? = nil) throws(DiskError) {
        self.storage = storage
        if let size { self.size = size } else { self.size = try storage.length() }
    }

    public func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        try storage.readPadded(into: buffer, at: offset, for: .guestData)
    }
}

extension SectorSource {
    public var sectorSize: UInt32? { nil }

    /// The fields of `count` bytes, or nil if they do not lie inside the source. `count` is bounded by the caller.
    func fields(at offset: UInt64, count: Int) throws(DiskError) -> FieldReader? {
        guard count >= 0, offset <= size, UInt64(count) <= size - offset else { return nil }
        var bytes = [UInt8](repeating: 0, count: count)
        try bytes.withIOBuffer { (buffer) throws(DiskError) in try read(into: buffer, at: offset) }
        return FieldReader(bytes)
    }
}

extension FieldReader {
    /// Whether the bytes at `offset` are `wanted`.
    func matches(_ wanted: [UInt8], at offset: Int) -> Bool {
        guard offset >= 0, wanted.count <= count, offset <= count - wanted.count else { return false }
        return bytes[offset..<offset + wanted.count].elementsEqual(wanted)
    }
}

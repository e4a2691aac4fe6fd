public import DiskStorage
internal import Glibc

/// A logical unit of an iSCSI target, by libiscsi: read, written, flushed (SYNCHRONIZE CACHE) and, where the target
/// can, unmapped.
///
/// Requests of several threads are on their way at the same time, in one session.
public final class ISCSIStorage: Storage {
    public let traits: StorageTraits
    private let disk: ServedDisk<ISCSIEngine>
    private var unit: ISCSIEngine.Unit { disk.properties }
    /// Whether the target knows WRITE SAME(16), as far as is known.
    private let hasWriteSame = Locked(true)

    /// Opens `iscsi://[user[%password]@]host[:port]/target/lun`.
    public init(
        _ address: String, isWritable: Bool, settings: StorageSettings = StorageSettings()
    ) throws(DiskError) {
        guard let parsed = StorageAddress(address), parsed.kind == .iscsi else {
            throw DiskError(.invalidArgument, "is no address of an iSCSI disk")
        }
        disk = try ServedDisk(parsed, isWritable: isWritable, settings)
        traits = StorageTraits(
            isWritable: isWritable, canDiscard: isWritable && disk.properties.unmapsZeros, hasFixedLength: true)
    }

    public var name: String { disk.name }
    public func length() -> UInt64 { disk.length }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        try disk.read(into: buffer, at: offset)
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        try disk.write(bytes, at: offset)
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        let range = range.clamped(to: 0..<disk.length)
        guard !range.isEmpty else { return }
        try disk.checkWrite(range.lowerBound, range.upperBound - range.lowerBound)
        let (inner, edges) = disk.sectors.whole(range)
        if mustZero {
            for edge in edges { try writeZeros(edge, for: purpose) }
            try zero(inner, purpose)
        } else if unit.longestUnmap > 0 {
            try disk.inPieces(inner, of: unit.longestUnmap * unit.blockSize) { (part) throws(DiskError) in
                try disk.link.run(.write, "give back \(part.count) bytes") { $0.unmap(part, unit, $1) }
            }
        }
    }

    /// By WRITE SAME, which may give the space back; by writing where the target does not know it.
    private func zero(_ range: Range<UInt64>, _ purpose: StoragePurpose) throws(DiskError) {
        guard hasWriteSame.withLock({ $0 }) else { return try writeZeros(range, for: purpose) }
        let block = [UInt8](repeating: 0, count: Int(unit.blockSize))
        try block.withIOBytes { (bytes) throws(DiskError) in
            // 16 MiB: targets without limits of their own would keep others waiting.
            try disk.inPieces(range, of: 16 << 20) { (part) throws(DiskError) in
                var isUnknown = false
                let issue = { (engine: ISCSIEngine, operation: PendingOperation) -> String? in
                    engine.writeSame(bytes, part, self.unit, operation)
                }
                do throws(DiskError) {
                    try disk.link.run(.write, "write zeros", issue)
                } catch {
                    isUnknown = error.errno == EOPNOTSUPP
                    guard isUnknown else { throw error }
                }
                guard isUnknown else { return }
                hasWriteSame.withLock { $0 = false }
                try writeZeros(part, for: purpose)
            }
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        if length > disk.length { throw .system(ENOSPC, "grow a unit to \(length) bytes", image: name) }
    }

    public func flush() throws(DiskError) { try disk.flush() }
    public func allocatedBytes() -> UInt64 { disk.length }

    public func nextData(from offset: UInt64) -> Range<UInt64>? {
        offset < disk.length ? offset..<disk.length : nil
    }
}

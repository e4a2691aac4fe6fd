public import DiskStorage
internal import Glibc

/// A logical unit of an iSCSI target, by libiscsi: read, written, flushed (SYNCHRONIZE CACHE) and, where the target
/// can, unmapped.
///
/// Requests of several threads are on their way at the same time, in one session.
public final class ISCSIStorage: Storage {
    public let traits: StorageTraits
    public let name: String
    private let unit: ISCSIEngine.Unit
    private let link: ReliableLink<ISCSIEngine>
    private let sectors: SectorAccess
    /// Whether the target knows WRITE SAME(16), as far as is known.
    private let hasWriteSame = Locked(true)

    /// Opens `iscsi://[user[%password]@]host[:port]/target/lun`.
    public init(
        _ address: String, isWritable: Bool, settings: StorageSettings = StorageSettings()
    ) throws(DiskError) {
        guard let parsed = StorageAddress(address), parsed.kind == .iscsi else {
            throw DiskError(.invalidArgument, "is no address of an iSCSI disk")
        }
        name = parsed.shown
        do throws(DiskError) {
            let engine = try ISCSIEngine(parsed, settings)
            let unit = try engine.unit()
            if isWritable, unit.isReadOnly {
                engine.close(isClean: true)
                throw DiskError(.readOnly, "the target gives this unit for reading only")
            }
            self.unit = unit
            let timeout = settings.timeout
            link = ReliableLink(try SharedConnection(engine, timeout: timeout), settings) { () throws(DiskError) in
                let engine = try ISCSIEngine(parsed, settings)
                guard try engine.unit() == unit else {
                    engine.close(isClean: true)
                    throw DiskError(.refused, "the target's unit is another one than before: \(parsed.shown)")
                }
                return try SharedConnection(engine, timeout: timeout)
            }
        } catch {
            throw error.about(parsed.shown)
        }
        sectors = SectorAccess(sectorSize: unit.blockSize, longest: unit.longestTransfer * unit.blockSize)
        traits = StorageTraits(
            isWritable: isWritable, canDiscard: isWritable && unit.unmapsZeros, hasFixedLength: true)
    }

    public func length() -> UInt64 { unit.length }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        guard offset < unit.length else { return 0 }
        let count = Int(min(UInt64(buffer.count), unit.length - offset))
        try about(offset) { () throws(DiskError) in
            try sectors.read(into: buffer.slice(0, count), at: offset, readSectors)
        }
        return count
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        try checkWrite(offset, UInt64(bytes.count))
        try about(offset) { () throws(DiskError) in
            try sectors.write(bytes, at: offset, read: readSectors, write: writeSectors)
        }
    }

    private func readSectors(_ buffer: IOBuffer, _ offset: UInt64) throws(DiskError) {
        try link.run(.read, "read \(buffer.count) bytes") { $0.read(buffer, offset, unit, $1) }
    }

    private func writeSectors(_ bytes: IOBytes, _ offset: UInt64) throws(DiskError) {
        try link.run(.write, "write \(bytes.count) bytes") { $0.write(bytes, offset, unit, $1) }
    }

    private func checkWrite(_ offset: UInt64, _ count: UInt64) throws(DiskError) {
        guard traits.isWritable else { throw .system(EROFS, "write", image: name) }
        guard offset <= unit.length, count <= unit.length - offset else {
            throw .system(ENOSPC, "write beyond the unit's end at \(unit.length)", image: name, offset: offset)
        }
    }

    private func about(_ offset: UInt64, _ body: () throws(DiskError) -> Void) throws(DiskError) {
        do throws(DiskError) { try body() } catch { throw error.about(name).at(offset) }
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        let range = range.clamped(to: 0..<unit.length)
        guard !range.isEmpty else { return }
        try checkWrite(range.lowerBound, range.upperBound - range.lowerBound)
        let (inner, edges) = sectors.whole(range)
        if mustZero {
            for edge in edges { try writeZeros(edge, for: purpose) }
            try zero(inner, purpose)
        } else if unit.longestUnmap > 0 {
            try inPieces(inner, unit.longestUnmap) { (part) throws(DiskError) in
                try link.run(.write, "give back \(part.count) bytes") { $0.unmap(part, unit, $1) }
            }
        }
    }

    /// By WRITE SAME, which may give the space back; by writing where the target does not know it.
    private func zero(_ range: Range<UInt64>, _ purpose: StoragePurpose) throws(DiskError) {
        guard hasWriteSame.withLock({ $0 }) else { return try writeZeros(range, for: purpose) }
        let block = [UInt8](repeating: 0, count: Int(unit.blockSize))
        try block.withIOBytes { (bytes) throws(DiskError) in
            // 16 MiB: targets without limits of their own would keep others waiting.
            try inPieces(range, (16 << 20) / unit.blockSize) { (part) throws(DiskError) in
                var isUnknown = false
                let issue = { (engine: ISCSIEngine, operation: PendingOperation) -> String? in
                    engine.writeSame(bytes, part, self.unit, operation)
                }
                do throws(DiskError) {
                    try link.run(.write, "write zeros", issue)
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

    private func inPieces(
        _ range: Range<UInt64>, _ blocks: UInt64, _ body: (Range<UInt64>) throws(DiskError) -> Void
    ) throws(DiskError) {
        var start = range.lowerBound
        while start < range.upperBound {
            let part = start..<min(range.upperBound, start + blocks * unit.blockSize)
            try about(start) { () throws(DiskError) in try body(part) }
            start = part.upperBound
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        if length > unit.length { throw .system(ENOSPC, "grow a unit to \(length) bytes", image: name) }
    }

    public func flush() throws(DiskError) {
        guard traits.isWritable else { return }
        do throws(DiskError) { try link.run(.flush, "flush") { $0.flush($1) } } catch { throw error.about(name) }
    }

    public func allocatedBytes() -> UInt64 { unit.length }

    public func nextData(from offset: UInt64) -> Range<UInt64>? {
        offset < unit.length ? offset..<unit.length : nil
    }
}

internal import CNBD
public import DiskStorage
internal import Glibc

/// An export of an NBD server (the protocol of nbd.git's `doc/proto.md`), by libnbd.
///
/// Requests of several threads are on their way at the same time, over one connection. The export has a fixed length,
/// as a device has.
public final class NBDStorage: Storage {
    public let traits: StorageTraits
    public let name: String
    private let export: NBDEngine.Export
    private let link: ReliableLink<NBDEngine>
    private let sectors: SectorAccess

    /// The most bytes of a request for zeros or for what is there.
    private static let longestRange: UInt64 = 1 << 30
    /// The most questions about holes in one search.
    private static let mostQuestions = 4096

    /// Opens `nbd://host[:port]/export`, `nbd+unix:///export?socket=PATH`, or the same with TLS (`nbds`, `nbds+unix`).
    public init(
        _ address: String, isWritable: Bool, settings: StorageSettings = StorageSettings()
    ) throws(DiskError) {
        guard let parsed = StorageAddress(address), parsed.kind == .nbd else {
            throw DiskError(.invalidArgument, "is no address of an NBD export")
        }
        name = parsed.shown
        do throws(DiskError) {
            let engine = try NBDEngine(parsed, settings)
            let export = try engine.export()
            if isWritable, export.isReadOnly {
                engine.close(isClean: true)
                throw DiskError(.readOnly, "the server gives this export for reading only")
            }
            self.export = export
            let timeout = settings.timeout
            link = ReliableLink(try SharedConnection(engine, timeout: timeout), settings) { () throws(DiskError) in
                let engine = try NBDEngine(parsed, settings)
                guard try engine.export() == export else {
                    engine.close(isClean: true)
                    throw DiskError(.refused, "the server's export is another one than before: \(parsed.shown)")
                }
                return try SharedConnection(engine, timeout: timeout)
            }
        } catch {
            throw error.about(parsed.shown)
        }
        sectors = SectorAccess(sectorSize: export.minimum, longest: export.maximum)
        traits = StorageTraits(
            isWritable: isWritable, canDiscard: isWritable && export.canZero, hasFixedLength: true)
    }

    public func length() -> UInt64 { export.length }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        guard offset < export.length else { return 0 }
        let count = Int(min(UInt64(buffer.count), export.length - offset))
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
        try link.run(.read, "read \(buffer.count) bytes") { $0.read(buffer, offset, $1) }
    }

    private func writeSectors(_ bytes: IOBytes, _ offset: UInt64) throws(DiskError) {
        try link.run(.write, "write \(bytes.count) bytes") { $0.write(bytes, offset, $1) }
    }

    private func checkWrite(_ offset: UInt64, _ count: UInt64) throws(DiskError) {
        guard traits.isWritable else { throw .system(EROFS, "write", image: name) }
        guard offset <= export.length, count <= export.length - offset else {
            throw .system(ENOSPC, "write beyond the export's end at \(export.length)", image: name, offset: offset)
        }
    }

    private func about(_ offset: UInt64, _ body: () throws(DiskError) -> Void) throws(DiskError) {
        do throws(DiskError) { try body() } catch { throw error.about(name).at(offset) }
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        let range = range.clamped(to: 0..<export.length)
        guard !range.isEmpty else { return }
        try checkWrite(range.lowerBound, range.upperBound - range.lowerBound)
        guard mustZero ? export.canZero : export.canTrim else {
            if mustZero { try writeZeros(range, for: purpose) }
            return
        }
        let (inner, edges) = sectors.whole(range)
        if mustZero { for edge in edges { try writeZeros(edge, for: purpose) } }
        var start = inner.lowerBound
        while start < inner.upperBound {
            let part = start..<min(inner.upperBound, start + Self.longestRange)
            try about(start) { () throws(DiskError) in
                try link.run(.write, "give back \(part.count) bytes") {
                    mustZero ? $0.zero(part, $1) : $0.trim(part, $1)
                }
            }
            start = part.upperBound
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        if length > export.length { throw .system(ENOSPC, "grow an export to \(length) bytes", image: name) }
    }

    public func flush() throws(DiskError) {
        guard traits.isWritable, export.canFlush else { return }
        do throws(DiskError) { try link.run(.flush, "flush") { $0.flush($1) } } catch { throw error.about(name) }
    }

    public func allocatedBytes() -> UInt64 { export.length }

    public func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? {
        guard offset < export.length else { return nil }
        guard export.tellsHoles else { return offset..<export.length }
        var data: Range<UInt64>?
        var position = offset / export.minimum * export.minimum
        // A server may answer as little as it likes: after so many questions the rest counts as data.
        for _ in 0..<Self.mostQuestions where position < export.length {
            let end = min(export.length, position + Self.longestRange)
            let answer: PendingOperation
            do throws(DiskError) {
                answer = try link.run(.read, "ask for holes") { $0.blockStatus(position..<end, $1) }
            } catch {
                throw error.about(name).at(position)
            }
            for index in stride(from: 0, to: answer.numbers.count - 1, by: 2) {
                let length = min(answer.numbers[index], export.length - position)
                guard length > 0 else { break }
                let isZero = answer.numbers[index + 1] & UInt64(LIBNBD_STATE_ZERO) != 0
                if isZero, let data { return data }
                if !isZero { data = (data?.lowerBound ?? max(position, offset))..<position + length }
                position += length
            }
            // What is known is enough; the caller asks again behind it.
            if let data { return data }
            if answer.numbers.count < 2 { break }
        }
        return position < export.length ? max(position, offset)..<export.length : nil
    }
}

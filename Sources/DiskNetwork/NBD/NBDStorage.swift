internal import CNBD
public import DiskStorage
internal import Glibc

/// An export of an NBD server (the protocol of nbd.git's `doc/proto.md`), by libnbd.
///
/// Requests of several threads are on their way at the same time, over one connection. The export has a fixed length,
/// as a device has.
public final class NBDStorage: Storage {
    public let traits: StorageTraits
    private let disk: ServedDisk<NBDEngine>
    private var export: NBDEngine.Export { disk.properties }

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
        disk = try ServedDisk(parsed, isWritable: isWritable, settings)
        traits = StorageTraits(
            isWritable: isWritable, canDiscard: isWritable && disk.properties.canZero, hasFixedLength: true)
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
        guard mustZero ? export.canZero : export.canTrim else {
            if mustZero { try writeZeros(range, for: purpose) }
            return
        }
        let (inner, edges) = disk.sectors.whole(range)
        if mustZero { for edge in edges { try writeZeros(edge, for: purpose) } }
        try disk.inPieces(inner, of: Self.longestRange) { (part) throws(DiskError) in
            try disk.link.run(.write, "give back \(part.count) bytes") {
                mustZero ? $0.zero(part, $1) : $0.trim(part, $1)
            }
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        if length > disk.length { throw .system(ENOSPC, "grow an export to \(length) bytes", image: name) }
    }

    public func flush() throws(DiskError) { if export.canFlush { try disk.flush() } }
    public func allocatedBytes() -> UInt64 { disk.length }

    public func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? {
        guard offset < export.length else { return nil }
        guard export.tellsHoles else { return offset..<export.length }
        var data: Range<UInt64>?
        var position = offset / export.sectorSize * export.sectorSize
        // A server may answer as little as it likes: after so many questions the rest counts as data.
        for _ in 0..<Self.mostQuestions where position < export.length {
            let end = min(export.length, position + Self.longestRange)
            var numbers: [UInt64] = []
            try disk.about(position) { () throws(DiskError) in
                numbers = try disk.link.run(.read, "ask for holes") { $0.blockStatus(position..<end, $1) }.numbers
            }
            for index in stride(from: 0, to: numbers.count - 1, by: 2) {
                let length = min(numbers[index], export.length - position)
                guard length > 0 else { break }
                let isZero = numbers[index + 1] & UInt64(LIBNBD_STATE_ZERO) != 0
                if isZero, let data { return data }
                if !isZero { data = (data?.lowerBound ?? max(position, offset))..<position + length }
                position += length
            }
            // What is known is enough; the caller asks again behind it.
            if let data { return data }
            if numbers.count < 2 { break }
        }
        return position < export.length ? max(position, offset)..<export.length : nil
    }
}

internal import DiskStorage
internal import Glibc

/// What a server says of a disk; it stays the same for as long as the disk is used.
protocol ServedDiskProperties: Equatable, Sendable {
    /// In bytes.
    var length: UInt64 { get }
    var isReadOnly: Bool { get }
    /// The unit of requests in bytes: a power of two.
    var sectorSize: UInt64 { get }
    /// The most bytes of a request.
    var longestRequest: UInt64 { get }
}

/// A connection to a server that has a disk of fixed length, which is read and written in whole sectors.
protocol DiskEngine: ConnectionEngine, SendableMetatype {
    associatedtype Properties: ServedDiskProperties
    /// What server and disk are called, for messages.
    static var words: (server: String, disk: String) { get }

    /// Connects.
    init(_ address: StorageAddress, _ settings: StorageSettings) throws(DiskError)
    /// Asks for what the server says of the disk.
    func properties() throws(DiskError) -> Properties

    // Requests answer why they could not be issued, or nil.
    func read(_ buffer: IOBuffer, _ offset: UInt64, _ disk: Properties, _ operation: PendingOperation) -> String?
    func write(_ bytes: IOBytes, _ offset: UInt64, _ disk: Properties, _ operation: PendingOperation) -> String?
    func flush(_ operation: PendingOperation) -> String?
}

/// A disk on a server, by bytes: what the storages of all such servers have in common.
final class ServedDisk<Engine: DiskEngine>: Sendable {
    /// For messages.
    let name: String
    let properties: Engine.Properties
    let isWritable: Bool
    let link: ReliableLink<Engine>
    let sectors: SectorAccess

    var length: UInt64 { properties.length }

    init(_ address: StorageAddress, isWritable: Bool, _ settings: StorageSettings) throws(DiskError) {
        name = address.shown
        self.isWritable = isWritable
        do throws(DiskError) {
            let engine = try Engine(address, settings)
            let properties = try engine.properties()
            if isWritable, properties.isReadOnly {
                engine.close(isClean: true)
                throw DiskError(
                    .readOnly, "the \(Engine.words.server) gives this \(Engine.words.disk) for reading only")
            }
            self.properties = properties
            let timeout = settings.timeout
            link = ReliableLink(try SharedConnection(engine, timeout: timeout), settings) { () throws(DiskError) in
                let engine = try Engine(address, settings)
                guard try engine.properties() == properties else {
                    engine.close(isClean: true)
                    let (server, disk) = Engine.words
                    throw DiskError(.refused, "the \(server)'s \(disk) is another one than before: \(address.shown)")
                }
                return try SharedConnection(engine, timeout: timeout)
            }
        } catch {
            throw error.about(address.shown)
        }
        sectors = SectorAccess(sectorSize: properties.sectorSize, longest: properties.longestRequest)
    }

    func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) -> Int {
        guard offset < length else { return 0 }
        let count = Int(min(UInt64(buffer.count), length - offset))
        try about(offset) { () throws(DiskError) in
            try sectors.read(into: buffer.slice(0, count), at: offset, readSectors)
        }
        return count
    }

    func write(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) {
        try checkWrite(offset, UInt64(bytes.count))
        try about(offset) { () throws(DiskError) in
            try sectors.write(bytes, at: offset, read: readSectors, write: writeSectors)
        }
    }

    private func readSectors(_ buffer: IOBuffer, _ offset: UInt64) throws(DiskError) {
        try link.run(.read, "read \(buffer.count) bytes") { $0.read(buffer, offset, properties, $1) }
    }

    private func writeSectors(_ bytes: IOBytes, _ offset: UInt64) throws(DiskError) {
        try link.run(.write, "write \(bytes.count) bytes") { $0.write(bytes, offset, properties, $1) }
    }

    func flush() throws(DiskError) {
        guard isWritable else { return }
        do throws(DiskError) { try link.run(.flush, "flush") { $0.flush($1) } } catch { throw error.about(name) }
    }

    /// Throws unless that may be written.
    func checkWrite(_ offset: UInt64, _ count: UInt64) throws(DiskError) {
        guard isWritable else { throw .system(EROFS, "write", image: name) }
        guard offset <= length, count <= length - offset else {
            throw .system(
                ENOSPC, "write beyond the \(Engine.words.disk)'s end at \(length)", image: name, offset: offset)
        }
    }

    /// Calls `body` with one piece of a range after the other, `most` bytes long at most.
    func inPieces(
        _ range: Range<UInt64>, of most: UInt64, _ body: (Range<UInt64>) throws(DiskError) -> Void
    ) throws(DiskError) {
        var start = range.lowerBound
        while start < range.upperBound {
            let part = start..<min(range.upperBound, start + most)
            try about(start) { () throws(DiskError) in try body(part) }
            start = part.upperBound
        }
    }

    /// Errors of `body` name the disk and the place.
    func about(_ offset: UInt64, _ body: () throws(DiskError) -> Void) throws(DiskError) {
        do throws(DiskError) { try body() } catch { throw error.about(name).at(offset) }
    }
}

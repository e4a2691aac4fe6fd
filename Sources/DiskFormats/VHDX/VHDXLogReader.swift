internal import DiskPartitions
internal import DiskStorage

/// Reads entries from the log, which is a ring: what reaches its end goes on at its beginning. [MS-VHDX] 2.3.
struct VHDXLogReader {
    private static let sectorSize = UInt64(VHDXLogEntryHeader.sectorSize)

    /// A valid entry.
    struct Entry {
        let header: VHDXLogEntryHeader
        /// Where it begins in the log.
        let offset: UInt64
        /// Where the next one would begin.
        let next: UInt64
    }

    /// Some of the log, so that it is not read sector by sector.
    private struct Window {
        var start: UInt64 = 0
        var bytes: [UInt8] = []
    }

    private let storage: any Storage
    private let log: Range<UInt64>
    private let guid: DiskUUID
    private var window = Window()

    private var length: UInt64 { log.upperBound - log.lowerBound }

    init(_ storage: any Storage, log: Range<UInt64>, guid: DiskUUID) {
        self.storage = storage
        self.log = log
        self.guid = guid
    }

    /// The sector at `offset` of the log, counted on past its end.
    private mutating func sector(at offset: UInt64) throws(DiskError) -> [UInt8] {
        let offset = offset % length
        if offset < window.start || offset >= window.start + UInt64(window.bytes.count) {
            let count = Int(min(1 << 20, length - offset))
            window = Window(
                start: offset,
                bytes: try storage.bytes(at: log.lowerBound + offset, count: count, for: .log, "the log"))
        }
        let start = Int(offset - window.start)
        return Array(window.bytes[start..<start + Int(Self.sectorSize)])
    }

    /// The entry that begins at `offset`; nil if there is no valid one.
    ///
    /// Its structure is looked at before its checksum, so that bytes which claim to be many entries, one in another,
    /// are not summed up again and again.
    mutating func entry(at offset: UInt64) throws(DiskError) -> Entry? {
        let first = FieldReader(try sector(at: offset))
        guard let header = try VHDXLogEntryHeader(parsing: first), header.logGUID == guid, header.sequenceNumber > 0
        else { return nil }
        let count = Int(header.descriptorCount)
        guard count <= VHDXLogEntryHeader.descriptorLimit, UInt64(header.entryLength) <= length,
            header.entryLength % UInt32(Self.sectorSize) == 0, UInt64(header.tail) < length,
            header.tail % UInt32(Self.sectorSize) == 0
        else { return nil }
        let sectors = UInt64(header.entryLength) / Self.sectorSize
        var isRight = true
        var dataSectors: UInt64 = 0
        try forEachDescriptor(header, at: offset) { (descriptor, _) in
            guard let descriptor, descriptor.sequenceNumber == header.sequenceNumber else {
                isRight = false
                return false
            }
            if case .data = descriptor.content { dataSectors += 1 }
            return dataSectors <= sectors
        }
        let descriptorSectors = UInt64(VHDXLogEntryHeader.descriptorSectors(count))
        guard isRight, descriptorSectors + dataSectors == sectors else { return nil }
        for number in descriptorSectors..<sectors {
            let fields = FieldReader(try sector(at: offset + number * Self.sectorSize))
            guard try VHDXLogDataSector.isValid(fields, sequenceNumber: header.sequenceNumber) else { return nil }
        }
        guard try checksum(sectors, at: offset) == first.littleEndian(at: 4) else { return nil }
        return Entry(header: header, offset: offset, next: (offset + UInt64(header.entryLength)) % length)
    }

    private mutating func checksum(_ sectors: UInt64, at offset: UInt64) throws(DiskError) -> UInt32 {
        var sum = CRC32C()
        for number in 0..<sectors {
            var bytes = try sector(at: offset + number * Self.sectorSize)
            if number == 0 { bytes.replaceSubrange(4..<8, with: [0, 0, 0, 0]) }
            sum.update(bytes)
        }
        return sum.value
    }

    /// Calls `body` with the descriptors of the entry at `offset` (nil: one that is none), and with where in the log
    /// the data sector of each would be, until it answers false.
    mutating func forEachDescriptor(
        _ header: VHDXLogEntryHeader, at offset: UInt64,
        _ body: (VHDXLogDescriptor?, _ dataOffset: UInt64) throws(DiskError) -> Bool
    ) throws(DiskError) {
        let count = Int(header.descriptorCount)
        var dataOffset = offset + UInt64(VHDXLogEntryHeader.descriptorSectors(count)) * Self.sectorSize
        var fields = FieldReader([])
        for number in 0..<count {
            let place = VHDXLogEntryHeader.byteCount + number * VHDXLogDescriptor.byteCount
            let inSector = place % VHDXLogEntryHeader.sectorSize
            if number == 0 || inSector == 0 { fields = FieldReader(try sector(at: offset + UInt64(place - inSector))) }
            let descriptor = try VHDXLogDescriptor(parsing: fields, at: inSector)
            guard try body(descriptor, dataOffset % length) else { return }
            if case .data = descriptor?.content { dataOffset += Self.sectorSize }
        }
    }

    // MARK: - The active sequence

    /// The entries to replay, the oldest first: of all runs of valid entries with consecutive numbers the one that ends
    /// in the highest, from the entry on that its last one calls the tail. Nil: there is none. [MS-VHDX] 2.3.3.
    mutating func activeSequence() throws(DiskError) -> [Entry]? {
        var best: [Entry] = []
        var offset: UInt64 = 0
        while offset < length {
            var run: [Entry] = []
            var head = offset
            // A ring that is full of entries ends where it began.
            var covered: UInt64 = 0
            while covered < length, let entry = try entry(at: head),
                run.last.map({ $0.header.sequenceNumber &+ 1 == entry.header.sequenceNumber }) ?? true
            {
                run.append(entry)
                covered += UInt64(entry.header.entryLength)
                head = entry.next
            }
            guard let last = run.last else {
                offset += Self.sectorSize
                continue
            }
            if let first = run.firstIndex(where: { $0.offset == UInt64(last.header.tail) }),
                last.header.sequenceNumber > best.last?.header.sequenceNumber ?? 0
            {
                best = Array(run[first...])
            }
            offset += covered
        }
        return best.isEmpty ? nil : best
    }
}

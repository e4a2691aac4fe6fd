internal import DiskImage
internal import DiskStorage

/// Writes the log: every change of the block allocation table and of sector bitmaps is in an entry there, durably,
/// before it is made in its place. [MS-VHDX] 2.3.
///
/// Each flush is one entry, so that after a power cut all of it has happened or nothing. When an entry is written, what
/// the ones before it say has been made durable in its place (the flush of the guest's data has done that too), so that
/// it is its own tail. What it must not overwrite is the one entry before it: a log whose GUID is set has to hold one
/// that is valid.
final class VHDXLog: TableJournal {
    private struct State {
        /// Null: no entry was written yet.
        var guid = DiskUUID.null
        var sequenceNumber: UInt64 = 0
        /// Sectors of the log that hold the newest entry.
        var newest = 0..<0
        /// What that entry changes, where it could not all be written to its places.
        var unplaced: [TablePage] = []
    }

    private static let sectorSize = VHDXLogEntryHeader.sectorSize
    /// Sectors of an entry with one change: the shortest that is written.
    private static let shortest = 2
    /// 8 MiB of the log are used at most.
    private static let sectorLimit = 2048

    private let handle: StorageHandle
    private let log: Range<UInt64>
    /// Sectors of the log that are used.
    private let sectorCount: Int
    /// Where the table begins: what an entry changes that exists for its own sake.
    private let tableOffset: UInt64
    /// How long the file is for certain.
    private let durableLength = Locked<UInt64>(0)
    private let state = Locked(State())

    let pageLimit: Int

    init(_ handle: StorageHandle, _ structure: VHDXStructure) {
        self.handle = handle
        log = structure.logRange
        sectorCount = Int(min(UInt64(Self.sectorLimit), (log.upperBound - log.lowerBound) / UInt64(Self.sectorSize)))
        tableOffset = structure.tableRange.lowerBound
        // Behind a shortest entry, and before a sector that is none.
        let room = sectorCount - Self.shortest - 1
        var pages = room
        while VHDXLogEntryHeader.descriptorSectors(pages) + pages > room { pages -= 1 }
        pageLimit = pages
    }

    /// Begins the log with an entry that changes nothing, durably; answers the GUID that the header must get.
    func begin(fileLength: UInt64) throws(DiskError) -> DiskUUID {
        noteLength(fileLength)
        return try state.withLock { (state) throws(DiskError) in
            // An attempt before this one may have got further than here.
            if state.newest.isEmpty {
                state = State(guid: .random())
                try writeShortest(&state, at: 0)
            }
            return state.guid
        }
    }

    /// The file has that length for certain.
    func noteLength(_ length: UInt64) { durableLength.withLock { $0 = length } }

    func write(_ pages: [TablePage]) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            // (More than fit into one entry wait only where a flush has failed before.)
            try place(&state)
            for start in stride(from: 0, to: pages.count, by: pageLimit) {
                let part = Array(pages[start..<min(start + pageLimit, pages.count)])
                if start > 0 { try handle.storage.flush() }
                try enter(part, &state)
                defer { handle.noteWrite() }
                state.unplaced = part
                for page in part { try handle.storage.write(page.bytes, at: page.offset, for: .table) }
                state.unplaced = []
            }
        }
    }

    /// What the newest entry changes is in its places, durably; before the log is given up. An entry that is durable
    /// counts: where its changes could not be made, it must not be replaced or forgotten before they are.
    func settle() throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in try place(&state) }
    }

    private func place(_ state: inout State) throws(DiskError) {
        guard !state.unplaced.isEmpty else { return }
        for page in state.unplaced { try handle.storage.write(page.bytes, at: page.offset, for: .table) }
        try handle.storage.flush()
        state.unplaced = []
    }

    /// Writes an entry where there is room for it.
    private func enter(_ pages: [TablePage], _ state: inout State) throws(DiskError) {
        let count = VHDXLogEntryHeader.descriptorSectors(pages.count) + pages.count
        while true {
            if let place = room(for: count, state) { return try write(pages, &state, at: place) }
            // A short entry, and then there is room round it.
            try writeShortest(&state, at: state.newest.lowerBound >= Self.shortest ? 0 : state.newest.upperBound)
        }
    }

    /// Where an entry of `count` sectors can lie, with a sector behind it, inside the log, that is not the newest
    /// entry's. (QEMU does not compare the numbers of the first two entries that follow each other, and would replay an
    /// old one after a new one.)
    private func room(for count: Int, _ state: State) -> Int? {
        if state.newest.upperBound + count + 1 <= sectorCount { return state.newest.upperBound }
        return count + 1 <= state.newest.lowerBound ? 0 : nil
    }

    /// An entry that changes a page into what it is.
    private func writeShortest(_ state: inout State, at sector: Int) throws(DiskError) {
        let bytes = try handle.storage.bytes(
            at: tableOffset, count: Self.sectorSize, for: .table, "the block allocation table")
        try write([TablePage(offset: tableOffset, bytes: bytes)], &state, at: sector)
    }

    /// Writes an entry and, behind it, a sector that is none, and makes them durable.
    private func write(_ pages: [TablePage], _ state: inout State, at sector: Int) throws(DiskError) {
        let descriptorSectors = VHDXLogEntryHeader.descriptorSectors(pages.count)
        let count = descriptorSectors + pages.count
        let number = try state.sequenceNumber.adding(1, "the log's sequence number")
        let length = durableLength.withLock { $0 }
        let header = VHDXLogEntryHeader(
            entryLength: UInt32(count * Self.sectorSize), tail: UInt32(sector * Self.sectorSize),
            sequenceNumber: number, descriptorCount: UInt32(pages.count), logGUID: state.guid, fileLength: length)
        var fields = FieldWriter(count: count * Self.sectorSize)
        header.encode(into: &fields)
        for (index, page) in pages.enumerated() {
            VHDXLogDescriptor.encode(
                page.bytes, to: page.offset, sequenceNumber: number,
                at: VHDXLogEntryHeader.byteCount + index * VHDXLogDescriptor.byteCount, into: &fields)
            VHDXLogDataSector.encode(
                page.bytes, sequenceNumber: number, at: (descriptorSectors + index) * Self.sectorSize, into: &fields)
        }
        var bytes = VHDXChecksum.set(fields.bytes)
        if sector + count < state.newest.lowerBound || sector >= state.newest.upperBound, sector + count < sectorCount {
            bytes.append(contentsOf: repeatElement(0, count: Self.sectorSize))
        }
        try handle.storage.write(bytes, at: log.lowerBound + UInt64(sector * Self.sectorSize), for: .log)
        try handle.storage.flush()
        state.sequenceNumber = number
        state.newest = sector..<sector + count
    }
}

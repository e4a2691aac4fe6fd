internal import DiskImage
internal import DiskStorage

/// The file of an image that is open for writing: its headers, and which space is taken.
final class VHDXFile: Sendable {
    private struct Space {
        /// Whether the last block of the file may be another than the last one taken.
        var hasGivenUp: Bool
        /// The file's length in bytes.
        var length: UInt64
        /// What lies behind the blocks up to here may be anything.
        var unknownEnd: UInt64
        /// Whether the file stays as long as it is: there is room for all blocks.
        var keepsLength: Bool
    }

    private struct Session {
        var headers: VHDXHeaders
        var hasBegun = false
    }

    let log: VHDXLog
    private let handle: StorageHandle
    private let structure: VHDXStructure
    /// Where blocks end.
    private let end: FileEndCell
    private let blockSize: UInt64
    private let space: Locked<Space>
    /// Places of payload blocks that nothing points to.
    let blocks: ReusableBlocks
    private let session: Locked<Session>
    /// Whether the DataWriteGuid, which children compare, stays as it is.
    private let keepsIdentity: Bool
    /// What is dropped while the image is compacted.
    let released = ReleasedPlaces()

    /// Further on an entry cannot lead.
    private static let endLimit: UInt64 = 1 << 56

    private var isDevice: Bool { handle.storage.traits.hasFixedLength }

    init(
        _ handle: StorageHandle, _ structure: VHDXStructure, _ scan: VHDXTableScan, end: FileEndCell,
        keepsIdentity: Bool
    ) {
        self.keepsIdentity = keepsIdentity
        self.handle = handle
        self.structure = structure
        self.end = end
        blockSize = structure.metadata.blockSize
        log = VHDXLog(handle, structure)
        blocks = ReusableBlocks(blockSize: blockSize)
        scan.places?.forEachGap(before: scan.end) { [blocks, blockSize] gap in
            let count = (gap.upperBound - gap.lowerBound) / blockSize
            blocks.add(FreeBlocks.Run(offset: gap.lowerBound, count: count, isZero: false))
        }
        space = Locked(
            Space(
                hasGivenUp: !blocks.isEmpty, length: structure.fileLength, unknownEnd: structure.fileLength,
                keepsLength: handle.storage.traits.hasFixedLength || structure.metadata.leavesBlocksAllocated))
        session = Locked(Session(headers: structure.headers))
    }

    var dataWriteGUID: DiskUUID { session.withLock { $0.headers.current.dataWriteGUID } }

    // MARK: - Beginning and end

    /// Replays the log, if it has to be, before the image is used.
    func replayLog() throws(DiskError) {
        guard let replay = structure.replay else { return }
        try session.withLock { (session) throws(DiskError) in
            try replay.apply(to: handle.storage)
            // [MS-VHDX] 2.2.2: the FileWriteGuid changes with the first change of the file, whatever it is.
            try session.headers.update(in: handle.storage) { header in
                header.fileWriteGUID = .random()
                header.logGUID = .null
            }
        }
    }

    /// Before the first change: what lies behind the blocks goes, the log gets its first entry, and the headers new
    /// GUIDs.
    func begin() throws(DiskError) {
        if session.withLock({ $0.hasBegun }) { return }
        let length = try space.withLock { (space) throws(DiskError) in
            if !space.keepsLength, space.length > end.value {
                try handle.storage.setLength(end.value)
                space.length = end.value
                space.unknownEnd = end.value
                try handle.storage.flush()
            }
            return space.length
        }
        try session.withLock { (session) throws(DiskError) in
            let guid = try log.begin(fileLength: length)
            try session.headers.update(in: handle.storage) { header in
                header.fileWriteGUID = .random()
                if !keepsIdentity { header.dataWriteGUID = .random() }
                header.logGUID = guid
            }
            session.hasBegun = true
        }
    }

    /// The log is not needed any more, and the file ends with what is in use, at `usedEnd`. Everything is durable.
    func close(usedEnd: UInt64) throws(DiskError) {
        try log.settle()
        try session.withLock { (session) throws(DiskError) in
            guard !session.headers.current.logGUID.isNull else { return }
            try session.headers.update(in: handle.storage) { $0.logGUID = .null }
        }
        try space.withLock { (space) throws(DiskError) in
            guard !space.keepsLength, usedEnd < space.length, session.withLock({ $0.hasBegun }) else { return }
            try handle.storage.setLength(usedEnd)
            try handle.storage.flush()
            space.length = usedEnd
        }
    }

    func setDataWriteGUID(_ guid: DiskUUID) throws(DiskError) {
        try session.withLock { (session) throws(DiskError) in
            try session.headers.update(in: handle.storage) { $0.dataWriteGUID = guid }
        }
    }

    /// Lets the file of a fixed image, too, become shorter when it is closed.
    func allowShortening() {
        space.withLock { space in
            space.hasGivenUp = true
            space.keepsLength = isDevice
        }
    }

    // MARK: - Space

    /// Space for a payload block, which reads as zeros.
    func takeBlock() throws(DiskError) -> UInt64 {
        guard let run = blocks.take(1) else {
            return try space.withLock { (space) throws(DiskError) in try extend(&space, by: blockSize) }
        }
        if run.isZero { return run.offset }
        do throws(DiskError) {
            try handle.discard(run.offset..<run.offset + blockSize, for: .guestData)
        } catch {
            blocks.putBack(run.offset)
            throw error
        }
        return run.offset
    }

    /// Space for a block of the sector bitmap, which reads as zeros.
    func takeBitmapBlock() throws(DiskError) -> UInt64 {
        try space.withLock { (space) throws(DiskError) in
            try extend(&space, by: VHDXBlockAllocationTable.bitmapBlockSize)
        }
    }

    /// Space for a region, which reads as zeros.
    func takeRegion(_ length: UInt64) throws(DiskError) -> UInt64 {
        try space.withLock { (space) throws(DiskError) in
            guard let start = end.value.alignedUp(to: UInt64(VHDXRegion.alignment)) else {
                throw full("the file is longer than its table's entries reach")
            }
            let place = try extend(&space, by: start - end.value + length)
            return place + (start - place)
        }
    }

    /// Takes space behind everything.
    private func extend(_ space: inout Space, by length: UInt64) throws(DiskError) -> UInt64 {
        let start = end.value
        let newEnd = start + length
        guard newEnd <= Self.endLimit else { throw full("the file is longer than its table's entries reach") }
        if newEnd > space.length {
            guard !isDevice else { throw full("the device is full") }
            try handle.storage.setLength(newEnd)
            handle.noteWrite()
            space.length = newEnd
        }
        if start < space.unknownEnd {
            try handle.discard(start..<min(newEnd, space.unknownEnd), for: .guestData)
        }
        end.value = newEnd
        return start
    }

    private func full(_ message: String) -> DiskError {
        DiskError(.system, message, image: handle.storage.name, errno: 28)  // ENOSPC
    }

    /// Gives up a payload block whose entry was just changed: its space goes back to the file system, and to us after a
    /// flush.
    func giveUp(_ offset: UInt64) throws(DiskError) {
        let range = offset..<max(offset, min(offset + blockSize, end.value))
        let isKept = released.add(range, in: handle)
        if !isKept { try handle.discard(range, for: .guestData) }
        blocks.giveUp(offset, isZero: !isKept)
        space.withLock { $0.hasGivenUp = true }
    }

    /// Something that is no payload block was given up.
    func noteGivenUp() { space.withLock { $0.hasGivenUp = true } }

    /// Whether the file is longer than what is in use up to `usedEnd`.
    func hasSpare(behind usedEnd: UInt64) -> Bool {
        space.withLock { space in !space.keepsLength && usedEnd < space.length }
    }

    /// Whether the last block of the file may be another than the last one taken.
    var hasGivenUp: Bool { space.withLock { $0.hasGivenUp } }

    /// Makes guest data durable, and what the log said before.
    func flushData() throws(DiskError) {
        let length = space.withLock { $0.length }
        try handle.flushIfWritten()
        log.noteLength(length)
    }
}

internal import DiskStorage

/// What the log of a file that was not closed says must still be changed in it. [MS-VHDX] 2.3.3.
struct VHDXLogReplay: Sendable {
    /// One change; a later one hides an earlier one.
    struct Change: Sendable {
        let range: Range<UInt64>
        /// The 4 KiB; nil: zeros.
        let source: Source?
    }

    /// Where the bytes of a data descriptor are.
    struct Source: Sendable {
        /// In the log.
        let dataOffset: UInt64
        let leading: [UInt8]
        let trailing: [UInt8]
    }

    let entryCount: Int
    let changes: [Change]
    /// How long the file must be.
    let fileLength: UInt64
    private let log: Range<UInt64>

    /// Bytes of a file at most that a log is believed to need.
    private static let fileLengthLimit: UInt64 = 1 << 62

    /// Nil: nothing is to be replayed. Throws if what is to be replayed cannot be.
    init?(_ header: VHDXHeader, _ storage: any Storage) throws(DiskError) {
        guard !header.logGUID.isNull else { return nil }
        let length = try storage.length()
        guard header.logRange.upperBound <= length else {
            throw DiskError(
                .invalidImage,
                "the file is cut short: the log ends at byte \(header.logRange.upperBound), the file at \(length)")
        }
        log = header.logRange
        var reader = VHDXLogReader(storage, log: log, guid: header.logGUID)
        guard let entries = try reader.activeSequence(), let head = entries.last?.header else {
            throw DiskError(
                .needsRepair,
                "it was not closed by its last writer, and its log holds nothing that could be replayed: "
                    + "'vdimg check --repair' takes the image as it is", offset: log.lowerBound)
        }
        guard head.flushedFileOffset <= length else {
            throw DiskError(
                .invalidImage,
                "the file is cut short: by its log it had \(head.flushedFileOffset) bytes, \(length) are there")
        }
        entryCount = entries.count
        let needed = (head.lastFileOffset.alignedUp(to: UInt64(VHDXRegion.alignment)) ?? .max)
        guard needed <= Self.fileLengthLimit else {
            throw DiskError(.invalidImage, "by its log the file has \(head.lastFileOffset) bytes")
        }
        fileLength = max(length, needed)
        changes = try Self.changes(of: entries, &reader, log: log, fileLength: fileLength)
    }

    private static func changes(
        of entries: [VHDXLogReader.Entry], _ reader: inout VHDXLogReader, log: Range<UInt64>, fileLength: UInt64
    ) throws(DiskError) -> [Change] {
        var changes: [Change] = []
        for entry in entries {
            guard changes.count + Int(entry.header.descriptorCount) <= VHDXLogEntryHeader.descriptorLimit else {
                throw DiskError(
                    .unsupported, "its log holds more than \(VHDXLogEntryHeader.descriptorLimit) changes to replay")
            }
            try reader.forEachDescriptor(entry.header, at: entry.offset) { (descriptor, dataOffset) throws(DiskError) in
                guard let descriptor, let range = descriptor.range, range.upperBound <= fileLength,
                    !range.overlaps(log), range.lowerBound >= VHDXRegionTable.offsets[0]
                else {
                    throw DiskError(
                        .invalidImage,
                        "its log changes byte \(descriptor?.fileOffset ?? 0), where no table can be",
                        offset: log.lowerBound + entry.offset)
                }
                guard !range.isEmpty else { return true }
                if case .data(let leading, let trailing) = descriptor.content {
                    let source = Source(dataOffset: dataOffset, leading: leading, trailing: trailing)
                    changes.append(Change(range: range, source: source))
                } else {
                    changes.append(Change(range: range, source: nil))
                }
                return true
            }
        }
        return changes
    }

    /// The bytes of a change, which are not zeros.
    func content(_ source: Source, _ storage: any Storage) throws(DiskError) -> [UInt8] {
        let sector = try storage.bytes(
            at: log.lowerBound + source.dataOffset, count: VHDXLogEntryHeader.sectorSize, for: .log, "the log")
        return VHDXLogDataSector.content(sector, leading: source.leading, trailing: source.trailing)
    }

    /// Makes all changes in the file, durably. Before and after it, and when it is interrupted, the log stays as it is.
    func apply(to storage: any Storage) throws(DiskError) {
        if try storage.length() < fileLength { try storage.setLength(fileLength) }
        for change in changes {
            if let source = change.source {
                try storage.write(content(source, storage), at: change.range.lowerBound, for: .table)
            } else {
                try storage.discard(change.range, mustZero: true, for: .table)
            }
        }
        try storage.flush()
    }
}

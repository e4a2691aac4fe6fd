internal import DiskImage
internal import DiskStorage

/// Looks through an image: headers, region tables, log, and every entry of the table, which must lead to a place of its
/// own.
struct VHDXCheck {
    private let storage: any Storage
    private let file: String
    private let isRepairing: Bool
    private var report = CheckReport()
    private var hasChangedData = false
    private var strayBitmaps = 0
    private var losses = 0
    /// The last chunk of which the sector bitmap was looked for, and whether it is there.
    private var bitmap: (chunk: UInt64, isThere: Bool)?

    /// After so many losses the rest of the table is not looked at.
    private static let lossLimit = 10_000

    init(_ storage: any Storage, file: String, isRepairing: Bool) {
        self.storage = storage
        self.file = file
        self.isRepairing = isRepairing
    }

    mutating func run() throws(DiskError) -> CheckReport {
        var structure = try VHDXStructure(storage, forgivesLog: true)
        try checkLog(structure)
        if isRepairing, structure.replay != nil || structure.logDamage != nil {
            structure = try VHDXStructure(storage, forgivesLog: false)
        }
        try checkCopies(structure)
        if structure.fileLength % UInt64(VHDXRegion.alignment) != 0 {
            add(.note, "the file has \(structure.fileLength) bytes, which is no multiple of 1 MiB")
        }
        report.totalBlocks = structure.table.blockCount
        try checkTable(structure)
        return report
    }

    private mutating func add(_ severity: CheckReport.Severity, _ message: String, isRepaired: Bool = false) {
        report.add(.init(severity, file: file, message, isRepaired: isRepaired))
    }

    // MARK: - Log and headers

    private mutating func checkLog(_ structure: VHDXStructure) throws(DiskError) {
        var headers = structure.headers
        if let replay = structure.replay {
            if isRepairing {
                try replay.apply(to: storage)
                try headers.update(in: storage) { header in
                    header.fileWriteGUID = .random()
                    header.logGUID = .null
                }
            }
            add(
                .repairable,
                "it was not closed by its last writer: \(replay.changes.count) changes of its log are to be made",
                isRepaired: isRepairing)
        } else if let damage = structure.logDamage {
            if isRepairing {
                try headers.update(in: storage) { header in
                    header.fileWriteGUID = .random()
                    header.dataWriteGUID = .random()
                    header.logGUID = .null
                }
            }
            add(
                .loss,
                "it was not closed by its last writer, and of its log: \(damage); what was written last may be lost",
                isRepaired: isRepairing)
        }
    }

    private mutating func checkCopies(_ structure: VHDXStructure) throws(DiskError) {
        if let damage = structure.headers.damage {
            if isRepairing {
                var headers = structure.headers
                try headers.update(in: storage) { $0.fileWriteGUID = .random() }
            }
            add(.repairable, damage, isRepaired: isRepairing)
        }
        if let damage = structure.regionTable.damage {
            if isRepairing {
                try storage.write(
                    structure.regionTable.bytes, at: VHDXRegionTable.offsets[damage.index], for: .header)
                try storage.flush()
            }
            add(.repairable, damage.message, isRepaired: isRepairing)
        }
    }

    // MARK: - Blocks

    private mutating func checkTable(_ structure: VHDXStructure) throws(DiskError) {
        var used: VHDXUsedPlaces
        do throws(DiskError) {
            used = try VHDXUsedPlaces(structure)
        } catch {
            return add(.loss, error.message)
        }
        let inside = VHDXBlockPlaces(structure, end: structure.fileLength)
        var end = structure.reservedRanges.map(\.upperBound).max() ?? 0
        var inUse: UInt64 = 0
        // The bitmaps first: whether a block that is here in parts is worth anything depends on them.
        for wantsPayload in [false, true] {
            try VHDXTableScan.forEachEntry(structure, structure.storage) { (entry, item) throws(DiskError) in
                guard item.isPayload == wantsPayload, losses <= Self.lossLimit else { return }
                let length = item.length(structure)
                guard entry.isInFile else {
                    if let kept = item.keptPlace(entry, structure, structure.fileLength) {
                        end = max(end, kept.upperBound)
                        used.reserve(kept.lowerBound, length)
                    }
                    return try checkAbsent(entry, item, structure)
                }
                guard item.isPayload || structure.isDifferencing else {
                    strayBitmaps += 1
                    return used.reserve(entry.offset, length)
                }
                let isInside =
                    item.isPayload
                    ? inside.isInside(entry.offset, block: item.number)
                    : inside.isInside(entry.offset, length: length)
                guard isInside else {
                    return try lose(item, item.outside(entry, structure, structure.fileLength).message, structure)
                }
                guard try checkPartial(entry, item, structure) else { return }
                guard used.insert(entry.offset, length) else {
                    return try lose(item, "\(item) lies over something else at byte \(entry.offset)", structure)
                }
                end = max(end, entry.offset + length)
                inUse += length
                if item.isPayload { report.allocatedBlocks += 1 }
            }
        }
        if losses > Self.lossLimit {
            return add(.loss, "more than \(Self.lossLimit) findings: the rest of the table is not checked")
        }
        if strayBitmaps > 0 {
            add(.note, "\(strayBitmaps) sector bitmaps are entered, which mean nothing in an image without a parent")
        }
        if hasChangedData { try storage.flush() }
        try checkLength(structure, end: end, used)
    }

    /// An entry of what is not in the file.
    private mutating func checkAbsent(
        _ entry: VHDXEntry, _ item: VHDXTableScan.Item, _ structure: VHDXStructure
    ) throws(DiskError) {
        let known =
            item.isPayload
            ? entry.state <= VHDXEntry.PayloadState.unmapped : entry.state == VHDXEntry.BitmapState.notPresent
        if !known {
            try lose(item, "\(item) is in the state \(entry.state), which there is not", structure)
        }
    }

    /// Whether a block that is said to be here in parts can be; repairs it, where nothing is lost.
    private mutating func checkPartial(
        _ entry: VHDXEntry, _ item: VHDXTableScan.Item, _ structure: VHDXStructure
    ) throws(DiskError) -> Bool {
        guard entry.state == VHDXEntry.PayloadState.partiallyPresent else { return true }
        guard item.isPayload else {
            try lose(item, "\(item) is in the state \(entry.state), which there is not", structure)
            return false
        }
        guard structure.isDifferencing else {
            let place = structure.table.place(ofBlock: item.number)
            if isRepairing {
                try write(VHDXEntry(VHDXEntry.PayloadState.fullyPresent, at: entry.offset), at: place, structure)
            }
            add(
                .repairable, "\(item) is said to be here in parts, in an image without a parent",
                isRepaired: isRepairing)
            return true
        }
        guard try hasBitmap(item.number, structure) else {
            try lose(item, "\(item) is here in parts, and the sector bitmap that says which is missing", structure)
            return false
        }
        return true
    }

    private mutating func hasBitmap(_ block: UInt64, _ structure: VHDXStructure) throws(DiskError) -> Bool {
        let chunk = block >> structure.table.chunkShift
        if let bitmap, bitmap.chunk == chunk { return bitmap.isThere }
        let place = structure.table.place(ofBitmapFor: block)
        let bytes = try structure.storage.bytes(at: place, count: 8, for: .table, "the block allocation table")
        let entry = VHDXEntry(rawValue: try FieldReader(bytes).littleEndian(at: 0))
        let inside = VHDXBlockPlaces(structure, end: structure.fileLength)
        let isThere =
            entry.state == VHDXEntry.BitmapState.present
            && inside.isInside(entry.offset, length: VHDXBlockAllocationTable.bitmapBlockSize)
        bitmap = (chunk, isThere)
        return isThere
    }

    /// What an entry that leads nowhere stood for is lost.
    private mutating func lose(
        _ item: VHDXTableScan.Item, _ message: String, _ structure: VHDXStructure
    ) throws(DiskError) {
        losses += 1
        if isRepairing {
            let table = structure.table
            let place =
                item.isPayload
                ? table.place(ofBlock: item.number) : table.place(ofBitmapFor: item.number << table.chunkShift)
            try write(VHDXEntry(VHDXEntry.PayloadState.notPresent), at: place, structure)
        }
        add(.loss, message, isRepaired: isRepairing)
    }

    /// Changes an entry where it stands: 8 bytes of one sector are there or not. The headers say so before.
    private mutating func write(
        _ entry: VHDXEntry, at place: UInt64, _ structure: VHDXStructure
    ) throws(DiskError) {
        if !hasChangedData {
            var headers = try VHDXHeaders(storage)
            try headers.update(in: storage) { header in
                header.fileWriteGUID = .random()
                header.dataWriteGUID = .random()
            }
            hasChangedData = true
        }
        var fields = FieldWriter(count: 8)
        fields.littleEndian(entry.rawValue, at: 0)
        try storage.write(fields.bytes, at: place, for: .table)
    }

    /// Space that nothing uses: behind everything it can be cut off, between blocks it is used again.
    private mutating func checkLength(
        _ structure: VHDXStructure, end: UInt64, _ used: VHDXUsedPlaces
    ) throws(DiskError) {
        guard !structure.metadata.leavesBlocksAllocated else { return }
        var free: UInt64 = 0
        used.forEachGap(before: end) { free += $0.upperBound - $0.lowerBound }
        if free > 0 {
            add(.note, "\(free) bytes between the blocks are free, and are used again by who writes")
        }
        guard structure.fileLength > end, !storage.traits.hasFixedLength else { return }
        if isRepairing {
            try storage.setLength(end)
            try storage.flush()
        }
        add(
            .leak, "\(structure.fileLength - end) bytes at the end of the file are not in use", isRepaired: isRepairing)
    }
}

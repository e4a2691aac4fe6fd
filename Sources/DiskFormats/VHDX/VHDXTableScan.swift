internal import DiskImage
internal import DiskStorage

/// One pass over the block allocation table: which part of the file is in use, and whether all of it is there.
struct VHDXTableScan {
    /// Where the last thing that is in use ends: a block, a region, the log.
    private(set) var end: UInt64
    /// Which MiB of the file are in use; nil where nobody asked.
    private(set) var places: VHDXUsedPlaces?
    /// How many payload blocks the file holds.
    private(set) var allocatedBlocks: UInt64 = 0

    /// Bytes of the table that are read at once.
    private static let chunkSize: UInt64 = 1 << 20

    /// Goes through the table, in a file of `fileLength` bytes. Throws for an entry that leads to where no block can
    /// be; with `findsPlaces` (``DiskError/Kind/needsRepair``) also for two that lead to the same place.
    init(
        _ structure: VHDXStructure, _ storage: any Storage, fileLength: UInt64, findsPlaces: Bool
    ) throws(DiskError) {
        let inside = VHDXBlockPlaces(structure, end: fileLength)
        var end = structure.reservedRanges.map(\.upperBound).max() ?? 0
        var places = findsPlaces ? try VHDXUsedPlaces(structure) : nil
        var count: UInt64 = 0
        try Self.forEachEntry(structure, storage) { (entry, item) throws(DiskError) in
            let length = item.length(structure)
            guard entry.isInFile else {
                if let kept = item.keptPlace(entry, structure, fileLength) {
                    places?.reserve(kept.lowerBound, length)
                    end = max(end, kept.upperBound)
                }
                return
            }
            guard item.isPayload || structure.isDifferencing else {
                // Some programs enter them in images without a parent, where they mean nothing.
                places?.reserve(entry.offset, length)
                return
            }
            guard
                item.isPayload
                    ? inside.isInside(entry.offset, block: item.number)
                    : inside.isInside(entry.offset, length: length)
            else { throw item.outside(entry, structure, fileLength) }
            end = max(end, entry.offset + length)
            if item.isPayload { count += 1 }
            if places?.insert(entry.offset, length) == false {
                throw DiskError(
                    .needsRepair,
                    "\(item) lies over something else at byte \(entry.offset): run 'vdimg check --repair' first",
                    offset: entry.offset)
            }
        }
        (self.end, allocatedBlocks, self.places) = (end, count, places)
    }

    /// What an entry is of.
    struct Item: CustomStringConvertible {
        let isPayload: Bool
        /// The payload block's number, or the chunk's.
        let number: UInt64

        var description: String { isPayload ? "block \(number)" : "the sector bitmap of chunk \(number)" }

        /// The bytes that it takes in the file.
        func length(_ structure: VHDXStructure) -> UInt64 {
            isPayload ? structure.metadata.blockSize : VHDXBlockAllocationTable.bitmapBlockSize
        }

        /// Space that is kept in the file for a block which is not there: it is left to it, since another program may
        /// put the block there again. [MS-VHDX] 2.5.1.1.
        func keptPlace(_ entry: VHDXEntry, _ structure: VHDXStructure, _ fileLength: UInt64) -> Range<UInt64>? {
            guard isPayload, !entry.isInFile, entry.offset > 0, entry.offset <= fileLength,
                length(structure) <= fileLength - entry.offset
            else { return nil }
            return entry.offset..<entry.offset + length(structure)
        }

        func outside(_ entry: VHDXEntry, _ structure: VHDXStructure, _ fileLength: UInt64) -> DiskError {
            let end = entry.offset.addingReportingOverflow(length(structure))
            let isCut = entry.offset >= UInt64(VHDXRegion.alignment) && (end.overflow || end.partialValue > fileLength)
            return DiskError(
                .invalidImage,
                isCut
                    ? "the file is cut short: \(self) lies at byte \(entry.offset), the file has \(fileLength)"
                    : "\(self) is said to lie at byte \(entry.offset), where no block can be")
        }
    }

    /// Calls `body` with the entries that are not 0.
    static func forEachEntry(
        _ structure: VHDXStructure, _ storage: any Storage, _ body: (VHDXEntry, Item) throws(DiskError) -> Void
    ) throws(DiskError) {
        let table = structure.table
        let range = structure.tableRange
        let width = UInt64(1) << table.chunkShift + 1
        var position = range.lowerBound
        while position < range.upperBound {
            // Holes of the file are zeros, and need not be read.
            guard let data = try storage.nextData(from: position), data.lowerBound < range.upperBound else { return }
            position = max(position, data.lowerBound & ~7)
            let end = min(range.upperBound, position + chunkSize)
            let bytes = try storage.bytes(
                at: position, count: Int(end - position), for: .table, "the block allocation table")
            for place in stride(from: 0, to: bytes.count, by: 8) {
                var value: UInt64 = 0
                for byte in 0..<8 { value |= UInt64(bytes[place + byte]) << UInt64(byte * 8) }
                guard value != 0 else { continue }
                let index = (position - range.lowerBound + UInt64(place)) / 8
                let chunk = index / width
                let isPayload = !table.isBitmap(index)
                let number = isPayload ? index - chunk : chunk
                guard !isPayload || number < table.blockCount else { continue }
                try body(VHDXEntry(rawValue: value), Item(isPayload: isPayload, number: number))
            }
            position = end
        }
    }
}

/// Which MiB of a file are in use, a bit each.
struct VHDXUsedPlaces {
    private static let unit = UInt64(VHDXRegion.alignment)
    /// 16 MiB of bits.
    private static let limit: UInt64 = 1 << 27

    private var bits: [UInt64]
    private let count: UInt64

    /// Knows of the regions and the log alone.
    init(_ structure: VHDXStructure) throws(DiskError) {
        count = structure.fileLength.dividedRoundingUp(by: Self.unit)
        guard count <= Self.limit else {
            throw DiskError(.unsupported, "the file has \(structure.fileLength) bytes, more than any image needs")
        }
        bits = [UInt64](repeating: 0, count: Int(count.dividedRoundingUp(by: 64)))
        for range in structure.reservedRanges { reserve(range.lowerBound, range.upperBound - range.lowerBound) }
    }

    private func numbers(_ offset: UInt64, _ length: UInt64) -> Range<UInt64> {
        let first = min(count, offset / Self.unit)
        let (end, overflow) = offset.addingReportingOverflow(length)
        return first..<(overflow ? count : max(first, min(count, end.dividedRoundingUp(by: Self.unit))))
    }

    private func isUsed(_ number: UInt64) -> Bool { bits[Int(number / 64)] >> (number % 64) & 1 != 0 }

    /// Notes that a range is in use, as far as it lies in the file; answers whether none of it was.
    mutating func insert(_ offset: UInt64, _ length: UInt64) -> Bool {
        let range = numbers(offset, length)
        for number in range where isUsed(number) { return false }
        reserve(offset, length)
        return true
    }

    /// Notes that a range is in use, which may be so already.
    mutating func reserve(_ offset: UInt64, _ length: UInt64) {
        for number in numbers(offset, length) { bits[Int(number / 64)] |= 1 << (number % 64) }
    }

    /// Calls `body` with the runs that are not in use before `end`, in bytes.
    func forEachGap(before end: UInt64, _ body: (Range<UInt64>) -> Void) {
        let last = min(count, end / Self.unit)
        var number: UInt64 = 0
        while number < last {
            if isUsed(number) {
                number += 1
                continue
            }
            let first = number
            while number < last, !isUsed(number) { number += 1 }
            body(first * Self.unit..<number * Self.unit)
        }
    }
}

/// Where blocks can lie. A plain value, for the hot path.
struct VHDXBlockPlaces {
    private let blockSize: UInt64
    private let virtualSize: UInt64
    /// Behind all regions and the log.
    private let firstFree: UInt64
    /// What lies before that, in order; blocks may lie between.
    private let reserved: [Range<UInt64>]
    private let end: UInt64

    init(_ structure: VHDXStructure, end: UInt64) {
        blockSize = structure.metadata.blockSize
        virtualSize = structure.metadata.virtualDiskSize
        reserved = structure.reservedRanges
        firstFree = reserved.map(\.upperBound).max() ?? 0
        self.end = end
    }

    /// Whether the payload block that is said to begin at `start` lies where blocks can, before the file's end, as far
    /// as the disk has bytes in it.
    @inline(__always)
    func isInside(_ start: UInt64, block: UInt64) -> Bool { isInside(start, block: block, end: end) }

    /// The same, of a file that has another end by now.
    @inline(__always)
    func isInside(_ start: UInt64, block: UInt64, end: UInt64) -> Bool {
        let used = min(blockSize, virtualSize &- block &* blockSize)
        return start >= firstFree && start <= end && used <= end &- start || isBetween(start, used, end)
    }

    /// The same for something of `length` bytes.
    @inline(__always)
    func isInside(_ start: UInt64, length: UInt64, end: UInt64? = nil) -> Bool {
        let end = end ?? self.end
        return start >= firstFree && start <= end && length <= end &- start || isBetween(start, length, end)
    }

    @inline(never)
    private func isBetween(_ start: UInt64, _ length: UInt64, _ end: UInt64) -> Bool {
        guard start <= end, length <= end - start else { return false }
        return !reserved.contains { $0.overlaps(start..<start + length) }
    }
}

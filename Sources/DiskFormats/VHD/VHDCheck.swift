internal import DiskImage
internal import DiskStorage

/// Looks through an image: footers, header, and every entry of the table, which must lead to a place of its own.
struct VHDCheck {
    private let structure: VHDStructure
    private let storage: any Storage
    private let file: String
    private let isRepairing: Bool
    private var report = CheckReport()
    private var hasWritten = false
    private var unsetBitmaps = 0
    private var used: VHDUsedPlaces

    /// After so many losses the rest of the table is not looked at.
    private static let lossLimit = 10_000

    init(_ structure: VHDStructure, _ storage: any Storage, file: String, isRepairing: Bool) {
        self.structure = structure
        self.storage = storage
        self.file = file
        self.isRepairing = isRepairing
        used = VHDUsedPlaces(
            fileLength: structure.fileLength, blockLength: max(1, structure.bitmapSize + structure.blockSize))
    }

    mutating func run() throws(DiskError) -> CheckReport {
        if let cutShort = structure.cutShort { add(.loss, cutShort) }
        for damage in structure.damages { try check(damage) }
        if structure.hasShortFooter { add(.note, "the footer has 511 bytes, as Virtual PC before 2004 wrote it") }
        if structure.footer.currentSize % 512 != 0 {
            add(.note, "the size, \(structure.footer.currentSize) bytes, is no multiple of 512: the rest is not shown")
        }
        report.totalBlocks = structure.blockCount
        if structure.header != nil { try checkTable() }
        if hasWritten { try storage.flush() }
        return report
    }

    private mutating func add(_ severity: CheckReport.Severity, _ message: String, isRepaired: Bool = false) {
        report.add(.init(severity, file: file, message, isRepaired: isRepaired))
    }

    // MARK: - Headers

    /// Footers and the header are written again from what is whole.
    private mutating func check(_ damage: VHDDamage) throws(DiskError) {
        if isRepairing {
            switch damage.part {
            case .footerCopy: try storage.write(structure.footerBytes, at: 0, for: .header)
            case .endFooter: try writeEndFooter()
            case .dynamicHeader:
                let place = structure.headerRange.lowerBound
                let bytes = try storage.bytes(
                    at: place, count: VHDDynamicHeader.byteCount, for: .header, "the dynamic header")
                try storage.write(VHDDynamicHeader.withChecksum(bytes), at: place, for: .header)
            }
            try storage.flush()
        }
        add(.repairable, damage.message, isRepaired: isRepairing)
    }

    private func writeEndFooter() throws(DiskError) {
        if let place = structure.endFooterOffset {
            let count = structure.hasShortFooter ? VHDFooter.byteCount - 1 : VHDFooter.byteCount
            return try storage.write(Array(structure.footerBytes.prefix(count)), at: place, for: .footer)
        }
        // In the place of a damaged one, if no block is said to reach there; else behind everything.
        var place = structure.fileLength
        if let damaged = structure.damagedFooterOffset {
            var usedEnd = max(structure.tableEnd, structure.headerRange.upperBound)
            let length = structure.bitmapSize + structure.blockSize
            try VHDTableScan.forEachEntry(structure, storage) { (entry, _) throws(DiskError) in
                let blockEnd = UInt64(entry) * 512 + length
                if blockEnd <= structure.fileLength { usedEnd = max(usedEnd, blockEnd) }
            }
            if usedEnd <= damaged { place = damaged }
        }
        guard let place = place.alignedUp(to: 512) else { return }
        try storage.write(structure.footerBytes, at: place, for: .footer)
    }

    // MARK: - Blocks

    private mutating func checkTable() throws(DiskError) {
        if used.isOff { add(.note, "the file has too many blocks to look for any that lie over each other") }
        for (number, locator) in (structure.header?.locators ?? []).enumerated()
        where structure.isDifferencing && locator.isUsed {
            let (pathEnd, overflow) = locator.dataOffset.addingReportingOverflow(UInt64(locator.dataLength))
            if overflow || pathEnd > structure.fileLength {
                add(.note, "parent locator \(number + 1) leads to byte \(locator.dataOffset), outside the file")
            }
        }
        let places = VHDBlockPlaces(structure)
        let limit = structure.endFooterOffset ?? structure.fileLength
        var wrong: [(block: UInt64, message: String)] = []
        var isCutOff = false
        try VHDTableScan.forEachEntry(structure, storage) { (entry, block) throws(DiskError) in
            guard !isCutOff else { return }
            let start = UInt64(entry) * 512
            if !places.isInside(start, block: block, end: limit) {
                wrong.append((block, "block \(block) is said to lie at byte \(start), where no block can be"))
            } else if let other = used.insert(start) {
                wrong.append((block, "block \(block) at byte \(start) lies over the one at byte \(other)"))
            } else {
                report.allocatedBlocks += 1
                if !structure.isDifferencing, try !hasFullBitmap(start) { unsetBitmaps += 1 }
            }
            isCutOff = wrong.count > Self.lossLimit
        }
        for (block, message) in wrong { try clear(block, message) }
        if isCutOff {
            add(.loss, "more than \(Self.lossLimit) findings: the rest of the table is not checked")
        }
        if unsetBitmaps > 0 {
            add(
                .note,
                "\(unsetBitmaps) blocks have sector bitmaps that are not all ones: in a dynamic image they mean nothing"
            )
        }
        addLeak()
    }

    private func hasFullBitmap(_ start: UInt64) throws(DiskError) -> Bool {
        let count = max(1, Int(structure.blockSize / 512 / 8))
        return try storage.availableBytes(at: start, count: count, for: .table).allSatisfy { $0 == 0xff }
    }

    /// What an entry that leads nowhere stood for is lost; of two blocks in one place, the first one keeps it.
    private mutating func clear(_ block: UInt64, _ message: String) throws(DiskError) {
        if isRepairing {
            let place = structure.tableRange.lowerBound + block * 4
            try storage.write([0xff, 0xff, 0xff, 0xff], at: place, for: .table)
            hasWritten = true
        }
        add(.loss, message, isRepaired: isRepairing)
    }

    /// Space of the file that no block takes; between blocks there may be less than a page, by which data is aligned.
    private mutating func addLeak() {
        let first = max(structure.tableEnd, structure.headerRange.upperBound)
        let room = max(first, structure.endFooterOffset ?? structure.fileLength) - first
        let taken = report.allocatedBlocks * (structure.bitmapSize + structure.blockSize)
        let padding = (report.allocatedBlocks + 1) * VHDFile.alignment
        guard room > taken + padding else { return }
        add(.leak, "\(room - taken) bytes of the file's length are not in use; they may take no space")
    }
}

/// Where blocks begin, so that those are found which lie over each other: the file in pieces of a block's length, in
/// each of which one block can begin.
private struct VHDUsedPlaces {
    /// In each piece the sector at which its block begins; 0: none does.
    private var starts: [UInt32]
    private let blockLength: UInt64
    /// Too many pieces to keep.
    let isOff: Bool
    /// 16 MiB of them.
    private static let limit: UInt64 = 4 << 20
    /// Further on a table's sector numbers do not reach.
    private static let reach: UInt64 = (1 << 32) * 512

    init(fileLength: UInt64, blockLength: UInt64) {
        self.blockLength = blockLength
        let count = min(fileLength, Self.reach) / blockLength + 2
        isOff = count > Self.limit
        starts = [UInt32](repeating: 0, count: isOff ? 0 : Int(count))
    }

    /// Notes a block that lies inside the file; answers where the one begins that it lies over.
    mutating func insert(_ start: UInt64) -> UInt64? {
        guard !isOff else { return nil }
        let piece = Int(start / blockLength)
        for number in max(0, piece - 1)...min(piece + 1, starts.count - 1) where starts[number] != 0 {
            let other = UInt64(starts[number]) * 512
            if max(start, other) - min(start, other) < blockLength { return other }
        }
        starts[piece] = UInt32(truncatingIfNeeded: start / 512)
        return nil
    }
}

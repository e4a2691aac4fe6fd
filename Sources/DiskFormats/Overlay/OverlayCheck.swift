internal import DiskImage
internal import DiskStorage

/// Looks at every entry of an overlay: it must lead to a block of the file that no other entry leads to.
struct OverlayCheck {
    /// The most blocks of a file whose use is noted, a bit each: 32 MiB.
    private static let blockLimit: UInt64 = 1 << 28

    private let image: OverlayImage
    private let file: String
    private let isRepairing: Bool
    private var report = CheckReport()
    private var used: [UInt64]
    private let countsUse: Bool

    init(_ image: OverlayImage, file: String, isRepairing: Bool) {
        self.image = image
        self.file = file
        self.isRepairing = isRepairing
        let blocks = image.end.value >> image.header.blockShift + 1
        countsUse = blocks <= Self.blockLimit
        used = [UInt64](repeating: 0, count: countsUse ? Int(blocks / 64 + 1) : 0)
    }

    mutating func run() throws(DiskError) -> CheckReport {
        let header = image.header
        let first = OverlayHeader.tableOffset
        let end = first + header.blockCount * 4
        report.totalBlocks = header.blockCount
        if !countsUse { report.add(.init(.note, file: file, "the file is too long to look for blocks used twice")) }
        var place = first
        while place < end {
            let entry = try image.table.entry32(at: place)
            if entry <= 1 {
                place = try image.table.endOfRun(of: entry, in: place..<end)
                continue
            }
            try check(entry, block: (place - first) / 4)
            place += 4
        }
        if isRepairing { try image.close() }
        addLeaks()
        return report
    }

    private mutating func check(_ entry: UInt32, block: UInt64) throws(DiskError) {
        let offset = UInt64(entry) << image.header.blockShift
        report.allocatedBlocks += 1
        if offset < image.header.dataOffset || offset >= image.end.value {
            try remove(block, "block \(block) is said to lie at byte \(offset), outside the file's blocks")
        } else if countsUse {
            let bit = UInt64(1) << UInt64(entry % 64)
            if used[Int(entry / 64)] & bit != 0 {
                try remove(block, "block \(block) is said to lie at byte \(offset), where another one lies")
            }
            used[Int(entry / 64)] |= bit
        }
    }

    /// What an entry that leads nowhere stood for is lost; without it, the image below shows.
    private mutating func remove(_ block: UInt64, _ message: String) throws(DiskError) {
        if isRepairing { try image.store(0, block: block) }
        report.add(.init(.loss, file: file, message, isRepaired: isRepairing))
        report.allocatedBlocks -= 1
    }

    /// Blocks that nothing points to.
    private mutating func addLeaks() {
        guard countsUse else { return }
        let header = image.header
        let blocks = image.end.value.dividedRoundingUp(by: header.blockSize) - header.dataOffset >> header.blockShift
        let unused = blocks - min(blocks, UInt64(used.reduce(0) { $0 + $1.nonzeroBitCount }))
        if unused > 0 {
            report.add(
                .init(.note, file: file, "\(unused) blocks of the file are used by nothing; they may take no space"))
        }
    }
}

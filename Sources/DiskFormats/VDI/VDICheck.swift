internal import DiskImage
internal import DiskStorage

/// Looks at every entry of the block map and at the header's count; repair removes entries that cannot be right, as
/// VirtualBox's does, and puts the count right.
struct VDICheck {
    private let image: VDIImage
    private let storage: any Storage
    private let file: String
    private let isRepairing: Bool
    private var report = CheckReport()
    private var hasRepaired = false

    init(_ image: VDIImage, _ request: OpenRequest, isRepairing: Bool) {
        self.image = image
        storage = request.storage
        file = request.path
        self.isRepairing = isRepairing
    }

    mutating func run() throws(DiskError) -> CheckReport {
        let header = image.header
        report.totalBlocks = header.blockCount
        checkHeader()
        let length = try storage.length()
        if isRepairing { try refuseTooMuch(length) }
        var scan = VDIMapScan(header, table: image.table, length: length)
        var holes: UInt64 = 0
        var removed: UInt64 = 0
        try scan.run { (fault, blocks, entry) throws(DiskError) in
            if fault == .cutShort { return try complete(blocks.lowerBound, entry, length) }
            try remove(blocks, entry, fault)
            removed += UInt64(blocks.count)
        } onHole: {
            holes += $0.count
        }
        report.allocatedBlocks = scan.allocated - removed
        addLeaks(places: scan.places, usedEnd: scan.usedEnd, holes: holes)
        try checkCount(end: scan.usedEnd)
        if hasRepaired { try image.flushRepairs() }
        return report
    }

    private mutating func add(_ severity: CheckReport.Severity, _ message: String, isRepaired: Bool = false) {
        report.add(.init(severity, file: file, message, isRepaired: isRepaired))
    }

    private mutating func checkHeader() {
        let header = image.header
        if header.diskSize != header.virtualSize {
            add(
                .note,
                "the disk's size, \(header.diskSize) bytes, is no multiple of 512: the last "
                    + "\(header.diskSize - header.virtualSize) bytes are not shown")
        }
        if header.uuid.isNull || header.modificationUUID.isNull {
            add(.note, "the image has no UUID or no modification UUID, without which VirtualBox does not open it")
        }
    }

    /// Entries that a repair removes at most; a map with more wrong ones is none.
    private static let removalLimit: UInt64 = 1 << 24

    /// Throws if so much is wrong that a repair makes no sense.
    private func refuseTooMuch(_ length: UInt64) throws(DiskError) {
        var scan = VDIMapScan(image.header, table: image.table, length: length)
        var count: UInt64 = 0
        try scan.run { (_, blocks, _) throws(DiskError) in
            count += UInt64(blocks.count)
            guard count <= Self.removalLimit else {
                throw DiskError(
                    .invalidImage,
                    "more than \(Self.removalLimit) entries of the block map cannot be right: it is beyond repair",
                    offset: image.header.mapOffset)
            }
        }
    }

    /// What an entry that leads nowhere stood for is lost; without it, the image below shows, or zeros.
    private mutating func remove(
        _ blocks: Range<UInt64>, _ entry: UInt32, _ fault: VDIMapScan.Fault
    ) throws(DiskError) {
        if isRepairing {
            for block in blocks { try image.store(VDIEntry.free, block: block) }
            hasRepaired = true
        }
        // The text of what is not kept is not made: there may be millions.
        var message = ""
        if report.findings.count < CheckReport.limit {
            let (first, last) = (blocks.lowerBound, blocks.upperBound - 1)
            message =
                (first == last ? "block \(first) is" : "blocks \(first) to \(last) are")
                + " said to lie in block \(entry) of the file, "
                + (fault == .outside ? "which the file does not have" : "where another one lies")
        }
        add(.loss, message, isRepaired: isRepairing)
    }

    /// A block that the file ends inside of is completed with zeros; what there is of it is kept.
    private mutating func complete(_ block: UInt64, _ entry: UInt32, _ length: UInt64) throws(DiskError) {
        let start = image.space.offset(of: UInt64(entry))
        let there = length - min(length, start)
        let inDisk = min(image.blockSize, image.virtualSize - min(image.virtualSize, block * image.blockSize))
        if isRepairing {
            try storage.setLength(start + image.blockSize)
            hasRepaired = true
        }
        add(
            there < inDisk ? .loss : .repairable,
            "block \(block) is said to lie in block \(entry) of the file, which holds \(there) of its "
                + "\(image.blockSize) bytes", isRepaired: isRepairing)
    }

    /// Blocks of the file that nothing points to.
    private mutating func addLeaks(places: UInt64, usedEnd: UInt64, holes: UInt64) {
        guard holes > 0, !storage.traits.hasFixedLength else { return }
        let behind = places - min(places, usedEnd)
        let words = behind < holes ? "" : ", all of them behind the last one that is used"
        add(.leak, "\(holes) blocks of the file are used by nothing\(words); writing to the disk uses them again")
    }

    /// Other programs put the next block where the count says; so it must not be less than what is used. A count that
    /// is larger, as an interrupted session leaves it, is only space that they do not use.
    private mutating func checkCount(end: UInt64) throws(DiskError) {
        let count = UInt64(image.header.allocatedBlocks)
        guard count != end else { return }
        if isRepairing {
            try image.storeCount(end)
            hasRepaired = true
        }
        let danger = count < end ? ": VirtualBox and QEMU would write over some of them" : ""
        add(
            count < end ? .repairable : .leak,
            "the header counts \(count) allocated blocks, and those that the map leads to end at \(end)\(danger)",
            isRepaired: isRepairing)
    }
}

extension VDIImage {
    /// Stores the header's count, to be written after the entries.
    func storeCount(_ count: UInt64) throws(DiskError) {
        let value = UInt32(truncatingIfNeeded: count)
        while try !table.store32(value, at: header.allocatedBlocksOffset, .header) { try flushRepairs() }
    }

    /// Writes what a repair changed.
    func flushRepairs() throws(DiskError) {
        try tables.flush { () throws(DiskError) in try storages[0].storage.flush() }
    }
}

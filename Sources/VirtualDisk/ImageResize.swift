internal import DiskImage
internal import DiskPartitions
public import DiskStorage

/// Gives the disk of an image another size.
///
/// A larger disk has zeros behind its former end, also over a parent whose disk is larger still. One becomes smaller
/// only where nothing is lost: what is cut off must read as zeros (a GUID partition table's backup excepted), and no
/// partition may lie there. Whatever fails, and at whatever moment the process ends, the image opens afterwards, has
/// its former size or the new one, and shows the same bytes.
public struct ImageResize: Sendable {
    /// A size, or a difference to the present one, in bytes.
    public enum Size: Sendable, Equatable {
        case exactly(UInt64)
        case larger(by: UInt64)
        case smaller(by: UInt64)
    }

    /// What has come of it.
    public struct Outcome: Sendable, Equatable {
        /// The size that the disk had, in bytes.
        public let oldSize: UInt64
        /// The size that it has.
        public let newSize: UInt64
        /// Whether the disk has a GUID partition table, whose backup is not at the disk's end any more.
        public let hasStrayBackupTable: Bool
    }

    /// The image: the top one of its chain.
    public var path: String
    public var size: Size
    /// How the image and its parents are opened; whether it is writable is decided here.
    public var options: DiskOptions
    /// Whether the disk may become smaller.
    public var allowsShrinking = false
    /// Whether data and partitions may be cut off.
    public var discardsData = false

    public init(path: String, size: Size, options: DiskOptions = DiskOptions()) {
        self.path = path
        self.size = size
        self.options = options
    }

    /// Does it. While what would be cut off is looked through, it can be cancelled; nothing is changed then.
    ///
    /// Throws `DiskError.Kind.losesData` where something would be cut off that may not be,
    /// `DiskError.Kind.unsupported` for an image that cannot have that size.
    public func run(_ control: OperationControl = OperationControl()) throws(DiskError) -> Outcome {
        do throws(DiskError) {
            let outcome = try resize(control)
            return outcome
        } catch {
            throw error.about(path)
        }
    }

    private func resize(_ control: OperationControl) throws(DiskError) -> Outcome {
        let disk = try openDisk()
        let old = disk.size
        let plan: Plan
        do throws(DiskError) {
            plan = try makePlan(disk, control)
            try plan.apply(to: disk)
        } catch {
            try? disk.close(movingBlocks: false)  // the first error is the one to tell
            throw error
        }
        try disk.close(movingBlocks: false)
        return Outcome(oldSize: old, newSize: plan.newSize, hasStrayBackupTable: plan.hasStrayBackupTable)
    }

    private func openDisk() throws(DiskError) -> Disk {
        var options = options
        guard options.snapshot == nil, options.overlay == nil else {
            throw DiskError(
                .invalidArgument, "an image itself is given another size, neither a snapshot nor an overlay")
        }
        options.isWritable = true
        options.lazyFlushInterval = 0
        options.cache = nil
        return try Disk.open(path, options: options)
    }

    // MARK: - What is to be done

    /// What is to be done, when nothing speaks against it.
    private struct Plan {
        let newSize: UInt64
        let hasStrayBackupTable: Bool
        /// Where the parents' disk ends that must not be seen behind the former end; 0: nothing of it would be.
        let hiddenEnd: UInt64

        func apply(to disk: Disk) throws(DiskError) {
            guard newSize != disk.size, let image = disk.current.chain.layers[0].backend as? any EditableBackend else {
                return
            }
            guard hiddenEnd > disk.size else { return try image.resize(to: newSize) }
            try disk.holdLastBlock()
            try image.resize(to: newSize, hidingParentUpTo: hiddenEnd)
        }
    }

    private func makePlan(_ disk: Disk, _ control: OperationControl) throws(DiskError) -> Plan {
        let backend = disk.current.chain.layers[0].backend
        guard backend is any EditableBackend else {
            throw DiskError(.unsupported, "an image of the format \(backend.format) cannot get another size")
        }
        let new = try newSize(of: disk)
        let table = try PartitionTable.read(from: disk)
        if new < disk.size { try checkShrinking(disk, to: new, table, control) }
        var hiddenEnd: UInt64 = 0
        if new > disk.size, disk.current.chain.layers.count > 1 {
            hiddenEnd = min(new, disk.current.chain.layers[1].backend.virtualSize)
            if hiddenEnd > disk.size, try disk.current.chain.isKnownZero(disk.size, hiddenEnd - disk.size, from: 1) {
                hiddenEnd = 0
            }
        }
        return Plan(
            newSize: new, hasStrayBackupTable: table.kind == .gpt && new != disk.size, hiddenEnd: hiddenEnd)
    }

    private func newSize(of disk: Disk) throws(DiskError) -> UInt64 {
        let (new, overflow): (UInt64, Bool)
        switch size {
        case .exactly(let bytes): (new, overflow) = (bytes, false)
        case .larger(let bytes): (new, overflow) = disk.size.addingReportingOverflow(bytes)
        case .smaller(let bytes): (new, overflow) = disk.size.subtractingReportingOverflow(bytes)
        }
        guard !overflow, new > 0 else {
            throw DiskError(
                .invalidArgument, "the disk has \(disk.size) bytes: it cannot become so much smaller or larger")
        }
        let unit = UInt64(disk.sectorSize ?? 512)
        guard new % unit == 0 || new == disk.size else {
            throw DiskError(.invalidArgument, "a disk of \(new) bytes cannot be: it has whole sectors of \(unit) bytes")
        }
        return new
    }

    // MARK: - Smaller

    private func checkShrinking(
        _ disk: Disk, to new: UInt64, _ table: PartitionTable, _ control: OperationControl
    ) throws(DiskError) {
        guard allowsShrinking || discardsData else {
            throw DiskError(
                .losesData,
                "the disk would become smaller, \(new) instead of \(disk.size) bytes: that must be asked for (--shrink)"
            )
        }
        guard !discardsData else { return }
        if let partition = table.partitions.first(where: { $0.range.upperBound > new }) {
            throw DiskError(
                .losesData,
                "partition \(partition.number) ends at byte \(partition.range.upperBound): a disk of \(new) bytes "
                    + "would cut it off (--discard-data does so)")
        }
        var position = new
        control.begin("checking", total: disk.size - new)
        // What is left of the disk's own is the table's backup, which the table at the disk's beginning outlives.
        let backups = table.kind == .gpt ? table.areas.filter { $0.upperBound > new && $0.lowerBound > 0 } : []
        for backup in backups where backup.lowerBound >= position {
            try checkZero(disk, position..<backup.lowerBound, new, control)
            position = max(position, backup.upperBound)
        }
        if position < disk.size { try checkZero(disk, position..<disk.size, new, control) }
    }

    private func checkZero(
        _ disk: Disk, _ range: Range<UInt64>, _ new: UInt64, _ control: OperationControl
    ) throws(DiskError) {
        guard !range.isEmpty else { return }
        try disk.current.chain.forEachExtent(
            offset: range.lowerBound, length: range.upperBound - range.lowerBound
        ) { (extent) throws(DiskError) in
            guard extent.isAllocated else {
                control.advance(by: extent.length)
                return true
            }
            var position = extent.offset
            let end = extent.offset + extent.length
            while position < end {
                try control.checkCancelled()
                let count = Int(min(1 << 20, end - position))
                let bytes = try disk.read(at: position, count: count)
                if let first = bytes.firstIndex(where: { $0 != 0 }) {
                    throw DiskError(
                        .losesData,
                        "the disk holds data at byte \(position + UInt64(first)), which a disk of \(new) bytes would "
                            + "not have (--discard-data cuts it off)")
                }
                position += UInt64(count)
                control.advance(by: UInt64(count))
            }
            return true
        }
    }
}

extension Disk {
    /// Makes the top image hold the block in which the disk ends, if it ends inside one and the parents hold something
    /// there: what lies behind the disk's end in that block can then be made zeros.
    fileprivate func holdLastBlock() throws(DiskError) {
        let unit = UInt64(sectorSize ?? 512)
        // (One block as large as the disk stands for blocks that end anywhere.)
        guard blockSize > 0, size % blockSize != 0 || size == blockSize, size >= unit else { return }
        var batch = ExtentBatch()
        try current.chain.top.map(size - unit, unit, into: &batch)
        guard batch[0].kind == .absent else { return }
        try write(read(at: size - unit, count: Int(unit)), at: size - unit)
        try flush()
    }
}

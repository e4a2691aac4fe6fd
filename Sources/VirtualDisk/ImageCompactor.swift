internal import DiskImage
internal import DiskPartitions
internal import DiskStorage

/// The work of a compaction; nobody else uses the disk.
struct ImageCompactor {
    /// Bytes looked at in one step where blocks are larger, or where there are none.
    private static let stepSize: UInt64 = 1 << 20
    /// The shortest run of zeros that becomes a hole of a file; holes begin and end at multiples of its page.
    private static let shortestHole: UInt64 = 64 << 10
    private static let page: UInt64 = 4096
    /// Runs that are given up before a flush.
    private static let releasedLimit = 4096
    /// Bytes of blocks that are moved before a flush.
    private static let movedAtOnce: UInt64 = 64 << 20

    private let disk: Disk
    /// Nobody else uses the disk, so that its chain stays what it is.
    private let chain: Chain
    private let options: ImageCompaction.Options
    private let control: OperationControl
    private let backend: any ImageBackend
    private let compactable: (any CompactableBackend)?
    var result = ImageCompaction()
    /// Whether drop was refused by the format: blocks can become holes alone.
    private var keepsBlocks = false

    init(_ disk: Disk, _ options: ImageCompaction.Options, _ control: OperationControl) {
        self.disk = disk
        chain = disk.current.chain
        self.options = options
        self.control = control
        backend = chain.layers[0].backend
        compactable = backend as? any CompactableBackend
    }

    mutating func run() throws(DiskError) {
        result.before = try disk.topSpace()
        compactable?.beginReleasing()
        if options.dropsFreeSpace { try dropFreeSpace() }
        try dropBlocks()
        try giveBack()
        try shrink()
        if keepsBlocks {
            result.notes.append(
                "this image keeps a place for every block (fixed): zeros are holes of its file now, which stays as long"
            )
        }
    }

    /// Nothing moves any more: after an error, and when it was asked to stop.
    func stop() {
        compactable?.stopShrinking()
        guard chain.writing.hasBegun else { return }
        // Only what is known to be durable is built on; otherwise the next run does it.
        do throws(DiskError) {
            try backend.flush()
            try punchReleased()
            try compactable?.finishShrinking()
        } catch {
            return
        }
    }

    // MARK: - Blocks

    /// Goes through all that the image holds, and gives up what need not be there.
    private mutating func dropBlocks() throws(DiskError) {
        control.begin("looking for zeros", total: disk.size)
        var position: UInt64 = 0
        while position < disk.size {
            try control.checkCancelled()
            position = disk.blockSize == 0 ? try punchStep(position) : try dropStep(position)
            control.advance(to: position)
        }
    }

    /// Looks at one block, or at a run of blocks of which the image holds nothing; answers where it ends.
    private mutating func dropStep(_ position: UInt64) throws(DiskError) -> UInt64 {
        var batch = ExtentBatch()
        try chain.top.map(position, disk.size - position, into: &batch)
        let extent = batch[0]
        let end = min(disk.size, position + disk.blockSize)
        let run = position + extent.length
        let wholeEnd = run >= disk.size ? disk.size : run & ~(disk.blockSize - 1)
        if wholeEnd > position {
            if extent.kind == .absent { return wholeEnd }
            if extent.kind == .zero {
                if compactable?.zeroBlocksMayHavePlaces == true { try dropZeroBlocks(position, wholeEnd) }
                return wholeEnd
            }
        }
        switch try compare(position..<end) {
        case .other: break
        case .same(let isZero):
            if try drop(position..<end, leaving: .absent) {
                if isZero { result.zeroBytes += end - position } else { result.sameBytes += end - position }
            } else {
                keepsBlocks = true
                if isZero { try punch(position..<end) }
            }
        case .zero:
            if try drop(position..<end, leaving: .zero) {
                result.zeroBytes += end - position
            } else {
                try punch(position..<end)
            }
        }
        return end
    }

    /// Zero blocks may have places in the file, which they need not have.
    private func dropZeroBlocks(_ start: UInt64, _ end: UInt64) throws(DiskError) {
        let step = Self.stepSize * 64
        var position = start
        while position < end {
            let stop = min(end, position + max(step, disk.blockSize))
            let isZeroBelow = try chain.isKnownZero(position, stop - position, from: 1)
            _ = try drop(position..<stop, leaving: isZeroBelow ? .absent : .zero)
            position = stop
        }
    }

    private enum Finding {
        /// The images below show the same.
        case same(isZero: Bool)
        /// Zeros, which hide something else.
        case zero
        case other
    }

    /// Compares what the disk shows of a block with zeros and with what the images below show.
    private func compare(_ block: Range<UInt64>) throws(DiskError) -> Finding {
        let isZeroBelow = try chain.isKnownZero(block.lowerBound, block.upperBound - block.lowerBound, from: 1)
        var isZero = true
        var isSame = true
        var position = block.lowerBound
        while position < block.upperBound, isZero || isSame {
            let start = position
            let count = Int(min(UInt64(ScratchPool.size), block.upperBound - position))
            position += UInt64(count)
            try chain.scratch.withBuffer { (held) throws(DiskError) in
                let held = held.slice(0, count)
                try chain.read(into: held, at: start)
                let hasZeros = held.readOnly.isZero
                isZero = isZero && hasZeros
                if isZeroBelow {
                    isSame = isSame && hasZeros
                    return
                }
                guard isSame else { return }
                try chain.scratch.withBuffer { (shown) throws(DiskError) in
                    let shown = shown.slice(0, count)
                    try chain.read(into: shown, at: start, from: 1)
                    isSame = held.readOnly.firstDifference(from: shown.readOnly) == nil
                }
            }
        }
        return isSame ? .same(isZero: isZero) : isZero ? .zero : .other
    }

    /// Gives up whole blocks; answers false if the format cannot. Of what the format keeps the space is not given back
    /// before a flush.
    private func drop(_ range: Range<UInt64>, leaving kind: DroppedKind) throws(DiskError) -> Bool {
        guard let compactable, compactable.givesUpBlocks else { return false }
        try chain.beginWriting()
        let isDone = try backend.drop(
            offset: range.lowerBound, length: range.upperBound - range.lowerBound, leaving: kind)
        try giveBackIfMuch()
        return isDone
    }

    private func giveBackIfMuch() throws(DiskError) {
        let waiting = compactable?.released.reduce(0) { $0 + $1.count } ?? 0
        if waiting >= Self.releasedLimit { try giveBack() }
    }

    // MARK: - Space

    /// Makes durable what was given up, and then gives its space back.
    private func giveBack() throws(DiskError) {
        guard chain.writing.hasBegun else { return }
        do throws(DiskError) {
            try backend.flush()
            try punchReleased()
        } catch {
            throw error.about(chain.layers[0].path)
        }
    }

    /// No entry on the disk leads there, and nothing was reserved since.
    private func punchReleased() throws(DiskError) {
        for places in compactable?.released ?? [] {
            for run in places.take() {
                let end = min(run.range.upperBound, try run.handle.storage.length())
                if run.range.lowerBound < end {
                    try run.handle.discard(run.range.lowerBound..<end, for: .guestData)
                }
            }
        }
    }

    // MARK: - Zeros that stay

    /// Looks at a piece of an image without blocks; answers where it ends.
    private mutating func punchStep(_ position: UInt64) throws(DiskError) -> UInt64 {
        let end = min(disk.size, (position / Self.stepSize + 1) * Self.stepSize)
        keepsBlocks = true
        // Holes are passed over.
        guard let data = try disk.nextData(from: position) else { return disk.size }
        guard data < end else { return data & ~(Self.page - 1) }
        try punch(max(position, data & ~(Self.page - 1))..<end)
        return end
    }

    /// Makes holes of the file where it stores zeros, as they are, in a range.
    private mutating func punch(_ range: Range<UInt64>) throws(DiskError) {
        var batch = ExtentBatch()
        var position = range.lowerBound
        while position < range.upperBound {
            batch.removeAll()
            try chain.top.map(position, range.upperBound - position, into: &batch)
            let extent = batch[0]
            if extent.kind == .data { try punch(extent) }
            position += extent.length
        }
    }

    private mutating func punch(_ extent: Extent) throws(DiskError) {
        let handle = chain.top.storage(extent.storage)
        guard handle.isWritable else { return }
        let end = extent.fileOffset + extent.length
        var position = extent.fileOffset
        while position < end {
            let stop = min(end, (position / Self.shortestHole + 1) * Self.shortestHole)
            let start = position
            position = stop
            // Whole pages alone, that are not holes already.
            guard start % Self.page == 0, stop % Self.page == 0 || stop == end,
                let data = try handle.storage.nextData(from: start), data.lowerBound < stop
            else { continue }
            let count = Int(stop - start)
            let isZero = try chain.scratch.withBuffer { (buffer) throws(DiskError) in
                let piece = buffer.slice(0, count)
                try chain.top.read(extent.storage, into: piece, at: start, for: .guestData)
                return piece.readOnly.isZero
            }
            guard isZero else { continue }
            try handle.discard(start..<stop, for: .guestData)
            result.punchedBytes += stop - start
        }
    }

    // MARK: - The file's end

    /// Moves blocks to the front, and cuts the files off.
    private mutating func shrink() throws(DiskError) {
        guard let compactable else { return }
        do throws(DiskError) {
            guard try compactable.planShrinking() else { return compactable.stopShrinking() }
        } catch {
            throw error.about(chain.layers[0].path)
        }
        try chain.beginWriting()
        if let relocating = compactable as? any RelocatingBackend {
            control.begin("moving blocks", total: 0)
            while relocating.needsRelocation {
                try control.checkCancelled()
                guard try disk.relocate(in: chain, atMost: Self.movedAtOnce) else { break }
                try punchReleased()
            }
        }
        do throws(DiskError) {
            try backend.flush()
            try punchReleased()
            compactable.stopShrinking()
            try compactable.finishShrinking()
        } catch {
            throw error.about(chain.layers[0].path)
        }
    }

    // MARK: - Free space

    /// Drops what file systems in the disk say is free.
    private mutating func dropFreeSpace() throws(DiskError) {
        let unit = max(disk.blockSize, Self.shortestHole)
        let size = disk.size
        let found = try FreeSpace.find(in: disk)
        result.notes += found.notes
        for fileSystem in found.fileSystems {
            control.begin("looking for free space", total: fileSystem.length)
            let disk = disk
            let control = control
            var dropped: UInt64 = 0
            do throws(DiskError) {
                try fileSystem.forEachFreeRun(in: disk) { (run) throws(DiskError) in
                    try control.checkCancelled()
                    control.advance(to: run.upperBound - fileSystem.offset)
                    guard let first = run.lowerBound.alignedUp(to: unit) else { return }
                    let last = run.upperBound == size ? size : run.upperBound & ~(unit - 1)
                    guard first < last else { return }
                    try disk.discard(offset: first, length: last - first)
                    try giveBackIfMuch()
                    dropped += last - first
                }
            } catch {
                guard error.kind == .invalidImage || error.kind == .unsupported else { throw error }
                // What comes before was right by its own checksums, and is dropped; the rest stays.
                result.notes.append("the file system at byte \(fileSystem.offset): \(error.message)")
            }
            result.freeBytes += dropped
        }
        try giveBack()
    }
}

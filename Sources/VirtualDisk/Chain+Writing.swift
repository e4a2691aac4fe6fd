internal import DiskImage
internal import DiskStorage

extension Chain {
    /// Writes in place if the top image holds the whole range already; otherwise answers false and has written nothing.
    /// For who shares the range's regions, at least.
    func overwrite(_ bytes: IOBytes, at offset: UInt64) throws(DiskError) -> Bool {
        var batch = ExtentBatch()
        try top.map(offset, UInt64(bytes.count), into: &batch)
        guard batch.coveredLength >= UInt64(bytes.count) else { return false }
        for number in 0..<batch.count where batch[number].kind != .data { return false }
        var done = 0
        for number in 0..<batch.count where done < bytes.count {
            let extent = batch[number]
            let part = bytes.slice(done, Int(min(extent.length, UInt64(bytes.count - done))))
            try top.write(extent.storage, part, at: extent.fileOffset, for: .guestData)
            done += part.count
        }
        if bytes.count >= EarlyWriteback.smallestWrite, let earlyWriteback,
            earlyWriteback.continues(at: offset, bytes.count)
        {
            earlyWriteback.note(bytes.count, in: top.storage(batch[0].storage))
        }
        return true
    }

    /// When it returns, everything that was written to the top image before is on stable storage, and so is the way to
    /// it.
    func flush() throws(DiskError) {
        writing.noteFlush()
        do throws(DiskError) {
            try layers[0].backend.flush()
        } catch {
            writing.noteChange()
            throw error.about(layers[0].path)
        }
    }

    /// Writes a range of which the top image need not hold everything, for who has the range's regions alone:
    /// allocates, completes blocks from below, commits.
    ///
    /// `isZero`: the bytes are zeros, and need not be written to newly allocated space.
    func writeLocked(_ bytes: IOBytes, at offset: UInt64, isZero: Bool = false) throws(DiskError) {
        var batch = ExtentBatch()
        var done = 0
        while done < bytes.count {
            let position = offset + UInt64(done)
            batch.removeAll()
            try top.map(position, UInt64(bytes.count - done), into: &batch)
            let extent = batch[0]
            let part = bytes.slice(done, Int(min(extent.length, UInt64(bytes.count - done))))
            if extent.kind == .data {
                try top.write(extent.storage, part, at: extent.fileOffset, for: .guestData)
                done += part.count
            } else {
                done += try allocate(for: part, at: position, extent.kind, isZero: isZero)
            }
        }
    }

    /// Writes the first blocks of a range that the top image does not hold; answers how many bytes are done.
    ///
    /// `isZero`: the bytes are zeros, and need not be written to space that reads so anyway.
    private func allocate(
        for bytes: IOBytes, at offset: UInt64, _ kind: Extent.Kind, isZero: Bool
    ) throws(DiskError) -> Int {
        let backend = layers[0].backend
        guard blockSize > 0 else {
            throw DiskError(.readOnly, "this part of the disk cannot be written", image: layers[0].path)
        }
        if let dropped = try dropZeroBlock(bytes, at: offset, kind, backend) { return dropped }
        if !policy.honorsSame, let same = try skipSame(bytes, at: offset, kind) { return same }
        let reservation = try backend.reserve(offset: offset, length: UInt64(bytes.count))
        let blocks = reservation.offset..<reservation.offset + reservation.length
        let written = offset..<min(offset + UInt64(bytes.count), blocks.upperBound)
        do throws(DiskError) {
            try fill(
                blocks, with: bytes.slice(0, Int(written.upperBound - offset)), at: offset,
                storage: reservation.storage,
                fileOffset: reservation.fileOffset, isFresh: reservation.isZero, kind,
                skipsBytes: isZero && reservation.isZero)
        } catch {
            backend.abandon(reservation)
            throw error
        }
        // Also where it fails: part of it may have been entered.
        defer { holes.noteAllocation() }
        let storage = reservation.storage
        try backend.commit(reservation)
        let count = Int(written.upperBound - offset)
        if bytes.count >= EarlyWriteback.smallestWrite {
            earlyWriteback?.note(count, in: top.storage(storage))
            earlyWriteback?.begin(filling: written.upperBound, end: blocks.upperBound)
        }
        return count
    }

    /// A whole block of zeros takes no space in an image that does not want it; answers how many bytes are done, nil if
    /// they must be written.
    private func dropZeroBlock(
        _ bytes: IOBytes, at offset: UInt64, _ kind: Extent.Kind, _ backend: any ImageBackend
    ) throws(DiskError) -> Int? {
        let length = min(blockSize, size - offset)
        guard backend.dropsZeroBlocks, offset & (blockSize - 1) == 0, UInt64(bytes.count) >= length,
            bytes.slice(0, Int(length)).isZero
        else { return nil }
        if kind == .zero { return Int(length) }
        let isZeroBelow = policy.honorsZeros ? false : try isKnownZero(offset, length, from: 1)
        if kind == .absent, isZeroBelow { return Int(length) }
        return try backend.drop(offset: offset, length: length, leaving: droppedKind(isZeroBelow))
            ? Int(length) : nil
    }

    /// What the images below show already needs no space in this one; answers how many bytes that is, nil if they
    /// differ.
    private func skipSame(_ bytes: IOBytes, at offset: UInt64, _ kind: Extent.Kind) throws(DiskError) -> Int? {
        guard kind == .absent, layers.count > 1 else { return nil }
        // Block by block: one that differs is not read in vain for the others.
        let toEnd = blockSize - offset % blockSize
        let count = Int(min(UInt64(min(bytes.count, ScratchPool.size)), toEnd))
        let isSame = try scratch.withBuffer { (buffer) throws(DiskError) in
            let below = buffer.slice(0, count)
            try read(into: below, at: offset, from: 1)
            return below.readOnly.isEqual(to: bytes.slice(0, count))
        }
        return isSame ? count : nil
    }

    /// Writes `bytes` and, round them, what the blocks held before, to the blocks' new place.
    private func fill(
        _ blocks: Range<UInt64>, with bytes: IOBytes, at offset: UInt64, storage: UInt16, fileOffset: UInt64,
        isFresh: Bool, _ kind: Extent.Kind, skipsBytes: Bool
    ) throws(DiskError) {
        let end = offset + UInt64(bytes.count)
        let head = blocks.lowerBound..<offset
        let tail = end..<blocks.upperBound
        let place = fileOffset + (offset - blocks.lowerBound)
        let hasEdges = !head.isEmpty || !tail.isEmpty
        // Untouched space reads as zeros: edges that are zeros need not be written there.
        var skipsEdges = isFresh && hasEdges
        if skipsEdges { skipsEdges = try edgeIsZero(head, kind) }
        if skipsEdges { skipsEdges = try edgeIsZero(tail, kind) }
        if skipsBytes, skipsEdges || !hasEdges { return }
        if hasEdges, !skipsEdges, blocks.upperBound - blocks.lowerBound <= UInt64(ScratchPool.size) {
            try scratch.withBuffer { (buffer) throws(DiskError) in
                let whole = buffer.slice(0, Int(blocks.upperBound - blocks.lowerBound))
                try read(into: whole.slice(0, Int(head.upperBound - head.lowerBound)), at: head.lowerBound)
                let middle = Int(offset - blocks.lowerBound)
                whole.slice(middle, bytes.count).copy(from: bytes)
                try read(
                    into: whole.slice(middle + bytes.count, Int(tail.upperBound - tail.lowerBound)),
                    at: tail.lowerBound)
                try top.write(storage, whole.readOnly, at: fileOffset, for: .copyUp)
            }
            return
        }
        if !skipsEdges { try copyUp(head, storage, at: fileOffset) }
        try top.write(storage, bytes, at: place, for: .guestData)
        if !skipsEdges { try copyUp(tail, storage, at: place + UInt64(bytes.count)) }
    }

    func edgeIsZero(_ range: Range<UInt64>, _ kind: Extent.Kind) throws(DiskError) -> Bool {
        if range.isEmpty || kind == .zero { return true }
        if kind == .encoded || kind == .frozen { return false }
        return try isKnownZero(range.lowerBound, range.upperBound - range.lowerBound, from: 1)
    }

    /// Copies what a range holds now to its new place, piece by piece.
    func copyUp(_ range: Range<UInt64>, _ storage: UInt16, at fileOffset: UInt64) throws(DiskError) {
        guard !range.isEmpty else { return }
        try scratch.withBuffer { (buffer) throws(DiskError) in
            var position = range.lowerBound
            while position < range.upperBound {
                let piece = buffer.slice(0, Int(min(UInt64(buffer.count), range.upperBound - position)))
                try read(into: piece, at: position)
                try top.write(
                    storage, piece.readOnly, at: fileOffset + (position - range.lowerBound), for: .copyUp)
                position += UInt64(piece.count)
            }
        }
    }
}

internal import DiskImage
internal import DiskStorage

extension Chain {
    /// Discards a range of one region, for who has it alone.
    func discardLocked(_ offset: UInt64, _ length: UInt64) throws(DiskError) {
        let end = offset + length
        guard blockSize > 0 else { return try zeroInPlace(offset, length) }
        // Whole blocks; the disk's end makes its last block whole.
        let first = min(offset.alignedUp(to: blockSize) ?? end, end)
        let last = max(first, end == size ? end : end & ~(blockSize - 1))
        if offset < first {
            try zeroInPlace(offset, first - offset)
            try discardIfEmpty(offset & ~(blockSize - 1))
        }
        if first < last { try discardBlocks(first, last - first) }
        if last < end {
            try zeroInPlace(last, end - last)
            try discardIfEmpty(last)
        }
    }

    /// Bytes of a block that are looked at to learn whether it is empty: what a file system keeps at a hole's edges.
    private static let emptyBlockRemainder: UInt64 = 64 << 10

    /// Discards the block that begins at `offset` if, piece by piece, all of it has been discarded: if its file has a
    /// hole there, and zeros at the hole's edges.
    private func discardIfEmpty(_ offset: UInt64) throws(DiskError) {
        let length = min(blockSize, size - offset)
        var batch = ExtentBatch()
        try top.map(offset, length, into: &batch)
        guard batch.count == 1, batch[0].kind == .data, batch[0].length >= length else { return }
        let file = top.storage(batch[0].storage).storage
        var position = batch[0].fileOffset
        let end = position + length
        var looked: UInt64 = 0
        while position < end, let data = try file.nextData(from: position), data.lowerBound < end {
            let part = max(data.lowerBound, position)..<min(data.upperBound, end)
            looked += part.upperBound - part.lowerBound
            guard looked <= Self.emptyBlockRemainder else { return }
            let count = Int(part.upperBound - part.lowerBound)
            let isZero = try scratch.withBuffer { (buffer) throws(DiskError) in
                let piece = buffer.slice(0, count)
                try top.read(batch[0].storage, into: piece, at: part.lowerBound, for: .guestData)
                return piece.readOnly.isZero
            }
            guard isZero else { return }
            position = part.upperBound
        }
        try discardBlocks(offset, length)
    }

    /// Discards whole blocks.
    private func discardBlocks(_ offset: UInt64, _ length: UInt64) throws(DiskError) {
        var position = offset
        let end = offset + length
        var batch = ExtentBatch()
        while position < end {
            batch.removeAll()
            try top.map(position, end - position, into: &batch)
            let extent = batch[0]
            // The blocks that are of this kind as a whole; else one of which parts are, which counts as held.
            let whole = extent.length < end - position ? extent.length & ~(blockSize - 1) : end - position
            let part = whole > 0 ? whole : min(blockSize, end - position)
            let kind = whole > 0 ? extent.kind : .data
            if kind != .zero { try discardBlocks(position, part, kind) }
            position += part
        }
    }

    /// Discards whole blocks of one kind.
    private func discardBlocks(_ offset: UInt64, _ length: UInt64, _ kind: Extent.Kind) throws(DiskError) {
        let isZeroBelow = try isKnownZero(offset, length, from: 1)
        if kind == .absent, isZeroBelow { return }
        let backend = layers[0].backend
        if try backend.drop(offset: offset, length: length, leaving: droppedKind(isZeroBelow)) { return }
        try zeroInPlace(offset, length)
    }

    /// What the top image says where it gives up a block of zeros.
    ///
    /// While images are merged into it or it is merged, what lies below changes wherever the top image hides it; who
    /// remembers what lies there (``skipMap``, ``cache``) does not hear of it. So it goes on hiding that until then.
    func droppedKind(_ isZeroBelow: Bool) -> DroppedKind { isZeroBelow && dirty == nil ? .absent : .zero }

    /// Makes a range zeros where it lies; what the top image does not hold is allocated, but not written, to mask what
    /// lies below.
    private func zeroInPlace(_ offset: UInt64, _ length: UInt64) throws(DiskError) {
        var position = offset
        let end = offset + length
        var batch = ExtentBatch()
        while position < end {
            batch.removeAll()
            try top.map(position, end - position, into: &batch)
            let extent = batch[0]
            let part = min(extent.length, end - position)
            switch extent.kind {
            case .zero: break
            case .data:
                let handle = top.storage(extent.storage)
                guard handle.isWritable else {
                    throw DiskError(.readOnly, "this part of the disk is read-only", image: handle.storage.name)
                }
                try handle.discard(extent.fileOffset..<extent.fileOffset + part, for: .guestData)
            case .absent, .encoded, .frozen:
                let isZeroBelow = extent.kind == .absent ? try isKnownZero(position, part, from: 1) : false
                if !isZeroBelow { try writeZerosAllocating(position, part) }
            }
            position += part
        }
    }

    /// Writes zeros over what lower layers hold, under the lock that the caller has.
    private func writeZerosAllocating(_ offset: UInt64, _ length: UInt64) throws(DiskError) {
        try scratch.withBuffer { (buffer) throws(DiskError) in
            buffer.zero()
            var position = offset
            while position < offset + length {
                let piece = buffer.slice(0, Int(min(UInt64(buffer.count), offset + length - position)))
                try writeLocked(piece.readOnly, at: position, isZero: true)
                position += UInt64(piece.count)
            }
        }
    }
}

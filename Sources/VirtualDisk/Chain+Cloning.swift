internal import DiskImage
internal import DiskStorage

extension Chain {
    /// Puts bytes that another file stores into the top image by sharing that file's blocks, for who has the range's
    /// regions alone: where the image holds the range in place, there; else room is reserved, the rest of its blocks is
    /// completed as for a write, and the reservation is committed.
    ///
    /// Answers how many bytes from `offset` on are done; 0: none, they must go through memory.
    func cloneLocked(
        _ file: StorageHandle, at place: UInt64, to offset: UInt64, _ length: UInt64, by cloner: RangeCloner
    ) throws(DiskError) -> UInt64 {
        // (All files of an image lie on one file system.)
        guard let first = layers[0].backend.storages.first, cloner.canClone(from: file, to: first) else { return 0 }
        var batch = ExtentBatch()
        try top.map(offset, length, into: &batch)
        let extent = batch[0]
        if extent.kind == .data {
            try beginWriting()
            return try cloner.clone(
                from: file, at: place, to: top.storage(extent.storage), at: extent.fileOffset,
                min(length, extent.length))
        }
        guard blockSize > 0, cloner.isWorthwhile(from: file) else { return 0 }
        try beginWriting()
        return try cloneAllocating(file, at: place, to: offset, min(length, extent.length), extent.kind, by: cloner)
    }

    private func cloneAllocating(
        _ file: StorageHandle, at place: UInt64, to offset: UInt64, _ length: UInt64, _ kind: Extent.Kind,
        by cloner: RangeCloner
    ) throws(DiskError) -> UInt64 {
        let backend = layers[0].backend
        let reservation = try backend.reserve(offset: offset, length: length)
        let blocks = reservation.offset..<reservation.offset + reservation.length
        let done = offset..<min(offset + length, blocks.upperBound)
        do throws(DiskError) {
            let handle = top.storage(reservation.storage)
            let start = reservation.fileOffset + (offset - blocks.lowerBound)
            let count = done.upperBound - offset
            try completeEdge(
                blocks.lowerBound..<offset, in: handle, reservation.storage, at: reservation.fileOffset, kind,
                isFresh: reservation.isZero)
            if try cloner.clone(from: file, at: place, to: handle, at: start, count) == 0 {
                // A place that was taken is used: one that is given back at the end stays a hole in the file.
                cloner.noteFailure(from: file)
                try cloner.copy(from: file, at: place, to: handle, at: start, count)
            }
            try completeEdge(
                done.upperBound..<blocks.upperBound, in: handle, reservation.storage, at: start + count, kind,
                isFresh: reservation.isZero)
        } catch {
            backend.abandon(reservation)
            throw error
        }
        // Also where it fails: part of it may have been entered.
        defer { holes.noteAllocation() }
        try backend.commit(reservation)
        return done.upperBound - offset
    }

    /// What of a block is not cloned stays what it is.
    private func completeEdge(
        _ range: Range<UInt64>, in handle: StorageHandle, _ storage: UInt16, at place: UInt64, _ kind: Extent.Kind,
        isFresh: Bool
    ) throws(DiskError) {
        guard !range.isEmpty else { return }
        if try edgeIsZero(range, kind) {
            if !isFresh {
                try handle.discard(place..<place + (range.upperBound - range.lowerBound), for: .copyUp)
            }
        } else {
            try copyUp(range, storage, at: place)
        }
    }
}

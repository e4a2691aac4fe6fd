internal import DiskImage
internal import DiskStorage

extension Disk {
    /// How many bytes of blocks a flush moves at most: whoever waits for it asked for no such thing.
    static let relocationAtOnce: UInt64 = 16 << 20

    /// Moves blocks of the top image into holes of its file, up to about `limit` bytes, so that the file gets shorter;
    /// answers whether it moved any. What was moved is durable when it returns.
    ///
    /// Does nothing while another thread is at it. A file system without room for a copy ends it without an error: all
    /// is well where it lies.
    @discardableResult
    func relocate(
        in chain: Chain, atMost limit: UInt64 = relocationAtOnce, isClosing: Bool = false
    ) throws(DiskError) -> Bool {
        guard let backend = chain.relocating, backend.needsRelocation, beginRelocating(isClosing: isClosing) else {
            return false
        }
        defer { endRelocating() }
        do throws(DiskError) {
            var moved: UInt64 = 0
            passing: while moved < limit, mayRelocate(isClosing: isClosing), let block = try backend.nextRelocation() {
                switch try relocate(block, backend, chain) {
                case .moved: moved += block.length
                case .isElsewhere: continue
                case .hasNoRoom: break passing
                }
            }
            if moved > 0 { try backend.flush() }
            return moved > 0
        } catch {
            throw error.about(chain.layers[0].path)
        }
    }

    private enum RelocationResult {
        case moved
        /// It is in use, or was dropped or written anew elsewhere since it was found.
        case isElsewhere
        case hasNoRoom
    }

    /// Moves one block, if it still lies where it was found. Nobody else reads or writes it meanwhile; its new place is
    /// nobody's, since what lay there was dropped, and the drop is durable.
    ///
    /// A block in use is left alone, not waited for: it has two places meanwhile, and its user may be waiting for one.
    private func relocate(
        _ block: Relocation, _ backend: any RelocatingBackend, _ chain: Chain
    ) throws(DiskError) -> RelocationResult {
        guard locks.tryLockExclusive(block.offset, block.length) else {
            backend.abandon(block)
            return .isElsewhere
        }
        defer { locks.unlockExclusive(block.offset, block.length) }
        do throws(DiskError) {
            var batch = ExtentBatch()
            try chain.top.map(block.offset, block.length, into: &batch)
            let extent = batch[0]
            let isThere =
                extent.kind == .data && extent.length >= block.length && extent.storage == block.storage
                && extent.fileOffset == block.source
            var result = RelocationResult.isElsewhere
            if isThere {
                result = try copy(block, chain, keepsSpace: !backend.dropsZeroBlocks) ? .moved : .hasNoRoom
            }
            if result == .moved { try backend.commit(block) } else { backend.abandon(block) }
            return result
        } catch {
            backend.abandon(block)
            throw error
        }
    }

    /// Copies a block to its new place; answers false if the file system has no room for it. Zeros take no space there
    /// unless the image keeps its space.
    private func copy(_ block: Relocation, _ chain: Chain, keepsSpace: Bool) throws(DiskError) -> Bool {
        let top = chain.top
        return try chain.scratch.withBuffer { (buffer) throws(DiskError) in
            var done: UInt64 = 0
            while done < block.length {
                let piece = buffer.slice(0, Int(min(UInt64(min(buffer.count, 64 << 10)), block.length - done)))
                try top.read(block.storage, into: piece, at: block.source + done, for: .copyUp)
                let target = block.target + done
                do throws(DiskError) {
                    if !keepsSpace, piece.readOnly.isZero {
                        try top.storage(block.storage).discard(target..<target + UInt64(piece.count), for: .copyUp)
                    } else {
                        try top.write(block.storage, piece.readOnly, at: target, for: .copyUp)
                    }
                } catch {
                    guard [28, 122].contains(error.errno) else { throw error }  // ENOSPC, EDQUOT
                    return false
                }
                done += UInt64(piece.count)
            }
            return true
        }
    }
}

extension Chain {
    /// Fills the holes of the top image's file, if its blocks must lie without gaps; for who has the images alone.
    func fillHoles() throws(DiskError) {
        guard let relocating, relocating.needsRelocation else { return }
        // With locks of its own, which nobody else holds.
        let disk = Disk(chain: self, cache: TableCache(capacity: 1 << 20), isWritable: true, lazyFlushInterval: 0)
        try disk.finishRelocating(in: self, isClosing: false)
    }
}

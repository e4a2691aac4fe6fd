internal import DiskImage
internal import DiskStorage

/// A sparse extent file that is open for writing: takes space for grains and tables, and marks the file unclean.
final class VMDKSparseFile: Sendable {
    /// What tells the two writable sparse layouts apart.
    enum Layout: Sendable {
        /// KDMV: the file's end is the next free place; tables have a redundant copy.
        case hosted
        /// COWD: the header names the next free sector.
        case cowd
    }

    let layout: Layout
    let handle: StorageHandle
    let end: FileEndCell
    private let space: Locked<Space>
    /// Grains that nothing points to.
    let grains: ReusableBlocks
    private let grainSize: UInt64
    /// What is dropped while the image is compacted.
    let released = ReleasedPlaces()

    /// Where grains may go.
    private struct Space {
        /// The length that the file was last told to have.
        var length: UInt64
        var isMarkedUnclean = false
    }

    /// Bytes that a 32-bit sector number can reach.
    static let limit: UInt64 = 1 << 41

    init(
        _ layout: Layout, handle: StorageHandle, end: FileEndCell, length: UInt64, grainSize: UInt64
    ) {
        self.layout = layout
        self.handle = handle
        self.end = end
        self.grainSize = grainSize
        grains = ReusableBlocks(blockSize: grainSize)
        space = Locked(Space(length: length))
    }

    // MARK: - Unclean mark

    /// The header's byte or word that says that the file is not closed: VMware Virtual Disk Format 5.0,
    /// `uncleanShutdown`.
    private var uncleanOffset: UInt64 { layout == .hosted ? 72 : 1648 }

    /// Sets the unclean mark, durably, before the first change of a mapping.
    func markUnclean() throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            guard !space.isMarkedUnclean else { return }
            try handle.storage.write([1], at: uncleanOffset, for: .header)
            try handle.storage.flush()
            space.isMarkedUnclean = true
        }
    }

    /// Clears the unclean mark; everything else is durable.
    func markClean(wasUnclean: Bool) throws(DiskError) {
        let isMarked = space.withLock { $0.isMarkedUnclean }
        guard isMarked || wasUnclean else { return }
        try handle.storage.write([0], at: uncleanOffset, for: .header)
        try handle.storage.flush()
        space.withLock { $0.isMarkedUnclean = false }
    }

    // MARK: - Space

    /// Space for up to `count` grains in one piece; answers how many, where, and whether it reads as zeros.
    func takeGrains(_ count: UInt64) throws(DiskError) -> (offset: UInt64, count: UInt64, isZero: Bool) {
        try space.withLock { (space) throws(DiskError) in
            if let run = grains.take(count) { return (run.offset, run.count, run.isZero) }
            let start = try room(for: grainSize, alignment: grainSize)
            let fitting = min(count, (Self.limit - start) / grainSize)
            end.value = start + fitting * grainSize
            return (start, fitting, true)
        }
    }

    /// Space for a table, which reads as zeros.
    func takeTable(_ size: UInt64) throws(DiskError) -> UInt64 {
        try space.withLock { (_) throws(DiskError) in
            let start = try room(for: size, alignment: 512)
            end.value = start + size
            return start
        }
    }

    private func room(for size: UInt64, alignment: UInt64) throws(DiskError) -> UInt64 {
        guard let start = end.value.alignedUp(to: alignment), start <= Self.limit - size else {
            throw DiskError(
                .system, "the extent file is full: its sector numbers reach no further than 2 TiB",
                image: handle.storage.name, errno: 28)  // ENOSPC
        }
        return start
    }

    /// Gives up a grain whose entry was just removed: its space goes back to the file system, and to us after a flush.
    func giveUp(_ offset: UInt64) throws(DiskError) {
        if released.add(offset..<min(offset + grainSize, end.value), in: handle) {
            return grains.giveUp(offset, isZero: false)
        }
        try handle.discard(offset..<min(offset + grainSize, end.value), for: .guestData)
        grains.giveUp(offset)
    }

    /// Cuts the file off at `newEnd`, behind all that is in use: everything is durable, and nothing is taken any more.
    /// A pointer to the next free sector is lowered first; what lies between is then free by either reading.
    func cut(at newEnd: UInt64) throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            guard newEnd < space.length else { return }
            grains.removeAll()
            if layout == .cowd {
                var field = FieldWriter(count: 4)
                field.littleEndian(UInt32(truncatingIfNeeded: newEnd / 512), at: 0)
                try handle.storage.write(field.bytes, at: 28, for: .allocation)
                try handle.storage.flush()
            }
            end.value = newEnd
            space.length = newEnd
            guard !handle.storage.traits.hasFixedLength else { return }
            try handle.storage.setLength(newEnd)
            try handle.storage.flush()
        }
    }

    // MARK: - Flushing

    /// Makes grains durable that have been written, and the file long enough for all that was taken.
    ///
    /// While the lock is held nothing is taken behind the end that is read here, so that nobody can have written there:
    /// setting the length then never cuts anything off.
    func flushData() throws(DiskError) {
        try space.withLock { (space) throws(DiskError) in
            let wanted = end.value
            guard space.length < wanted else { return }
            if try handle.storage.length() < wanted { try handle.storage.setLength(wanted) }
            if layout == .cowd {
                // The header's allocation pointer is durable, with the data, before any entry points below it.
                var field = FieldWriter(count: 4)
                field.littleEndian(UInt32(truncatingIfNeeded: wanted / 512), at: 0)
                try handle.storage.write(field.bytes, at: 28, for: .allocation)
            }
            space.length = wanted
            handle.noteWrite()
        }
    }
}

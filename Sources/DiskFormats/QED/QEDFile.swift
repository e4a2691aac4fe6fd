internal import DiskImage
internal import DiskStorage

/// The file of an image that is open for writing: takes clusters at its end, and sets the bits of the header.
///
/// QED keeps no list of free clusters. So one that has been allocated stays with its place on the disk for good: a
/// discard gives its bytes back to the file system and nothing else, and no cluster is ever lost by it.
final class QEDFile: Sendable {
    let handle: StorageHandle
    let end: FileEndCell
    private let clusterSize: UInt64
    private let state: Locked<State>

    private struct State {
        /// Clusters that were taken and not used; they may hold anything.
        var unused: FreeBlocks
        /// The length that the file was last told to have.
        var length: UInt64
        /// The header's bits.
        var features: QEDHeader.Features
        /// Whether the bit is on the disk for certain.
        var isMarked = false
        /// Whether setting it has failed.
        var isUncertain = false
    }

    init(_ handle: StorageHandle, _ header: QEDHeader, end: FileEndCell, length: UInt64) {
        self.handle = handle
        self.end = end
        clusterSize = header.clusterSize
        state = Locked(
            State(unused: FreeBlocks(blockSize: header.clusterSize), length: length, features: header.features))
    }

    // MARK: - Header

    /// Sets QED_F_NEED_CHECK, durably, before the first change of a mapping. It stays until the image is closed.
    func markNeedCheck() throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            guard !state.isMarked else { return }
            let isNews = state.features.insert(.needCheck).inserted
            // If this fails the bit may be on the disk or not: it is set again, or cleared in the end.
            if isNews || state.isUncertain {
                state.isUncertain = true
                try writeNeedCheck(true)
                state.isUncertain = false
            }
            state.isMarked = true
        }
    }

    /// Clears it: everything else is durable, and the tables are right.
    func clearNeedCheck() throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            guard state.features.contains(.needCheck) else { return }
            try writeNeedCheck(false)
            state.features.remove(.needCheck)
            state.isMarked = false
        }
    }

    /// Of the other bits those stay that are in the file: a change of the header that failed may have been made.
    private func writeNeedCheck(_ isSet: Bool) throws(DiskError) {
        var field = FieldWriter(
            try handle.storage.bytes(at: QEDHeader.featuresOffset, count: 8, for: .header, "the header"))
        let old: UInt64 = try FieldReader(field.bytes).littleEndian(at: 0)
        var features = QEDHeader.Features(rawValue: old)
        if isSet { features.insert(.needCheck) } else { features.remove(.needCheck) }
        field.littleEndian(features.rawValue, at: 0)
        try handle.storage.write(field.bytes, at: QEDHeader.featuresOffset, for: .header)
        try handle.storage.flush()
    }

    /// Writes a changed header, durably. It lies in one sector, with a backing file's name that has room there: after a
    /// power cut all of it is new, or nothing. What ``markNeedCheck()`` and its opposite see to stays.
    func writeHeader(_ header: QEDHeader, name: [UInt8] = []) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            var header = header
            header.features.remove(.needCheck)
            header.features.formUnion(state.features.intersection(.needCheck))
            var sector = FieldWriter(
                try handle.storage.bytes(at: 0, count: Self.sectorSize, for: .header, "the header"))
            sector.bytes(header.encode(), at: 0)
            if !name.isEmpty { sector.bytes(name, at: Int(header.backingFilenameOffset)) }
            try handle.storage.write(sector.bytes, at: 0, for: .header)
            try handle.storage.flush()
            state.features = header.features
        }
    }

    /// What is written as a whole.
    static let sectorSize = 512

    /// Clears all autoclear bits, durably: none is defined, so none is known.
    func clearAutoclearFeatures() throws(DiskError) {
        try handle.storage.write(
            [UInt8](repeating: 0, count: 8), at: QEDHeader.autoclearFeaturesOffset, for: .header)
        try handle.storage.flush()
    }

    // MARK: - Space

    /// Up to `count` clusters in one piece.
    func takeClusters(_ count: UInt64) throws(DiskError) -> FreeBlocks.Run {
        try state.withLock { (state) throws(DiskError) in
            if let run = state.unused.take(count) { return run }
            let start = try room(for: clusterSize, limit: Self.limit)
            let fitting = min(count, (Self.limit - start) / clusterSize)
            end.value = start + fitting * clusterSize
            return FreeBlocks.Run(offset: start, count: fitting, isZero: true)
        }
    }

    /// Space for a table, which reads as zeros.
    func takeTable(_ size: UInt64) throws(DiskError) -> UInt64 {
        try state.withLock { (_) throws(DiskError) in
            let start = try room(for: size, limit: TableSet.offsetLimit)
            end.value = start + size
            return start
        }
    }

    /// Where files end for certain.
    private static let limit = UInt64(Int64.max)

    private func room(for size: UInt64, limit: UInt64) throws(DiskError) -> UInt64 {
        guard let start = end.value.alignedUp(to: clusterSize), start <= limit - size else {
            // 27: EFBIG
            throw DiskError(.system, "the file cannot become any longer", image: handle.storage.name, errno: 27)
        }
        return start
    }

    /// Takes back clusters that were not used.
    func putBack(_ offset: UInt64, count: UInt64) {
        state.withLock { state in
            for number in 0..<count { state.unused.add(offset + number * clusterSize, isZero: false) }
        }
    }

    /// Cuts the file off behind all that is in use; everything is durable, and nothing is taken any more.
    func cut(at newEnd: UInt64) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            guard newEnd < state.length, !handle.storage.traits.hasFixedLength else { return }
            state.unused = FreeBlocks(blockSize: clusterSize)
            end.value = newEnd
            state.length = newEnd
            try handle.storage.setLength(newEnd)
            try handle.storage.flush()
        }
    }

    // MARK: - Flushing

    /// Makes the file long enough for all that was taken, before entries point there, and makes the clusters durable.
    ///
    /// Under the lock under which space is taken, so that nobody can have written behind the new length.
    func flushData() throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            let wanted = end.value
            guard state.length < wanted else { return }
            if try handle.storage.length() < wanted { try handle.storage.setLength(wanted) }
            state.length = wanted
            handle.noteWrite()
        }
        try handle.flushIfWritten()
    }
}

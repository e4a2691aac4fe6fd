internal import DiskStorage

/// A file that is only read, and seems to be written: what is written goes to a file without a name, and is gone with
/// it. For who wants to know what would happen.
final class ScratchStorage: Storage {
    private struct State {
        /// What was written or discarded: ascending, none touches another.
        var changed: [Range<UInt64>] = []
        var length: UInt64
        /// Up to here the file's own bytes count.
        var ownEnd: UInt64
    }

    private let inner: any Storage
    private let scratch: FileStorage
    private let state: Locked<State>
    let traits: StorageTraits
    var name: String { inner.name }

    /// - Parameter folder: Where the file without a name is made.
    init(_ inner: any Storage, folder: String) throws(DiskError) {
        self.inner = inner
        scratch = try FileStorage(temporaryIn: folder)
        let length = try inner.length()
        state = Locked(State(length: length, ownEnd: length))
        traits = StorageTraits(isWritable: true, canDiscard: true, hasFixedLength: inner.traits.hasFixedLength)
    }

    func length() throws(DiskError) -> UInt64 { state.withLock { $0.length } }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        try state.withLock { (state) throws(DiskError) in
            guard offset < state.length else { return 0 }
            let count = Int(min(UInt64(buffer.count), state.length - offset))
            var done = 0
            while done < count {
                let position = offset + UInt64(done)
                let next = state.changed.first { $0.upperBound > position }
                let isChanged = next?.contains(position) == true
                let end = isChanged ? next?.upperBound : next?.lowerBound
                var part = Int(min(UInt64(count - done), (end ?? .max) - position))
                if isChanged {
                    try scratch.readPadded(into: buffer.slice(done, part), at: position, for: purpose)
                } else if position < state.ownEnd {
                    part = Int(min(UInt64(part), state.ownEnd - position))
                    try inner.readPadded(into: buffer.slice(done, part), at: position, for: purpose)
                } else {
                    buffer.slice(done, part).zero()
                }
                done += part
            }
            return count
        }
    }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            try scratch.write(bytes, at: offset, for: purpose)
            Self.add(offset..<offset + UInt64(bytes.count), to: &state)
        }
    }

    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            let end = min(range.upperBound, try scratch.length())
            if range.lowerBound < end { try scratch.discard(range.lowerBound..<end, mustZero: true, for: purpose) }
            Self.add(range, to: &state)
        }
    }

    private static func add(_ range: Range<UInt64>, to state: inout State) {
        guard !range.isEmpty else { return }
        state.length = max(state.length, range.upperBound)
        let first = state.changed.firstIndex { $0.upperBound >= range.lowerBound } ?? state.changed.count
        var last = first
        var (start, end) = (range.lowerBound, range.upperBound)
        while last < state.changed.count, state.changed[last].lowerBound <= range.upperBound {
            start = min(start, state.changed[last].lowerBound)
            end = max(end, state.changed[last].upperBound)
            last += 1
        }
        state.changed.replaceSubrange(first..<last, with: [start..<end])
    }

    func setLength(_ length: UInt64) throws(DiskError) {
        try state.withLock { (state) throws(DiskError) in
            if length < state.length {
                if length < (try scratch.length()) { try scratch.setLength(length) }
                state.changed = state.changed.compactMap { range in
                    range.lowerBound < length ? range.lowerBound..<min(range.upperBound, length) : nil
                }
                state.ownEnd = min(state.ownEnd, length)
            }
            state.length = length
        }
    }

    func flush() {}
    func allocatedBytes() throws(DiskError) -> UInt64 { try inner.allocatedBytes() }

    func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? {
        let (changed, ownEnd) = state.withLock { state in
            (state.changed.first { $0.upperBound > offset }, state.ownEnd)
        }
        let scratch = changed.map { max(offset, $0.lowerBound)..<$0.upperBound }
        guard let own = try inner.nextData(from: offset), own.lowerBound < ownEnd else { return scratch }
        if let scratch, scratch.lowerBound <= own.lowerBound { return scratch }
        return own.lowerBound..<min(own.upperBound, ownEnd)
    }
}

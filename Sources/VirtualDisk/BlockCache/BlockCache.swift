internal import CLinux
internal import DiskFormats
internal import DiskImage
internal import DiskStorage

/// A persistent cache of what the lower images of a disk hold, in a file (a VCI).
///
/// What is where is in memory while it is open. A hit takes no lock: who finds a chunk takes the number of its slot's
/// *generation*, reads, and looks at the number again; a slot whose chunk is evicted gets another one before anything
/// is written to it. Who then has read too late reads from the images. Everything else is done under a lock that is
/// never held across I/O.
///
/// Whatever fails in the cache's file: the cache is not used any more, and nobody who reads learns of it.
@safe
final class BlockCache: @unchecked Sendable {  // words are accessed atomically, the rest is constant or locked
    /// Chunks that are looked up and read at once.
    static let runLimit = 32

    /// The cached images.
    let source: Chain
    let layout: VCILayout
    let type: VCIHeader.FileType
    let storage: any Storage
    let identity: CacheIdentity
    let report: @Sendable (CacheNotice) -> Void
    let path: String
    /// Changed under the lock of ``state``.
    let index: CacheIndex
    private let state: Locked<State>
    private let fetches = CacheFetches()
    /// The header was written: that the file is in use is durable. With what the file held is not to be used.
    let beginning: Locked<Beginning>
    private let descriptor: Int32
    private let chunkShift: UInt64
    private let scratch: ScratchPool
    /// Whether the cache is not used any more.
    private let off: UnsafeMutablePointer<UInt32>

    private struct State {
        var streams: CacheStreams
        var missBytes: UInt64 = 0
    }

    struct Beginning {
        /// Whether changes have begun.
        var hasBegun = false
        /// Whether what the file held is of no use, and its space is to be given back first.
        var isStale: Bool
    }

    init(
        _ storage: any Storage, _ layout: VCILayout, _ type: VCIHeader.FileType, index: CacheIndex, isStale: Bool,
        source: Chain, identity: CacheIdentity, _ options: CacheOptions
    ) {
        self.storage = storage
        self.layout = layout
        self.type = type
        self.source = source
        self.identity = identity
        report = options.report
        path = options.path
        descriptor = storage.traits.descriptor
        let chunkSize = layout.chunkBlocks * VCILayout.blockSize
        chunkShift = UInt64(chunkSize.trailingZeroBitCount)
        scratch = ScratchPool(size: Int(chunkSize))
        self.index = index
        state = Locked(State(streams: Self.streams(layout)))
        beginning = Locked(Beginning(isStale: isStale))
        unsafe off = .allocate(capacity: 1)
        unsafe off.initialize(to: 0)
    }

    private static func streams(_ layout: VCILayout) -> CacheStreams {
        let size = layout.slotCount * layout.chunkBlocks * VCILayout.blockSize
        return CacheStreams(limit: min(64 << 20, size / 8))
    }

    /// Takes the place of another one, which nobody uses any more, in front of other images. Without `keepsContent`
    /// these show something else, and nothing is cached.
    init(_ other: BlockCache, source: Chain, keepsContent: Bool) {
        (storage, layout, type, identity) = (other.storage, other.layout, other.type, other.identity)
        (report, path, descriptor, chunkShift) = (other.report, other.path, other.descriptor, other.chunkShift)
        (self.source, scratch) = (source, other.scratch)
        if keepsContent, source.size == other.source.size {
            (index, state, beginning) = (other.index, other.state, other.beginning)
        } else {
            index = CacheIndex(slotCount: Int(layout.slotCount))
            state = Locked(State(streams: Self.streams(layout)))
            let hasBegun = other.beginning.withLock { $0.hasBegun }
            beginning = Locked(Beginning(hasBegun: hasBegun, isStale: true))
        }
        unsafe off = .allocate(capacity: 1)
        unsafe off.initialize(to: other.isOn ? 0 : 1)
    }

    deinit { unsafe off.deallocate() }

    /// Bytes of a chunk, but for the one at the disk's end.
    var chunkSize: UInt64 { 1 << chunkShift }
    /// Whether the cache is used.
    @inline(__always) var isOn: Bool { unsafe clinux_load32_acquire(off) == 0 }

    /// The range of the disk that a chunk is.
    func range(of chunk: UInt64) -> Range<UInt64> {
        let start = chunk << chunkShift
        return start..<min(start + chunkSize, source.size)
    }

    // MARK: - Reading

    /// Fills `buffer` with what the cached images hold from `offset` on.
    func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        guard offset < source.size else { return buffer.zero() }
        let count = Int(min(UInt64(buffer.count), source.size - offset))
        if count < buffer.count { buffer.slice(count, buffer.count - count).zero() }
        guard count > 0 else { return }
        guard isOn else { return try source.read(into: buffer.slice(0, count), at: offset) }
        var isLarge: Bool?
        var done = 0
        while done < count {
            let position = offset + UInt64(done)
            let rest = buffer.slice(done, count - done)
            let found = index.find(position >> chunkShift)
            if found.slot >= 0 {
                done += try readHit(found, into: rest, at: position)
                continue
            }
            let missing = look(position, rest.count, &isLarge)
            switch missing.kind {
            case .hit: continue
            case .wait: fetches.wait(missing.number, missing.word)
            case .fetch: done += try fetch(missing, into: rest, at: position, isLarge == true)
            case .pass:
                let part = rest.slice(0, length(of: missing, from: position, rest.count))
                try source.read(into: part, at: position)
                done += part.count
            }
        }
    }

    // MARK: - Hits

    /// Reads what is cached from the chunk in a slot on; answers how many bytes.
    @inline(__always)
    private func readHit(
        _ found: (slot: Int32, generation: UInt32), into buffer: IOBuffer, at position: UInt64
    ) throws(DiskError) -> Int {
        let inChunk = position & (chunkSize &- 1)
        let rest = Int(chunkSize &- inChunk)
        if buffer.count > rest { return try readRun(found, into: buffer, at: position) }
        index.touch(found.slot, index.advance(buffer.count))
        let place = layout.address(ofSlot: UInt64(found.slot)) &* VCILayout.blockSize &+ inChunk
        guard readFile(buffer, at: place), index.isStill(found.slot, found.generation) else {
            try source.read(into: buffer, at: position)
            return buffer.count
        }
        return buffer.count
    }

    /// Chunks that follow each other in the file as they do in the disk are read at once.
    @inline(never)
    private func readRun(
        _ found: (slot: Int32, generation: UInt32), into buffer: IOBuffer, at position: UInt64
    ) throws(DiskError) -> Int {
        let chunk = position >> chunkShift
        let last = (position &+ UInt64(buffer.count) &- 1) >> chunkShift
        var generations = InlineArray<32, UInt32>(repeating: found.generation)
        var run = 1
        while run < Self.runLimit, chunk &+ UInt64(run) <= last {
            let next = index.find(chunk &+ UInt64(run))
            guard next.slot == found.slot &+ Int32(run) else { break }
            generations[run] = next.generation
            run += 1
        }
        let end = (chunk &+ UInt64(run)) << chunkShift
        let part = buffer.slice(0, Int(min(UInt64(buffer.count), end &- position)))
        let time = index.advance(part.count)
        for step in 0..<run { index.touch(found.slot &+ Int32(step), time &+ UInt64(step)) }
        let place = layout.address(ofSlot: UInt64(found.slot)) &* VCILayout.blockSize
        var isRead = readFile(part, at: place &+ position & (chunkSize &- 1))
        for step in 0..<run where isRead { isRead = index.isStill(found.slot &+ Int32(step), generations[step]) }
        if !isRead { try source.read(into: part, at: position) }
        return part.count
    }

    /// Reads from the file, without an error: then the cache is off, and the answer false.
    @inline(__always)
    private func readFile(_ buffer: IOBuffer, at place: UInt64) -> Bool {
        do throws(DiskError) {
            let done =
                descriptor >= 0
                ? try FileStorage.read(descriptor, into: buffer, at: place)
                : try storage.read(into: buffer, at: place, for: .guestData)
            if done == buffer.count { return true }
            turnOff(DiskError(.invalidImage, "the file was cut short", offset: place))
        } catch {
            turnOff(error)
        }
        return false
    }

    // MARK: - What is missing

    /// What is to be done about a chunk that was not found.
    private struct Missing {
        enum Kind {
            /// It is there by now.
            case hit
            /// The caller is to read chunks that are not.
            case fetch
            /// Another thread is reading it.
            case wait
            /// Too much is being read: this is not cached.
            case pass
        }

        let kind: Kind
        let chunk: UInt64
        var chunks: UInt64 = 1
        /// Which of the fetches.
        var number = 0
        /// What to wait with.
        var word: UInt32 = 0
    }

    /// How many of `count` bytes from a place on lie in the chunks.
    private func length(of missing: Missing, from position: UInt64, _ count: Int) -> Int {
        Int(min(UInt64(count), (missing.chunk + missing.chunks) << chunkShift - position))
    }

    /// Whole chunks that are all wanted and not there are read at once. `isLarge`: whether the request belongs to a
    /// large sequential read; nil: not known yet.
    @inline(never)
    private func look(_ position: UInt64, _ count: Int, _ isLarge: inout Bool?) -> Missing {
        let chunk = position >> chunkShift
        return state.withLock { state in
            if index.find(chunk).slot >= 0 { return Missing(kind: .hit, chunk: chunk) }
            if isLarge == nil { isLarge = state.streams.note(position, UInt64(count)) }
            if let number = fetches.number(of: chunk) {
                return Missing(kind: .wait, chunk: chunk, number: number, word: fetches.willWait(number))
            }
            var end = chunk + 1
            if position == chunk << chunkShift {
                let wanted = position + UInt64(count)
                while end - chunk < UInt64(Self.runLimit), end << chunkShift < wanted,
                    range(of: end).upperBound <= wanted, index.find(end).slot < 0, fetches.number(of: end) == nil
                {
                    end += 1
                }
            }
            let number = fetches.begin(chunk..<end)
            let missing = Missing(
                kind: number == nil ? .pass : .fetch, chunk: chunk, chunks: end - chunk, number: number ?? 0)
            state.missBytes += UInt64(length(of: missing, from: position, count))
            return missing
        }
    }

    /// Reads chunks from the images and puts them into the cache; answers how many bytes of the buffer are filled.
    @inline(never)
    private func fetch(
        _ missing: Missing, into buffer: IOBuffer, at position: UInt64, _ isLarge: Bool
    ) throws(DiskError) -> Int {
        defer { if state.withLock({ _ in fetches.end(missing.number) }) { fetches.wake(missing.number) } }
        let chunk = missing.chunk
        let part = buffer.slice(0, length(of: missing, from: position, buffer.count))
        let whole = range(of: chunk).lowerBound..<range(of: chunk + missing.chunks - 1).upperBound
        if position == whole.lowerBound, UInt64(part.count) == whole.upperBound - whole.lowerBound {
            try source.read(into: part, at: position)
            for chunk in chunk..<chunk + missing.chunks {
                let range = range(of: chunk)
                let start = Int(range.lowerBound - position)
                insert(part.readOnly.slice(start, Int(range.upperBound - range.lowerBound)), chunk, isLarge)
            }
            return part.count
        }
        if isZero(whole) {
            part.zero()
            return part.count
        }
        var isFilled = false
        try scratch.withBuffer { (memory) throws(DiskError) in
            let all = memory.slice(0, Int(whole.upperBound - whole.lowerBound))
            // What nobody asked for must not be why the rest cannot be read.
            do throws(DiskError) { try source.read(into: all, at: whole.lowerBound) } catch { return }
            part.copy(from: all.readOnly.slice(Int(position - whole.lowerBound), part.count))
            isFilled = true
            insert(all.readOnly, chunk, isLarge)
        }
        if !isFilled { try source.read(into: part, at: position) }
        return part.count
    }

    /// Whether the images' tables know a range to be zeros. That is as quick to learn as where it is cached, so that
    /// it is not.
    private func isZero(_ range: Range<UInt64>) -> Bool {
        let isZero = try? source.isKnownZero(range.lowerBound, range.upperBound - range.lowerBound, from: 0)
        return isZero == true
    }

    /// Puts a chunk into the cache, if that is possible.
    private func insert(_ bytes: IOBytes, _ chunk: UInt64, _ isLarge: Bool) {
        guard isOn, !isZero(range(of: chunk)), begin() else { return }
        let slot = state.withLock { _ in index.find(chunk).slot < 0 ? index.take() : CacheIndex.none }
        guard slot >= 0 else { return }
        let place = layout.address(ofSlot: UInt64(slot)) * VCILayout.blockSize
        var isWritten = false
        do throws(DiskError) {
            try storage.write(bytes, at: place, for: .guestData)
            let rest = bytes.count % Int(VCILayout.blockSize)
            if rest > 0 {
                let zeros = [UInt8](repeating: 0, count: Int(VCILayout.blockSize) - rest)
                try storage.write(zeros, at: place + UInt64(bytes.count), for: .guestData)
            }
            isWritten = true
        } catch {
            turnOff(error)
        }
        state.withLock { _ in
            if isWritten { index.insert(chunk, in: slot, isCold: isLarge) } else { index.giveBack(slot) }
        }
    }

    // MARK: - Not going on

    /// The cache is not used any more; the user is told once.
    func turnOff(_ error: DiskError) {
        guard unsafe clinux_compare_exchange32(off, 0, 1) else { return }
        report(
            CacheNotice(
                isWarning: true, text: "\(error.about(path)); the disk goes on without the block cache"))
    }

    /// What it has been good for.
    var use: CacheUse {
        state.withLock { state in
            CacheUse(
                hitBytes: index.foundBytes, missBytes: state.missBytes,
                cachedBytes: UInt64(index.count) * chunkSize, capacity: layout.slotCount * chunkSize)
        }
    }

    /// Slots and chunks in the order of use, the one that is evicted first first.
    func slotsByUse() -> [(slot: Int32, chunk: UInt64)] { state.withLock { _ in index.all() } }
}

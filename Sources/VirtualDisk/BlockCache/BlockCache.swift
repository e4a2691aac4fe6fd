internal import CLinux
internal import DiskFormats
internal import DiskImage
internal import DiskStorage

/// A persistent cache of what the lower images of a disk hold, in a file (a VCI).
///
/// What is where is in memory while it is open, under a lock that is never held across I/O. Who finds a chunk takes the
/// number of its slot's *generation*, reads, and looks at the number again: a slot whose chunk is evicted gets another
/// one before anything is written to it. Who then has read too late reads from the images.
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
    let state: Locked<State>
    let fetches = CacheFetches()
    /// The header was written: that the file is in use is durable. With what the file held is not to be used.
    let beginning: Locked<Beginning>
    private let descriptor: Int32
    private let chunkShift: UInt64
    private let scratch: ScratchPool
    private let generations: UnsafeMutablePointer<UInt32>
    /// Whether the cache is not used any more.
    private let off: UnsafeMutablePointer<UInt32>

    struct State {
        var index: CacheIndex
        var streams: CacheStreams
        /// Whether the order of use is another one than in the file.
        var isReordered = false
        var hitBytes: UInt64 = 0
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
        let streams = CacheStreams(limit: min(64 << 20, layout.slotCount * chunkSize / 8))
        state = Locked(State(index: index, streams: streams))
        beginning = Locked(Beginning(isStale: isStale))
        unsafe generations = .allocate(capacity: Int(layout.slotCount))
        unsafe generations.initialize(repeating: 0, count: Int(layout.slotCount))
        unsafe off = .allocate(capacity: 1)
        unsafe off.initialize(to: 0)
    }

    deinit {
        unsafe generations.deallocate()
        unsafe off.deallocate()
    }

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
        let isLarge = state.withLock { $0.streams.note(offset, UInt64(count)) }
        var done = 0
        while done < count {
            let position = offset + UInt64(done)
            let rest = buffer.slice(done, count - done)
            let found = look(position, rest.count, isLarge)
            switch found.kind {
            case .hit: done += try readHit(found, into: rest, at: position)
            case .fetch: done += try fetch(found, into: rest, at: position, isLarge)
            case .wait: fetches.wait(found.number, found.word)
            case .pass:
                let part = rest.slice(0, length(of: found, from: position, rest.count))
                try source.read(into: part, at: position)
                done += part.count
            }
        }
    }

    /// What was found at a place.
    private struct Found {
        enum Kind {
            /// Chunks are cached, side by side.
            case hit
            /// They are not; the caller is to read them.
            case fetch
            /// Another thread is reading it.
            case wait
            /// Too much is being read: this is not cached.
            case pass
        }

        let kind: Kind
        let chunk: UInt64
        var chunks: UInt64 = 1
        /// The first slot (hit), or the entry's number.
        var number = 0
        /// What to wait with.
        var word: UInt32 = 0
        var generations = InlineArray<32, UInt32>(repeating: 0)
    }

    /// How many of `count` bytes from a place on lie in what was found.
    @inline(__always)
    private func length(of found: borrowing Found, from position: UInt64, _ count: Int) -> Int {
        Int(min(UInt64(count), (found.chunk &+ found.chunks) << chunkShift &- position))
    }

    @inline(__always)
    private func look(_ position: UInt64, _ count: Int, _ isLarge: Bool) -> Found {
        let chunk = position >> chunkShift
        let last = (position &+ UInt64(count) &- 1) >> chunkShift
        return state.withLock { state in
            let slot = state.index.slot(of: chunk)
            guard slot >= 0 else { return lookFurther(chunk, position, count, &state) }
            var found = Found(kind: .hit, chunk: chunk, number: Int(slot))
            var run = 0
            repeat {
                found.generations[run] = unsafe clinux_load32_relaxed(generations + Int(slot) + run)
                // Reading a chunk piece by piece is no reason to keep what a large sequential read brought.
                if !isLarge, state.index.touch(slot &+ Int32(run)) { state.isReordered = true }
                run += 1
            } while chunk &+ UInt64(run) <= last && run < Self.runLimit
                && state.index.slot(of: chunk &+ UInt64(run)) == slot &+ Int32(run)
            found.chunks = UInt64(run)
            state.hitBytes &+= UInt64(length(of: found, from: position, count))
            return found
        }
    }

    /// A chunk that is not there: whole chunks that are all wanted and not there are read at once.
    @inline(never)
    private func lookFurther(_ chunk: UInt64, _ position: UInt64, _ count: Int, _ state: inout State) -> Found {
        if let number = fetches.number(of: chunk) {
            return Found(kind: .wait, chunk: chunk, number: number, word: fetches.willWait(number))
        }
        var end = chunk &+ 1
        if position == chunk << chunkShift {
            let wanted = position &+ UInt64(count)
            while end - chunk < UInt64(Self.runLimit), end << chunkShift < wanted, range(of: end).upperBound <= wanted,
                state.index.slot(of: end) < 0, fetches.number(of: end) == nil
            {
                end += 1
            }
        }
        let number = fetches.begin(chunk..<end)
        let found = Found(kind: number == nil ? .pass : .fetch, chunk: chunk, chunks: end - chunk, number: number ?? 0)
        state.missBytes &+= UInt64(length(of: found, from: position, count))
        return found
    }

    /// Reads what is cached; answers how many bytes.
    @inline(__always)
    private func readHit(
        _ found: borrowing Found, into buffer: IOBuffer, at position: UInt64
    ) throws(DiskError) -> Int {
        let part = buffer.slice(0, length(of: found, from: position, buffer.count))
        let place = layout.address(ofSlot: UInt64(found.number)) &* VCILayout.blockSize
        let isRead = readFile(part, at: place &+ (position &- found.chunk << chunkShift))
        unsafe clinux_fence_acquire(off)
        var isSame = isRead
        for run in 0..<Int(found.chunks) where isSame {
            isSame = unsafe clinux_load32_relaxed(generations + found.number + run) == found.generations[run]
        }
        if !isSame { try source.read(into: part, at: position) }
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

    /// Reads chunks from the images and puts them into the cache; answers how many bytes of the buffer are filled.
    @inline(never)
    private func fetch(
        _ found: borrowing Found, into buffer: IOBuffer, at position: UInt64, _ isLarge: Bool
    ) throws(DiskError) -> Int {
        let (number, chunk) = (found.number, found.chunk)
        defer { if state.withLock({ _ in fetches.end(number) }) { fetches.wake(number) } }
        let part = buffer.slice(0, length(of: found, from: position, buffer.count))
        let whole = range(of: chunk).lowerBound..<range(of: chunk + found.chunks - 1).upperBound
        if position == whole.lowerBound, UInt64(part.count) == whole.upperBound - whole.lowerBound {
            try source.read(into: part, at: position)
            for chunk in chunk..<chunk + found.chunks {
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
        let slot = state.withLock { state in
            guard state.index.slot(of: chunk) < 0 else { return CacheIndex.none }
            let slot = state.index.take()
            if slot >= 0 { _ = unsafe clinux_fetch_add32(generations + Int(slot), 1) }
            return slot
        }
        guard slot >= 0 else { return }
        // Who sees a byte of what is written now sees the new generation too.
        clinux_fence_release()
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
        state.withLock { state in
            if isWritten {
                state.index.insert(chunk, in: slot, isCold: isLarge)
            } else {
                state.index.giveBack(slot)
            }
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
        let capacity = layout.slotCount * chunkSize
        return state.withLock { state in
            CacheUse(
                hitBytes: state.hitBytes, missBytes: state.missBytes,
                cachedBytes: UInt64(state.index.count) * chunkSize, capacity: capacity)
        }
    }
}

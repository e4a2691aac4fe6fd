public import DiskStorage

/// Memory that pretends to be a file of any length: only pages that hold something take space. It has a limit as file
/// systems have one, and counts what is kept.
public final class PagedStorage: Storage {
    public let traits: StorageTraits
    public let name: String
    /// Bytes of a page.
    private static let pageSize = 4096
    /// The longest that it may become: a file system's limit (ext4: 16 TiB).
    private static let lengthLimit: UInt64 = 1 << 44

    private struct State {
        var pages: [UInt64: [UInt8]] = [:]
        var length: UInt64
    }

    private let state: Locked<State>

    /// Holds `bytes` first, and zeros up to `length` if that is more.
    public init(_ bytes: [UInt8] = [], length: UInt64? = nil, name: String = "memory", isWritable: Bool = true) {
        self.name = name
        traits = StorageTraits(isWritable: isWritable, canDiscard: isWritable)
        state = Locked(State(length: max(UInt64(bytes.count), length ?? 0)))
        state.withLock { state in
            for start in stride(from: 0, to: bytes.count, by: Self.pageSize) {
                var page = bytes.slice(start, min(Self.pageSize, bytes.count - start))
                page.append(contentsOf: repeatElement(0, count: Self.pageSize - page.count))
                state.pages[UInt64(start / Self.pageSize)] = page
            }
        }
    }

    /// A copy of what another one holds now.
    public init(copying other: PagedStorage, isWritable: Bool) {
        name = other.name
        traits = StorageTraits(isWritable: isWritable, canDiscard: isWritable)
        state = Locked(State(pages: other.state.withLock { $0.pages }, length: other.length()))
    }

    /// How many bytes of pages it keeps.
    public var keptBytes: Int { state.withLock { $0.pages.count * Self.pageSize } }

    /// All bytes; only for short ones.
    public var bytes: [UInt8] {
        (try? availableBytes(at: 0, count: Int(length()), for: .guestData)) ?? []
    }

    public func length() -> UInt64 { state.withLock { $0.length } }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) -> Int {
        state.withLock { state in
            guard offset < state.length else { return 0 }
            let count = Int(min(UInt64(buffer.count), state.length - offset))
            Self.forEachPart(offset, count) { page, inPage, start, part in
                let target = buffer.slice(start, part)
                guard let bytes = state.pages[page] else { return target.zero() }
                try? bytes.withIOBytes { (memory) throws(DiskError) in target.copy(from: memory.slice(inPage, part)) }
            }
            return count
        }
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        guard offset <= Self.lengthLimit, UInt64(bytes.count) <= Self.lengthLimit - offset else {
            throw .system(27, "write \(bytes.count) bytes", image: name, offset: offset)  // EFBIG
        }
        state.withLock { state in
            state.length = max(state.length, offset + UInt64(bytes.count))
            Self.forEachPart(offset, bytes.count) { page, inPage, start, part in
                try? state.pages[page, default: [UInt8](repeating: 0, count: Self.pageSize)].withIOBuffer {
                    (memory) throws(DiskError) in memory.slice(inPage, part).copy(from: bytes.slice(start, part))
                }
            }
        }
    }

    /// Calls `body` with the number of each page, and where in it which part of the range lies.
    private static func forEachPart(_ offset: UInt64, _ count: Int, _ body: (UInt64, Int, Int, Int) -> Void) {
        var done = 0
        while done < count {
            let position = offset + UInt64(done)
            let inPage = Int(position % UInt64(pageSize))
            let part = min(pageSize - inPage, count - done)
            body(position / UInt64(pageSize), inPage, done, part)
            done += part
        }
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        state.withLock { state in
            let size = UInt64(Self.pageSize)
            for page in state.pages.keys where page * size < range.upperBound && (page + 1) * size > range.lowerBound {
                let start = max(range.lowerBound, page * size) - page * size
                let end = min(range.upperBound, (page + 1) * size) - page * size
                if start == 0, end == size {
                    state.pages[page] = nil
                } else {
                    for index in Int(start)..<Int(end) { state.pages[page]?[index] = 0 }
                }
            }
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        guard length <= Self.lengthLimit else { throw .system(27, "grow to \(length) bytes", image: name) }  // EFBIG
        let old = state.withLock { state in
            defer { state.length = length }
            return state.length
        }
        if length < old { try discard(length..<old, mustZero: true, for: .guestData) }
    }

    public func flush() {}
    public func allocatedBytes() -> UInt64 { UInt64(keptBytes) }

    /// Pages that hold nothing are holes, as a file system has them.
    public func nextData(from offset: UInt64) -> Range<UInt64>? {
        let size = UInt64(Self.pageSize)
        return state.withLock { state in
            guard offset < state.length, let first = state.pages.keys.filter({ $0 >= offset / size }).min() else {
                return nil
            }
            var end = first + 1
            while state.pages[end] != nil { end += 1 }
            let start = max(offset, first * size)
            return start < state.length ? start..<min(end * size, state.length) : nil
        }
    }
}

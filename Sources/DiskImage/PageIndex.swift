internal import CLinux

/// The part of the table cache that readers use without a lock: a plain value of pointers, without references.
///
/// A slot's content is guarded by its sequence number: odd while it changes hands. A reader takes the number, checks
/// the tag, loads the entry and takes the number again; if it moved, what was loaded may belong to another page.
@safe
struct PageIndex: @unchecked Sendable {  // memory is written under the cache's lock, read with a sequence check
    /// Bytes of a page.
    static let pageSize = 4096
    /// Slots of a set.
    static let ways = 8
    /// Bits of a tag that number the page inside its file; the file's number + 1 stands above them.
    static let pageBits: UInt64 = 44

    let setShift: UInt64
    /// Tag of each slot's page; 0 = empty.
    let tags: UnsafeMutablePointer<UInt64>
    /// Sequence number of each slot.
    let sequences: UnsafeMutablePointer<UInt32>
    /// Whether each slot was read since the clock hand passed.
    let recent: UnsafeMutablePointer<UInt8>
    let pages: UnsafeMutableRawPointer

    /// Memory for `setCount` sets, a power of two.
    init(setCount: Int) {
        setShift = UInt64(64 - setCount.trailingZeroBitCount)
        let slotCount = setCount * Self.ways
        unsafe tags = unsafe UnsafeMutableRawPointer.allocate(byteCount: slotCount * 8, alignment: 64)
            .initializeMemory(as: UInt64.self, repeating: 0, count: slotCount)
        unsafe sequences = .allocate(capacity: slotCount)
        unsafe sequences.initialize(repeating: 0, count: slotCount)
        unsafe recent = .allocate(capacity: slotCount)
        unsafe recent.initialize(repeating: 0, count: slotCount)
        unsafe pages = .allocate(byteCount: slotCount * Self.pageSize, alignment: Self.pageSize)
    }

    func deallocate() {
        unsafe tags.deallocate()
        unsafe sequences.deallocate()
        unsafe recent.deallocate()
        unsafe pages.deallocate()
    }

    /// The slot that holds the page, or -1.
    @inline(__always)
    func find(_ tag: UInt64) -> Int {
        let first = firstSlot(tag)
        for slot in first..<first &+ Self.ways where unsafe clinux_load64_relaxed(tags + slot) == tag { return slot }
        return -1
    }

    /// The first slot of the page's set.
    @inline(__always)
    func firstSlot(_ tag: UInt64) -> Int {
        Int(truncatingIfNeeded: (tag &* 0x9e37_79b9_7f4a_7c15) >> setShift) &* Self.ways
    }

    /// Marks a slot as used; writes only when that is news, so that concurrent hits do not fight over the line.
    @inline(__always)
    func touch(_ slot: Int) {
        if unsafe clinux_load8_relaxed(recent + slot) == 0 { unsafe clinux_store8_relaxed(recent + slot, 1) }
    }

    /// Where a byte of a slot's page lies.
    @inline(__always)
    func place(_ slot: Int, _ offset: UInt64) -> UnsafeMutableRawPointer {
        unsafe pages + (slot &* Self.pageSize &+ Int(truncatingIfNeeded: offset & 4095))
    }

    /// The 32-bit word at `offset` of the file with `fileTag`, in this machine's byte order; nil: not here, or moving.
    @inline(__always)
    func load32(_ fileTag: UInt64, _ offset: UInt64) -> UInt32? {
        let tag = fileTag | offset >> 12
        let slot = find(tag)
        guard slot >= 0 else { return nil }
        let sequence = unsafe clinux_load32_acquire(sequences + slot)
        guard sequence & 1 == 0, unsafe clinux_load64_relaxed(tags + slot) == tag else { return nil }
        let value = unsafe clinux_load32_relaxed(place(slot, offset))
        unsafe clinux_fence_acquire(sequences + slot)
        guard unsafe clinux_load32_relaxed(sequences + slot) == sequence else { return nil }
        touch(slot)
        return value
    }

    /// The 64-bit word at `offset`, a multiple of 8; see ``load32(_:_:)``.
    @inline(__always)
    func load64(_ fileTag: UInt64, _ offset: UInt64) -> UInt64? {
        let tag = fileTag | offset >> 12
        let slot = find(tag)
        guard slot >= 0 else { return nil }
        let sequence = unsafe clinux_load32_acquire(sequences + slot)
        guard sequence & 1 == 0, unsafe clinux_load64_relaxed(tags + slot) == tag else { return nil }
        let value = unsafe clinux_load64_relaxed(place(slot, offset))
        unsafe clinux_fence_acquire(sequences + slot)
        guard unsafe clinux_load32_relaxed(sequences + slot) == sequence else { return nil }
        touch(slot)
        return value
    }

    /// Takes a slot's content away: from here on its sequence number is odd and its tag empty.
    func beginChange(_ slot: Int) {
        unsafe clinux_store32_release(sequences + slot, sequences[slot] &+ 1)
        clinux_fence_release()
        unsafe clinux_store64_relaxed(tags + slot, 0)
    }

    /// Gives a slot its new content (4096 bytes) and tag.
    func endChange(_ slot: Int, _ bytes: [UInt8], tag: UInt64) {
        unsafe bytes.withUnsafeBytes { source in
            for word in stride(from: 0, to: Self.pageSize, by: 8) {
                unsafe clinux_store64_relaxed(
                    pages + slot * Self.pageSize + word, source.loadUnaligned(fromByteOffset: word, as: UInt64.self))
            }
        }
        unsafe clinux_store64_relaxed(tags + slot, tag)
        unsafe clinux_store8_relaxed(recent + slot, 0)
        unsafe clinux_store32_release(sequences + slot, sequences[slot] &+ 1)
    }
}

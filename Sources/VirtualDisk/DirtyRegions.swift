internal import CLinux

/// Which parts of a disk were written since they were asked for last: a bit for each, set by who holds the region's
/// lock.
@safe
final class DirtyRegions: @unchecked Sendable {  // the words are only accessed atomically
    /// At most this many parts.
    private static let limit: UInt64 = 1 << 20
    private let words: UnsafeMutablePointer<UInt32>
    private let wordCount: Int
    private let shift: UInt64
    private let size: UInt64

    /// For a disk of `size` bytes; a part is never smaller than a region.
    init(size: UInt64, regionSize: UInt64) {
        var shift = UInt64(regionSize.trailingZeroBitCount)
        while size >> shift >= Self.limit { shift += 1 }
        self.shift = shift
        self.size = size
        wordCount = Int(size >> shift) / 32 + 1
        unsafe words = .allocate(capacity: wordCount)
        unsafe words.initialize(repeating: 0, count: wordCount)
    }

    deinit { unsafe words.deallocate() }

    /// Something is about to be written there.
    @inline(never)
    func note(_ offset: UInt64, _ length: UInt64) {
        guard length > 0 else { return }
        for part in offset >> shift...(offset &+ length &- 1) >> shift {
            _ = unsafe clinux_fetch_or32(words + Int(part / 32), 1 << UInt32(part % 32))
        }
    }

    /// The parts that were noted, which are forgotten.
    func take() -> [Range<UInt64>] {
        var ranges: [Range<UInt64>] = []
        for number in 0..<wordCount {
            var bits = unsafe clinux_fetch_and32(words + number, 0)
            while bits != 0 {
                let part = UInt64(number * 32 + bits.trailingZeroBitCount)
                bits &= bits - 1
                ranges.append(part << shift..<min(size, (part + 1) << shift))
            }
        }
        return ranges
    }
}

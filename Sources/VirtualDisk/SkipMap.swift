internal import CLinux
internal import DiskImage
internal import DiskStorage

/// For each region of the disk, which of the lower layers is the first that holds anything there: a read that the top
/// image does not answer goes straight to it, however many snapshots lie between.
///
/// Lower layers do not change while their chain lives, so that what was found once stays true. A region is found out
/// when it is first asked for, from the layers' own answers.
@safe
final class SkipMap: @unchecked Sendable {  // entries are only accessed atomically; each has one right value
    /// At most this many regions, a byte each.
    private static let limit: UInt64 = 1 << 16
    private let entries: UnsafeMutablePointer<UInt8>
    private let shift: UInt64
    private let size: UInt64

    /// For a disk of `size` bytes.
    init(size: UInt64) {
        var shift: UInt64 = 20
        while size >> shift >= Self.limit { shift += 1 }
        self.shift = shift
        self.size = size
        let count = Int(size >> shift) + 1
        unsafe entries = .allocate(capacity: count)
        unsafe entries.initialize(repeating: 0, count: count)
    }

    deinit { unsafe entries.deallocate() }

    /// The layer, 1 or further down, with which to begin for a range; `isVacant` says whether a layer holds nothing
    /// in a range.
    @inline(__always)
    func start(
        _ offset: UInt64, _ length: UInt64, depth: Int, isVacant: (Int, UInt64, UInt64) -> Bool
    ) -> Int {
        let first = Int(offset >> shift)
        let last = Int((offset &+ length &- 1) >> shift)
        var result = unsafe Int(clinux_load8_relaxed(entries + first))
        if result == 0 { result = find(first, depth, isVacant) }
        guard last != first else { return result }
        for region in first &+ 1...last {
            var other = unsafe Int(clinux_load8_relaxed(entries + region))
            if other == 0 { other = find(region, depth, isVacant) }
            result = min(result, other)
        }
        return result
    }

    @inline(never)
    private func find(_ region: Int, _ depth: Int, _ isVacant: (Int, UInt64, UInt64) -> Bool) -> Int {
        let start = UInt64(region) << shift
        let length = min(1 << shift, size - start)
        var layer = 1
        while layer < min(depth, 255), isVacant(layer, start, length) { layer += 1 }
        unsafe clinux_store8_relaxed(entries + region, UInt8(layer))
        return layer
    }
}

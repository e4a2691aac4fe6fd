/// Bits of L1 and L2 entries (QEMU, docs/interop/qcow2, "L1 table entry", "L2 table entry", "Standard Cluster
/// Descriptor", "Compressed Clusters Descriptor", "Extended L2 Entries").
enum QCOW2Entry {
    /// Where the table or cluster begins: bits 9 to 55.
    static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00
    /// The cluster has a refcount of exactly one, and may be written where it is (COPIED).
    static let copied: UInt64 = 1 << 63
    /// The rest of the entry describes a compressed cluster.
    static let compressed: UInt64 = 1 << 62
    /// The cluster reads as zeros, whether it has a place or not. Not with extended L2 entries.
    static let zero: UInt64 = 1
    /// What no L1 entry may have set.
    static let l1Reserved: UInt64 = ~(offsetMask | copied)
    /// What no standard cluster's L2 entry may have set.
    static let l2Reserved: UInt64 = ~(offsetMask | copied | compressed | zero)

    /// Where a refcount block begins: bits 9 to 63 of an entry of the refcount table.
    static let refcountBlockMask: UInt64 = ~0x1ff
}

/// Where a compressed cluster lies: bits 0 to 61 of its L2 entry.
struct QCOW2CompressedCluster: Equatable, Sendable {
    /// Where its data begins, in bytes; anywhere.
    let offset: UInt64
    /// How many bytes belong to it, up to the end of its last 512-byte sector; data may end before.
    let count: UInt64

    init(_ entry: UInt64, clusterBits: UInt64) {
        let countShift = 62 - (clusterBits - 8)
        offset = entry & ((1 << countShift) - 1)
        let sectors = (entry & (QCOW2Entry.compressed - 1)) >> countShift + 1
        count = sectors * 512 - (offset & 511)
    }

    /// The host clusters that it touches.
    func hostClusters(_ clusterBits: UInt64) -> ClosedRange<UInt64> {
        offset >> clusterBits...(offset + count - 1) >> clusterBits
    }
}

/// The second half of an extended L2 entry: two bits for each of 32 subclusters.
struct QCOW2SubclusterBitmap: Equatable, Sendable {
    static let count: UInt64 = 32

    /// What a subcluster is.
    enum State: Equatable {
        case unallocated, allocated, zero, invalid
    }

    var rawValue: UInt64

    /// Bit n: subcluster n is stored in the cluster.
    var allocated: UInt32 { UInt32(truncatingIfNeeded: rawValue) }
    /// Bit n: subcluster n reads as zeros.
    var zero: UInt32 { UInt32(truncatingIfNeeded: rawValue >> 32) }

    init(rawValue: UInt64) { self.rawValue = rawValue }

    init(allocated: UInt32, zero: UInt32) { rawValue = UInt64(zero) << 32 | UInt64(allocated) }

    static let allAllocated = Self(allocated: .max, zero: 0)
    static let allZero = Self(allocated: 0, zero: .max)
    static let none = Self(rawValue: 0)

    /// Whether some subcluster is said to be both.
    var isInvalid: Bool { allocated & zero != 0 }

    @inline(__always)
    func state(_ number: UInt64) -> State {
        switch (rawValue >> number & 1, rawValue >> (number &+ 32) & 1) {
        case (0, 0): .unallocated
        case (1, 0): .allocated
        case (0, _): .zero
        default: .invalid
        }
    }

    /// How many subclusters from `number` on are in the same state as that one.
    @inline(__always)
    func runLength(_ number: UInt64) -> UInt64 {
        let isAllocated = rawValue >> number & 1 != 0
        let isZero = rawValue >> (number &+ 32) & 1 != 0
        let same =
            (isAllocated ? allocated : ~allocated) & (isZero ? zero : ~zero)
        return UInt64((~(same >> UInt32(truncatingIfNeeded: number))).trailingZeroBitCount)
    }

    /// The bits of a range of subclusters.
    static func mask(_ range: Range<UInt64>) -> UInt32 {
        let low = (UInt64(1) << range.upperBound) - 1
        return UInt32(truncatingIfNeeded: low & ~((UInt64(1) << range.lowerBound) - 1))
    }

    /// The same with a range of subclusters allocated.
    func allocating(_ range: Range<UInt64>) -> Self {
        let mask = Self.mask(range)
        return Self(allocated: allocated | mask, zero: zero & ~mask)
    }
}

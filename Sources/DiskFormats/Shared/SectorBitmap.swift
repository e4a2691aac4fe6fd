internal import DiskImage
internal import DiskStorage

/// Bitmaps in a file that say of each sector of a block whether this image holds it: 1 is here, 0 is the parent's. A
/// plain value, for the hot path.
struct SectorBitmap {
    /// Which bit of a byte is the first sector's.
    enum BitOrder {
        /// VHD.
        case mostSignificantFirst
        /// VHDX.
        case leastSignificantFirst
    }

    let table: Table
    let order: BitOrder
    /// log2 of a sector's bytes.
    let sectorShift: UInt64

    /// 32 bits of the bitmap that begins at `start`: the first sector's is the most significant one.
    @inline(__always)
    func word(_ number: UInt64, _ start: UInt64) throws(DiskError) -> UInt32 {
        let word = try table.entry32(at: start &+ number &* 4).byteSwapped
        return order == .mostSignificantFirst ? word : Self.reversingBytes(word)
    }

    /// Stores such bits. False: flush the set first, then store again.
    func store(
        _ word: UInt32, _ number: UInt64, _ start: UInt64, _ writeOrder: WriteOrder
    ) throws(DiskError) -> Bool {
        let stored = order == .mostSignificantFirst ? word : Self.reversingBytes(word)
        return try table.store32(stored.byteSwapped, at: start + number * 4, writeOrder)
    }

    /// The bits of each byte in reverse order.
    @inline(__always)
    private static func reversingBytes(_ word: UInt32) -> UInt32 {
        var word = word
        word = word &>> 1 & 0x5555_5555 | (word & 0x5555_5555) &<< 1
        word = word &>> 2 & 0x3333_3333 | (word & 0x3333_3333) &<< 2
        return word &>> 4 & 0x0f0f_0f0f | (word & 0x0f0f_0f0f) &<< 4
    }

    /// The bits of a range of sectors in word `number`.
    static func mask(_ sectors: Range<UInt64>, _ number: UInt64) -> UInt32 {
        let first = max(sectors.lowerBound, number * 32)
        let end = min(sectors.upperBound, number * 32 + 32)
        guard first < end else { return 0 }
        let from = UInt32.max >> UInt32(first - number * 32)
        return end == number * 32 + 32 ? from : from & ~(UInt32.max >> UInt32(end - number * 32))
    }

    /// Whether the bits of the first `count` sectors are all set.
    func isFull(_ count: UInt64, _ start: UInt64) throws(DiskError) -> Bool {
        guard count >= 32 else { return try ~word(0, start) >> UInt32(32 - count) == 0 }
        let end = start + count / 8
        guard try table.endOfRun(of: .max, in: start..<end & ~3) == end & ~3 else { return false }
        guard count % 32 != 0 else { return true }
        return try ~word(count / 32, start) >> UInt32(32 - count % 32) == 0
    }

    /// Appends the runs of sectors of a block that are here or not, of the `length` bytes from `inBlock` on, which lie
    /// at `data` of the file; answers how many bytes it got through before the batch was full.
    @inline(__always)
    func map(
        _ start: UInt64, _ inBlock: UInt64, _ length: UInt64, at data: UInt64, into batch: inout ExtentBatch
    ) throws(DiskError) -> UInt64 {
        var done: UInt64 = 0
        while done < length {
            let first = (inBlock &+ done) &>> sectorShift
            let end = (inBlock &+ length &+ (1 &<< sectorShift &- 1)) &>> sectorShift
            var sector = first
            var bits = try word(sector >> 5, start)
            let isHere = bits << UInt32(truncatingIfNeeded: sector & 31) & 0x8000_0000 != 0
            while true {
                // The bits that differ from the first one, from this sector on.
                let others = (isHere ? ~bits : bits) << UInt32(truncatingIfNeeded: sector & 31)
                let left = 32 &- (sector & 31)
                let same = min(left, UInt64(others.leadingZeroBitCount))
                sector &+= same
                if same < left || sector >= end { break }
                bits = try word(sector >> 5, start)
            }
            let run = min(sector &<< sectorShift &- inBlock, length) &- done
            let extent =
                isHere ? Extent(.data, length: run, fileOffset: data &+ done) : Extent(.absent, length: run)
            guard batch.append(extent) else { return done }
            done &+= run
        }
        return done
    }
}

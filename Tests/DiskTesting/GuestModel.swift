/// What a guest may find on its disk after a power cut: for each sector, what was flushed, or anything written since.
///
/// Every sector that is written holds the number of the write and its own number, so that foreign data shows.
public struct GuestModel: Sendable {
    /// Bytes of a sector.
    public static let sectorSize = 512

    /// One change by the guest.
    private struct Change: Sendable {
        /// Number of events in the crash log before it began.
        let event: Int
        let sectors: Range<Int>
        /// The stamp, or 0 for zeros.
        let stamp: UInt32
        let isFlush: Bool
        /// Whether the guest was told that it failed: then it may have happened or not, in parts.
        var hasFailed = false
    }

    private var changes: [Change] = []
    /// The content of the disk when the guest got it.
    private let initial: [UInt32]
    private var nextStamp: UInt32

    /// A disk whose sectors hold these stamps (0: zeros).
    public init(initial: [UInt32], firstStamp: UInt32) {
        self.initial = initial
        nextStamp = firstStamp
    }

    /// The bytes of the next write to `sectors`, which begins when the log has `event` events.
    public mutating func write(_ sectors: Range<Int>, event: Int) -> [UInt8] {
        defer { nextStamp += 1 }
        changes.append(Change(event: event, sectors: sectors, stamp: nextStamp, isFlush: false))
        return sectors.flatMap { Self.sector($0, stamp: nextStamp) }
    }

    /// A discard of `sectors`.
    public mutating func discard(_ sectors: Range<Int>, event: Int) {
        changes.append(Change(event: event, sectors: sectors, stamp: 0, isFlush: false))
    }

    /// A flush that ended when the log had `event` events.
    public mutating func flush(event: Int) {
        changes.append(Change(event: event, sectors: 0..<0, stamp: 0, isFlush: true))
    }

    /// The last write or discard failed.
    public mutating func lastChangeFailed() { changes[changes.count - 1].hasFailed = true }

    /// The content of a sector.
    public static func sector(_ number: Int, stamp: UInt32) -> [UInt8] {
        guard stamp != 0 else { return [UInt8](repeating: 0, count: sectorSize) }
        var bytes: [UInt8] = []
        for shift in [0, 8, 16, 24] { bytes.append(UInt8(truncatingIfNeeded: stamp >> UInt32(shift))) }
        for shift in [0, 8, 16, 24] { bytes.append(UInt8(truncatingIfNeeded: number >> shift)) }
        return bytes + [UInt8](repeating: bytes[0] ^ bytes[4] | 1, count: sectorSize - 8)
    }

    /// For a power cut before event `cut`: the stamps that each sector may hold.
    public func allowed(at cut: Int) -> [[UInt32]] {
        var result = initial.map { [$0] }
        let happened = changes.filter { $0.isFlush ? $0.event <= cut : $0.event < cut || $0.event == cut }
        let lastFlush = happened.lastIndex { $0.isFlush } ?? -1
        for (index, change) in happened.enumerated() where !change.isFlush {
            for sector in change.sectors {
                if index < lastFlush, !change.hasFailed {
                    result[sector] = [change.stamp]
                } else {
                    result[sector].append(change.stamp)
                }
            }
        }
        return result
    }

    /// The first sector of `disk` that holds what it may not: its number and what is wrong.
    public func firstMistake(in disk: [UInt8], allowed: [[UInt32]]) -> String? {
        unsafe disk.withUnsafeBytes { memory in
            for (number, stamps) in allowed.enumerated() {
                let start = number * Self.sectorSize
                let stamp = unsafe UInt32(littleEndian: memory.loadUnaligned(fromByteOffset: start, as: UInt32.self))
                let own = unsafe UInt32(littleEndian: memory.loadUnaligned(fromByteOffset: start + 4, as: UInt32.self))
                // Every sector is 8 bytes of identity and one byte over and over.
                let filler = unsafe memory[start + 8]
                let last = unsafe memory.loadUnaligned(fromByteOffset: start + 8, as: UInt64.self)
                var isWhole = filler == (stamp == 0 ? 0 : UInt8(truncatingIfNeeded: stamp ^ own) | 1)
                isWhole = isWhole && (stamp == 0 ? own == 0 : own == UInt32(number))
                for offset in stride(from: start + 8, to: start + Self.sectorSize, by: 8) {
                    isWhole = unsafe isWhole && memory.loadUnaligned(fromByteOffset: offset, as: UInt64.self) == last
                }
                if !isWhole {
                    return "sector \(number) is torn or foreign (stamp \(stamp) of \(own)), allowed \(stamps)"
                }
                if !stamps.contains(stamp) { return "sector \(number) holds stamp \(stamp), allowed are \(stamps)" }
            }
            return nil
        }
    }
}

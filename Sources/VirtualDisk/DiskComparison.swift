internal import DiskImage
public import DiskStorage
internal import Dispatch

/// Whether two disks show the same bytes, whatever their formats and chains.
///
/// What both are known to have as zeros (by their tables, and as holes of their files) is passed over without reading,
/// and so is what both take from the same place of the same file: two snapshots of one base are compared by what is in
/// the snapshots alone. The rest is read, from both at the same time.
public struct DiskComparison: Sendable {
    /// How disks are compared.
    public struct Options: Sendable {
        /// Whether sizes must be the same, and where one disk stores bytes, zeros or others, the other must store some
        /// too (`qemu-img compare -s`). Else the longer disk's rest must be zeros.
        public var isStrict = false
        /// Whether the comparison goes on after the first difference, and tells of all.
        public var findsAll = false
        /// The most ranges that are told of; those behind them are counted.
        public var rangeLimit = 10_000

        public init() {}
    }

    /// What differs in a range.
    public enum Difference: String, Sendable {
        /// The bytes do.
        case content
        /// The bytes are the same, but one disk stores them and the other does not; told of by a strict comparison.
        case allocation
    }

    /// A range that differs.
    public struct DifferingRange: Sendable, Equatable {
        /// Its bytes. With ``Options/findsAll`` they are whole sectors of 512 bytes, and neighbours are one range.
        public var range: Range<UInt64>
        public var difference: Difference
    }

    /// The sizes of the two disks in bytes.
    public let sizes: (first: UInt64, second: UInt64)
    /// The first byte that differs in content or, in a strict comparison, allocation; nil if none does.
    public internal(set) var firstDifference: UInt64?
    /// The ranges that differ, in order: all, or the first one alone.
    public internal(set) var ranges: [DifferingRange] = []
    /// How many ranges there are beyond ``Options/rangeLimit``.
    public internal(set) var furtherRanges = 0
    /// How many bytes the ranges have, those that are not told of included.
    public internal(set) var differingBytes: UInt64 = 0
    private let isStrict: Bool

    /// Whether the sizes are what they must be.
    public var hasAcceptedSizes: Bool { !isStrict || sizes.first == sizes.second }
    /// Whether the disks are the same, in the sense that was asked for.
    public var isEqual: Bool { firstDifference == nil && hasAcceptedSizes }

    init(_ first: Disk, _ second: Disk, isStrict: Bool) {
        sizes = (first.size, second.size)
        self.isStrict = isStrict
    }

    /// Compares two disks. Neither may be written to meanwhile. Stops with `DiskError.Kind.cancelled` if asked to.
    public static func run(
        _ first: Disk, _ second: Disk, options: Options = Options(), control: OperationControl = OperationControl()
    ) throws(DiskError) -> DiskComparison {
        var comparer = DiskComparer(first, second, options, control)
        return try comparer.run()
    }

    mutating func add(_ range: Range<UInt64>, _ difference: Difference, limit: Int) {
        if firstDifference == nil { firstDifference = range.lowerBound }
        differingBytes += range.upperBound - range.lowerBound
        if let last = ranges.last, furtherRanges == 0, last.difference == difference,
            last.range.upperBound == range.lowerBound
        {
            ranges[ranges.count - 1].range = last.range.lowerBound..<range.upperBound
        } else if ranges.count < limit {
            ranges.append(DifferingRange(range: range, difference: difference))
        } else {
            furtherRanges += 1
        }
    }
}

/// The work of a comparison.
private struct DiskComparer {
    /// Bytes that are read of each disk at once.
    private static let chunkSize = 2 << 20
    /// Bytes that one look at the tables is for.
    private static let window: UInt64 = 1 << 40
    private static let sector: UInt64 = 512

    private let first: Disk
    private let second: Disk
    private let options: DiskComparison.Options
    private let control: OperationControl
    private var result: DiskComparison
    /// Whether some file belongs to both chains.
    private let sharesFiles: Bool
    private let end: UInt64
    private var isDone = false

    init(_ first: Disk, _ second: Disk, _ options: DiskComparison.Options, _ control: OperationControl) {
        self.first = first
        self.second = second
        self.options = options
        self.control = control
        result = DiskComparison(first, second, isStrict: options.isStrict)
        sharesFiles = !first.current.chain.fileIdentities.isDisjoint(with: second.current.chain.fileIdentities)
        end = max(first.size, second.size)
    }

    mutating func run() throws(DiskError) -> DiskComparison {
        guard result.hasAcceptedSizes || options.findsAll else { return result }
        control.begin("comparing", total: end)
        var a = [UInt8](repeating: 0, count: Self.chunkSize)
        var b = [UInt8](repeating: 0, count: Self.chunkSize)
        try a.withIOBuffer { (a) throws(DiskError) in
            try b.withIOBuffer { (b) throws(DiskError) in
                var position: UInt64 = 0
                while position < end, !isDone {
                    try control.checkCancelled()
                    position = try step(position, a, b)
                    control.advance(to: position)
                }
            }
        }
        return result
    }

    /// Compares from `position` on; answers how far it got.
    private mutating func step(_ position: UInt64, _ a: IOBuffer, _ b: IOBuffer) throws(DiskError) -> UInt64 {
        // (Where data begins is a matter of tables and of files' holes; what is allocated, of the tables alone.)
        if !options.isStrict {
            let next = min(try dataStart(first, position), try dataStart(second, position))
            if next > position { return next }
        }
        guard sharesFiles || options.isStrict else { return try compare(position, min(end, chunkEnd(position)), a, b) }
        let piece = try piece(of: first, position)
        let other = try self.piece(of: second, position)
        let length = min(piece.length, other.length)
        if piece.holding != .data, other.holding != .data { return position + length }
        if isSamePlace(piece, other) { return position + length }
        if options.isStrict, (piece.holding == .data) != (other.holding == .data) {
            // Whether the bytes differ too does not matter any more.
            result.add(position..<position + length, .allocation, limit: options.rangeLimit)
            isDone = !options.findsAll
            return position + length
        }
        return try compare(position, min(position + length, chunkEnd(position)), a, b)
    }

    private func chunkEnd(_ position: UInt64) -> UInt64 {
        (position / UInt64(Self.chunkSize) + 1) * UInt64(Self.chunkSize)
    }

    /// Where data begins from a position on; the end of the longer disk if there is none.
    private func dataStart(_ disk: Disk, _ position: UInt64) throws(DiskError) -> UInt64 {
        guard position < disk.size else { return end }
        return try disk.nextData(from: position) ?? end
    }

    private func piece(of disk: Disk, _ position: UInt64) throws(DiskError) -> ChainPiece {
        // Behind the shorter disk's end the other one is compared with zeros.
        guard position < disk.size else {
            return ChainPiece(offset: position, length: end - position, layer: 0, content: .ended)
        }
        return try disk.current.chain.piece(at: position, atMost: Self.window)
    }

    /// Whether two pieces are the same bytes of the same file.
    private func isSamePlace(_ piece: ChainPiece, _ other: ChainPiece) -> Bool {
        let (a, b) = (first.current.chain, second.current.chain)
        guard sharesFiles, let file = a.run.handle(of: piece)?.storage.fileIdentity,
            file == b.run.handle(of: other)?.storage.fileIdentity
        else { return false }
        return switch (piece.content, other.content) {
        case (.stored(_, let place), .stored(_, let otherPlace)): place == otherPlace
        case (.encoded(_, let place, let skip), .encoded(_, let otherPlace, let otherSkip)):
            // What is compressed is the same if the same format reads it.
            place == otherPlace && skip == otherSkip
                && a.layers[piece.layer].backend.format == b.layers[other.layer].backend.format
        default: false
        }
    }

    // MARK: - Bytes

    /// Reads and compares a range; answers its end.
    private mutating func compare(
        _ start: UInt64, _ stop: UInt64, _ a: IOBuffer, _ b: IOBuffer
    ) throws(DiskError) -> UInt64 {
        let count = Int(stop - start)
        let (a, b) = (a.slice(0, count), b.slice(0, count))
        try readBoth(start, a, b)
        guard let place = a.readOnly.firstDifference(from: b.readOnly) else { return stop }
        let offset = start + UInt64(place)
        guard options.findsAll else {
            result.add(offset..<offset + 1, .content, limit: options.rangeLimit)
            isDone = true
            return stop
        }
        if result.firstDifference == nil { result.firstDifference = offset }
        var sectorStart = offset & ~(Self.sector - 1)
        while sectorStart < stop {
            let from = max(start, sectorStart)
            let to = min(stop, sectorStart + Self.sector)
            let (at, length) = (Int(from - start), Int(to - from))
            if a.readOnly.slice(at, length).firstDifference(from: b.readOnly.slice(at, length)) != nil {
                result.add(from..<to, .content, limit: options.rangeLimit)
            }
            sectorStart += Self.sector
        }
        return stop
    }

    /// Reads the same range of both disks at the same time; behind a disk's end there are zeros.
    private func readBoth(_ offset: UInt64, _ a: IOBuffer, _ b: IOBuffer) throws(DiskError) {
        let failure = Locked<DiskError?>(nil)
        let work = [(first, a), (second, b)]
        DispatchQueue.concurrentPerform(iterations: 2) { number in
            let (disk, buffer) = work[number]
            let count = Int(min(UInt64(buffer.count), disk.size - min(disk.size, offset)))
            do throws(DiskError) {
                if count > 0 { try disk.read(into: buffer.slice(0, count), at: offset) }
                if count < buffer.count { buffer.slice(count, buffer.count - count).zero() }
            } catch {
                failure.withLock { $0 = $0 ?? error }
            }
        }
        if let failure = failure.withLock({ $0 }) { throw failure }
    }
}

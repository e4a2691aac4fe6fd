internal import DiskStorage

/// What one image of a chain has, in so many parts of the disk of the same size: how many bytes of which kind.
struct LayerCells {
    /// Bytes of a cell by kind; what is left of it is absent.
    struct Cell: Equatable {
        var data: UInt64 = 0
        var encoded: UInt64 = 0
        var zero: UInt64 = 0
    }

    /// What is told apart.
    enum Kind { case data, encoded, zero }

    private(set) var cells: [Cell]
    /// The bytes of all cells together.
    private(set) var sum = Cell()
    private let size: UInt64

    /// Looks at a layer of `disk`, through its tables alone.
    init(_ disk: Disk, layer: Int, count: Int) throws(DiskError) {
        size = disk.size
        cells = Array(repeating: Cell(), count: count)
        guard disk.size > 0 else { return }
        try disk.forEachExtent(ofLayer: layer, offset: 0, length: disk.size) { extent in
            let range = extent.offset..<extent.offset + extent.length
            switch extent.content {
            case .absent: break
            case .data: add(range, .data)
            case .encoded: add(range, .encoded)
            case .zero: add(range, .zero)
            }
            return true
        }
    }

    /// Where a cell begins: cells are the same size to a byte.
    func start(_ index: Int) -> UInt64 {
        // (The product needs up to 74 bits.)
        let (high, low) = size.multipliedFullWidth(by: UInt64(index))
        return UInt64(cells.count).dividingFullWidth((high, low)).quotient
    }

    private func index(of offset: UInt64) -> Int {
        let (high, low) = UInt64(cells.count).multipliedFullWidth(by: offset)
        var index = Int(size.dividingFullWidth((high, low)).quotient)
        // Rounding down twice may have led one too far back.
        while index + 1 < cells.count, start(index + 1) <= offset { index += 1 }
        return index
    }

    private mutating func add(_ range: Range<UInt64>, _ kind: Kind) {
        Self.add(range.upperBound - range.lowerBound, kind, &sum)
        var number = index(of: range.lowerBound)
        var position = range.lowerBound
        while position < range.upperBound {
            let end = number + 1 < cells.count ? min(range.upperBound, start(number + 1)) : range.upperBound
            Self.add(end - position, kind, &cells[number])
            position = end
            number += 1
        }
    }

    private static func add(_ count: UInt64, _ kind: Kind, _ cell: inout Cell) {
        switch kind {
        case .data: cell.data += count
        case .encoded: cell.encoded += count
        case .zero: cell.zero += count
        }
    }
}

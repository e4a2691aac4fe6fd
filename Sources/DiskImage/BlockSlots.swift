/// The blocks of a file in the order in which they lie there, and the holes between: the last block goes to the first
/// hole that has room for it. For formats whose blocks are large, and may begin anywhere.
public struct BlockSlots: Sendable {
    /// A block, and where it begins in the file.
    public struct Block: Sendable {
        public let number: UInt64
        public let place: UInt64

        public init(number: UInt64, place: UInt64) {
            self.number = number
            self.place = place
        }
    }

    /// Blocks that are moved at most: 32 MiB of them are known. In larger images none is.
    public static let limit = 1 << 21

    private var blocks: [Block] = []
    private var holes: [Range<UInt64>] = []
    /// The first hole that may have room.
    private var hole = 0

    /// None.
    public init() {}

    /// - Parameters:
    ///   - blocks: In any order.
    ///   - holes: In ascending order; each as large as one block at least.
    public init(blocks: [Block], holes: [Range<UInt64>]) {
        self.blocks = blocks.sorted { $0.place < $1.place }
        self.holes = holes
    }

    /// Whether a block could move.
    public var isMoving: Bool {
        guard hole < holes.count, let last = blocks.last else { return false }
        return holes[hole].lowerBound < last.place
    }

    /// The block that lies last.
    public var last: Block? { blocks.last }

    /// Takes the last block and a place for it: the first at which `fit` can put it in a hole (where it then begins and
    /// ends), if that lies before its own. Nil: there is none.
    public mutating func next(_ fit: (Range<UInt64>) -> Range<UInt64>?) -> (block: Block, target: UInt64)? {
        guard let block = blocks.last else { return nil }
        while hole < holes.count, holes[hole].lowerBound < block.place {
            if let place = fit(holes[hole]), place.upperBound <= block.place {
                holes[hole] = place.upperBound..<max(place.upperBound, holes[hole].upperBound)
                blocks.removeLast()
                return (block, place.lowerBound)
            }
            hole += 1
        }
        return nil
    }

    /// Nothing moves any more.
    public mutating func stop() { self = BlockSlots() }
}

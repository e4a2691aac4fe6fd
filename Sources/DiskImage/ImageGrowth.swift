public import DiskStorage

/// How the files of a new image grow with what is written to it: what tells how large an image will be, without making
/// it.
public struct ImageGrowth: Sendable {
    /// The bytes of the disk for which room is taken at once, a power of two; 0: all room is there from the beginning.
    public let blockSize: UInt64
    /// The bytes of the disk that a table covers which is made when the first block in it is; 0: there are none such.
    public let tableCoverage: UInt64
    /// Whether ``length(empty:blocks:tables:)`` is the most that it can be: how far blocks can be compressed, nobody
    /// knows before.
    public let isUpperBound: Bool
    private let rule: @Sendable (UInt64, UInt64, UInt64) -> UInt64

    /// - Parameter rule: What ``length(empty:blocks:tables:)`` answers.
    public init(
        blockSize: UInt64, tableCoverage: UInt64 = 0, isUpperBound: Bool = false,
        rule: @escaping @Sendable (_ empty: UInt64, _ blocks: UInt64, _ tables: UInt64) -> UInt64
    ) {
        self.blockSize = blockSize
        self.tableCoverage = tableCoverage
        self.isUpperBound = isUpperBound
        self.rule = rule
    }

    /// For images in which everything is there from the beginning.
    public static let none = ImageGrowth(blockSize: 0) { empty, _, _ in empty }

    /// The bytes of all files together, which had `empty` when the image was made, once it has so many blocks, in so
    /// many tables, written in the order of the disk, and is closed. More than 2^64 are 2^64 - 1.
    public func length(empty: UInt64, blocks: UInt64, tables: UInt64) -> UInt64 { rule(empty, blocks, tables) }
}

/// A driver that can tell how large its new images will be.
public protocol MeasurableDriver: ImageDriver {
    /// How an image grows that ``ImageDriver/create(_:companions:)`` would make of this request; throws what that would
    /// throw for one that cannot be. Nothing is made.
    func growth(of request: CreateRequest, companions: any CompanionOpener) throws(DiskError) -> ImageGrowth
}

extension UInt64 {
    /// `self + count * size`, or the largest number if that does not fit: for what is only told.
    public func growing(by count: UInt64, of size: UInt64) -> UInt64 {
        let (product, overflow) = count.multipliedReportingOverflow(by: size)
        let (sum, overflow2) = addingReportingOverflow(product)
        return overflow || overflow2 ? .max : sum
    }
}

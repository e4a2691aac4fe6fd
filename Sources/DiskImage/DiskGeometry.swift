/// The CHS geometry of a disk.
public struct DiskGeometry: Sendable, Equatable {
    public var cylinders: UInt64
    public var heads: UInt64
    public var sectors: UInt64

    public init(cylinders: UInt64, heads: UInt64, sectors: UInt64) {
        self.cylinders = cylinders
        self.heads = heads
        self.sectors = sectors
    }

    /// The same heads and sectors, by which boot loaders count, for a disk of that many sectors; at most
    /// `cylinderLimit` cylinders, and at least one. A geometry that says nothing stays as it is.
    public func resized(to sectorCount: UInt64, cylinderLimit: UInt64) -> DiskGeometry {
        let (product, overflow) = heads.multipliedReportingOverflow(by: sectors)
        guard !overflow, product > 0, cylinders > 0 else { return self }
        return DiskGeometry(
            cylinders: min(max(sectorCount / product, 1), cylinderLimit), heads: heads, sectors: sectors)
    }
}

extension DiskGeometry: LosslessStringConvertible {
    /// Parses `C/H/S`.
    public init?(_ text: String) {
        let numbers = text.split(separator: "/", omittingEmptySubsequences: false).map { UInt64($0) }
        guard numbers.count == 3, let cylinders = numbers[0], let heads = numbers[1], let sectors = numbers[2] else {
            return nil
        }
        self.init(cylinders: cylinders, heads: heads, sectors: sectors)
    }

    /// `C/H/S`.
    public var description: String { "\(cylinders)/\(heads)/\(sectors)" }
}

internal import DiskPartitions
internal import DiskStorage

/// The partitions of a device and the places where its partition tables lie, in sectors of 512 bytes; for
/// partitionedDevice images.
struct VMDKPartitionTable: Sendable {
    struct Partition: Sendable, Equatable {
        /// As Linux numbers them: 1 to 4 primary and from 5 on logical ones, or the place in the GUID partition table.
        let number: Int
        let sectors: Range<UInt64>
    }

    /// In ascending order of their numbers. An extended partition, which only holds others, is not among them.
    let partitions: [Partition]
    /// What a copy of the tables consists of: ascending, disjoint, none inside a partition.
    let tableAreas: [Range<UInt64>]

    /// Sectors at the front that belong to the tables and boot loaders if no partition lies there.
    private static let frontLimit: UInt64 = 2048
    /// Sectors at the back that a copy of a table may take; what is longer is mostly something else.
    private static let backLimit: UInt64 = 4096

    /// Reads the tables of a device that is `sectorCount` sectors long. A damaged table is an error, even if it has a
    /// good copy: the image would hold both as they are.
    init(reading device: any Storage, sectorCount: UInt64) throws(DiskError) {
        let table = try PartitionTable.read(from: try StorageSource(device, size: sectorCount * 512))
        if let warning = table.warning { throw DiskError(.invalidImage, warning, image: device.name) }
        guard table.kind != .none else {
            throw DiskError(.invalidImage, "the device has no partition table", image: device.name, offset: 510)
        }
        partitions = table.partitions.map {
            Partition(number: $0.number, sectors: $0.offset / 512..<$0.range.upperBound / 512)
        }
        let areas = table.areas.map { $0.lowerBound / 512..<$0.upperBound.dividedRoundingUp(by: 512) }
        // Up to the first partition; boot loaders lie there.
        let needed = areas.first?.upperBound ?? 1
        let firstPartition = partitions.map(\.sectors.lowerBound).min() ?? needed
        tableAreas =
            [0..<max(needed, min(firstPartition, Self.frontLimit))]
            + areas.dropFirst().filter { table.kind != .gpt || $0.count <= Self.backLimit }
    }
}

internal import DiskImage
public import DiskPartitions

/// Partition tables and file systems can be looked for in a disk.
extension Disk: SectorSource {
    /// The bytes of a logical sector where the image says that they are not 512; then a loop device must be told.
    public var sectorSize: UInt32? {
        // Most formats do not say what those do that they lie over.
        current.chain.layers.first { $0.backend.sectorSize != 512 }?.backend.sectorSize
    }
}

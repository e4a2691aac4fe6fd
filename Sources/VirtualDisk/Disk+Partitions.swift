internal import DiskImage
public import DiskPartitions

/// Partition tables and file systems can be looked for in a disk.
extension Disk: SectorSource {
    /// The bytes of a logical sector where the image says that they are not 512; then a loop device must be told.
    public var sectorSize: UInt32? {
        // An overlay shows the disk of what it lies over.
        let image = chain.layers.first { $0.backend.format != "overlay" } ?? chain.layers[0]
        return image.backend.sectorSize == 512 ? nil : image.backend.sectorSize
    }
}

public import DiskPartitions

/// Partition tables and file systems can be looked for in a disk.
extension Disk: SectorSource {}

internal import DiskStorage

/// Writes QED images byte by byte, straight from the specification, so that tests can have any that a program of ours
/// would not make.
public struct QEDBuilder: Sendable {
    public var clusterSize: UInt64 = 4096
    public var tableSize: UInt64 = 1
    public var headerSize: UInt64 = 1
    public var features: UInt64 = 0
    public var compatFeatures: UInt64 = 0
    public var autoclearFeatures: UInt64 = 0
    public var imageSize: UInt64
    public var backingFilename = ""
    /// Entries of the L1 table, by index: the cluster of the file where the L2 table begins.
    public var l1: [UInt64: UInt64] = [:]
    /// L2 tables, by the cluster of the file where they begin: entries by index, in bytes.
    public var l2: [UInt64: [UInt64: UInt64]] = [:]
    /// What fills a cluster of the file.
    public var data: [UInt64: UInt8] = [:]
    /// Clusters of the file.
    public var clusterCount: UInt64

    /// A disk of that size, in a file of that many clusters.
    public init(imageSize: UInt64, clusterCount: UInt64) {
        self.imageSize = imageSize
        self.clusterCount = clusterCount
    }

    /// The file.
    public func encode() -> [UInt8] {
        var file = FieldWriter(count: Int(clusterCount * clusterSize))
        file.bytes("QED\0".utf8, at: 0)
        for (offset, value) in [(4, clusterSize), (8, tableSize), (12, headerSize)] {
            file.littleEndian(UInt32(truncatingIfNeeded: value), at: offset)
        }
        let l1Offset = headerSize * clusterSize
        for (offset, value) in [
            (16, features), (24, compatFeatures), (32, autoclearFeatures), (40, l1Offset), (48, imageSize),
        ] { file.littleEndian(value, at: offset) }
        if !backingFilename.isEmpty {
            file.littleEndian(UInt32(64), at: 56)
            file.littleEndian(UInt32(backingFilename.utf8.count), at: 60)
            file.bytes(backingFilename.utf8, at: 64)
        }
        for (index, cluster) in l1 { file.littleEndian(cluster * clusterSize, at: Int(l1Offset + index * 8)) }
        for (cluster, entries) in l2 {
            for (index, entry) in entries { file.littleEndian(entry, at: Int(cluster * clusterSize + index * 8)) }
        }
        for (cluster, value) in data {
            file.bytes(repeatElement(value, count: Int(clusterSize)), at: Int(cluster * clusterSize))
        }
        return file.bytes
    }
}

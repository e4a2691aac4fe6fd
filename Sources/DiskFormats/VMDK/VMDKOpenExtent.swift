internal import DiskImage
internal import DiskStorage

/// An extent of an open image.
struct VMDKOpenExtent: Sendable {
    /// Its translation.
    let map: VMDKExtentMap
    /// Keeps the end of its file, which the translation reads.
    var end: FileEndCell?
    /// Takes space in it; nil if it is not sparse, or not writable.
    var writer: VMDKSparseFile?
    /// Reads its grains if they are compressed.
    var compressedGrains: VMDKCompressedGrains?
    /// Whether its unclean mark was set when it was opened.
    var wasUnclean = false
    /// What is wrong with the extent as a whole, where that was no reason to refuse the image.
    var damage: String?
}

/// All that opening an image finds.
struct VMDKOpenedParts {
    var descriptor: VMDKDescriptorFile
    var extents: [VMDKOpenExtent] = []
    var storages: [StorageHandle] = []
    var files: [String]
    let tables: TableSet
}

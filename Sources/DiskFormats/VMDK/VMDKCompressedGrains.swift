internal import DiskImage
internal import DiskStorage

/// Reads the compressed grains of a streamOptimized extent.
final class VMDKCompressedGrains: Sendable {
    private let handle: StorageHandle
    private let grainSize: Int
    /// Whether each grain is preceded by a marker with its sector and size (VMware Virtual Disk Format 5.0,
    /// "Stream-Optimized Compressed Sparse Extents").
    let hasMarkers: Bool
    private let decompressed: DecompressedBlocks

    init(handle: StorageHandle, grainSize: UInt64, hasMarkers: Bool) {
        self.handle = handle
        self.grainSize = Int(grainSize)
        self.hasMarkers = hasMarkers
        decompressed = DecompressedBlocks(blockSize: grainSize)
    }

    /// Fills `buffer` with a grain's bytes from `skip` on.
    func read(at offset: UInt64, skipping skip: Int, into buffer: IOBuffer) throws(DiskError) {
        try decompressed.read(offset, skipping: skip, into: buffer) { (grain) throws(DiskError) in
            try decompress(at: offset, into: grain)
        }
    }

    /// Fills `grain` with a whole one; what decompresses to less (the last of a disk) ends in zeros.
    private func decompress(at offset: UInt64, into grain: IOBuffer) throws(DiskError) {
        let storage = handle.storage
        var dataOffset = offset
        // Deflate may grow what it cannot compress; twice the grain is more than any writer makes of it.
        var count = 2 * grainSize + 1024
        if hasMarkers {
            let head = try storage.bytes(at: offset, count: 12, for: .guestData, "a grain marker")
            let size: UInt32 = try FieldReader(head).littleEndian(at: 8)
            guard size > 0, Int(size) <= count else {
                throw DiskError(
                    .invalidImage, "the marker of a grain says that it has \(size) bytes", image: storage.name,
                    offset: offset)
            }
            dataOffset = try offset.adding(12)
            count = Int(size)
        }
        let input = try storage.availableBytes(at: dataOffset, count: count, for: .guestData)
        do throws(DiskError) {
            let found = try input.withIOBytes { (data) throws(DiskError) in try Deflate.inflateZlib(data, into: grain) }
            grain.slice(found, grain.count - found).zero()
        } catch {
            throw error.about(storage.name).at(offset)
        }
    }
}

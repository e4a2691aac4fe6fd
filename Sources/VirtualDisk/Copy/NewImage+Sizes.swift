internal import DiskStorage

extension NewImage {
    /// The size of an image that gets what a disk shows: the one that was asked for, if nothing but zeros is cut off,
    /// else the disk's. `name` is the disk's, for messages.
    func checkedSize(for disk: Disk, named name: String) throws(DiskError) -> UInt64 {
        guard let size else {
            // Most formats count in sectors.
            return format?.lowercased() == "raw" ? disk.size : Self.wholeSectors(disk.size)
        }
        if size < disk.size, let data = try Self.firstNonzero(of: disk, from: size) {
            throw DiskError(
                .invalidArgument,
                "the disk has \(disk.size) bytes, and there is data at or behind byte \(data): "
                    + "it does not fit into \(size) bytes", image: name)
        }
        return size
    }

    /// The first byte from `offset` on that is not zero, within a sector; nil if there is none.
    private static func firstNonzero(of disk: Disk, from offset: UInt64) throws(DiskError) -> UInt64? {
        var position = offset
        while let data = try disk.nextData(from: position) {
            let count = Int(min(1 << 20, disk.size - data))
            let bytes = try disk.read(at: data, count: count)
            if let index = bytes.firstIndex(where: { $0 != 0 }) { return data + UInt64(index) }
            position = data + UInt64(count)
            if position >= disk.size { break }
        }
        return nil
    }
}

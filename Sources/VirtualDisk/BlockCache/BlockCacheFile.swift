internal import DiskFormats
public import DiskImage
public import DiskStorage

/// Makes, describes, checks and empties the files of block caches, which belong to no mount for that time.
public enum BlockCacheFile {
    /// Makes a cache of `size` bytes at a place where nothing is yet. `isFixed`: all its space is taken at once.
    public static func create(_ path: String, size: UInt64, isFixed: Bool = false) throws(DiskError) {
        let finder = FileFinder()
        do throws(DiskError) {
            let layout = try VCILayout(bytes: size)
            let storage = try finder.create(path)
            try VCIFile.makeEmpty(storage, layout, type: isFixed ? .fixed : .dynamic)
        } catch {
            finder.removeCreated()
            throw error.about(path)
        }
    }

    /// Takes everything out of a cache; a file that is damaged is made anew.
    public static func drop(_ path: String) throws(DiskError) {
        do throws(DiskError) {
            let storage = try FileFinder(locks: true).open(path, isWritable: true).storage
            let file = try CacheFile(storage, path: path)
            guard file.isThere else { throw notACache }
            try VCIFile.makeEmpty(storage, file.layout(size: nil), type: file.header?.type ?? .dynamic)
        } catch {
            throw error.about(path)
        }
    }

    private static var notACache: DiskError { DiskError(.invalidImage, "is no block cache (VCI)") }

    /// What a cache's file says of itself; also of one that is in use.
    public static func information(_ path: String) throws(DiskError) -> BlockCacheInformation {
        do throws(DiskError) {
            let storage = try FileFinder().open(path, isWritable: false).storage
            let header = try header(storage)
            let contents = header.isUnclean ? nil : try? VCIContents(storage, header)
            return BlockCacheInformation(
                path: path, size: header.size.multipliedReportingOverflow(by: VCILayout.blockSize).partialValue,
                fileLength: try storage.length(), allocatedBytes: try storage.allocatedBytes(),
                isFixed: header.type == .fixed, isUnclean: header.isUnclean,
                imageUUID: header.imageUUID.isNull ? nil : header.imageUUID,
                modificationUUID: header.modificationUUID.isNull ? nil : header.modificationUUID,
                contents: contents.map {
                    BlockCacheInformation.Contents(
                        cachedBytes: $0.map.data * VCILayout.blockSize,
                        metadataBytes: $0.map.metadata * VCILayout.blockSize,
                        freeBytes: $0.map.free * VCILayout.blockSize, extents: $0.extents.count,
                        treeNodes: $0.nodeCount, treeLevels: $0.depth)
                })
        } catch {
            throw error.about(path)
        }
    }

    private static func header(_ storage: any Storage) throws(DiskError) -> VCIHeader {
        let bytes = try storage.availableBytes(at: 0, count: VCIHeader.byteCount, for: .header)
        guard VCIHeader.hasSignature(bytes) else { throw notACache }
        return try VCIHeader(parsing: bytes)
    }

    /// Looks for damage. A cache with any is emptied when it is used, which is why all of it is repairable.
    public static func check(_ path: String) throws(DiskError) -> CheckReport {
        var report = CheckReport()
        do throws(DiskError) {
            let storage = try FileFinder(locks: true).open(path, isWritable: false).storage
            let bytes = try storage.availableBytes(at: 0, count: VCIHeader.byteCount, for: .header)
            guard VCIHeader.hasSignature(bytes) else { throw notACache }
            do throws(DiskError) {
                let header = try VCIHeader(parsing: bytes)
                report.totalBlocks = header.size
                if header.isUnclean {
                    report.add(.init(.repairable, file: path, "was not closed cleanly: it is emptied when it is used"))
                    return report
                }
                let contents = try VCIContents(storage, header)
                report.allocatedBlocks = contents.map.data + contents.map.metadata
            } catch {
                guard error.kind == .invalidImage || error.kind == .unsupported else { throw error }
                let place = error.offset.map { " (at byte \($0))" } ?? ""
                report.add(.init(.repairable, file: path, "\(error.message)\(place): it is emptied when it is used"))
            }
            return report
        } catch {
            throw error.about(path)
        }
    }
}

/// What a block cache's file says of itself.
public struct BlockCacheInformation: Sendable {
    /// What it holds, as far as its metadata is in order.
    public struct Contents: Sendable {
        public let cachedBytes: UInt64
        public let metadataBytes: UInt64
        public let freeBytes: UInt64
        public let extents: Int
        public let treeNodes: Int
        public let treeLevels: Int
    }

    public let path: String
    /// Bytes that the file has, or may grow to.
    public let size: UInt64
    public let fileLength: UInt64
    /// Bytes of the medium that it occupies.
    public let allocatedBytes: UInt64
    /// Whether all its space was taken when it was made.
    public let isFixed: Bool
    /// Whether it is in use, or was not closed cleanly.
    public let isUnclean: Bool
    /// The UUID of the cached image, or one made for it; nil: it belongs to none.
    public let imageUUID: DiskUUID?
    /// The state of the cached images.
    public let modificationUUID: DiskUUID?
    /// Nil: it is in use, or damaged.
    public let contents: Contents?
}

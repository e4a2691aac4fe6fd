import DiskPartitions
import DiskStorage
import FuseHost
import Glibc
import VirtualDisk

/// The disk, or a partition of it, as a file.
final class DiskFile: ExposedFile, @unchecked Sendable {  // constant references to Sendable objects
    private let disk: Disk
    /// Where its first byte lies in the disk.
    private let start: UInt64
    private let views: DiskViews
    private let report: @Sendable (String, DiskError) -> Void
    /// Which part of the disk it shows: nil is all of it.
    let partition: Partition?

    /// `report` is told of each request that failed. A partition's file is part of `whole`, the disk's.
    init(
        _ disk: Disk, partition: Partition? = nil, of whole: DiskFile? = nil, views: DiskViews, mode: UInt32,
        owner: UInt32, group: UInt32,
        report: @escaping @Sendable (String, DiskError) -> Void
    ) {
        self.disk = disk
        self.partition = partition
        self.views = views
        self.report = report
        start = partition?.offset ?? 0
        super.init(
            name: partition.map { "part\($0.number).raw" } ?? "disk.raw", size: partition?.length ?? disk.size,
            isWritable: disk.isWritable, mode: mode, owner: owner, group: group, modified: disk.modificationTime,
            partOf: whole)
    }

    override func opened(forWriting: Bool) -> OpenResult {
        views.opened(self, forWriting: forWriting)
    }

    override func closed(forWriting: Bool) { views.closed(self, forWriting: forWriting) }

    override func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) -> Int32 {
        guard let memory = buffer.baseAddress else { return 0 }
        do throws(DiskError) {
            unsafe try disk.read(into: IOBuffer(start: memory, count: buffer.count), at: start + offset)
            return 0
        } catch {
            return failed("reading \(buffer.count) bytes at \(offset)", error)
        }
    }

    override func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) -> Int32 {
        guard let memory = buffer.baseAddress else { return 0 }
        do throws(DiskError) {
            unsafe try disk.write(IOBytes(start: memory, count: buffer.count), at: start + offset)
            views.wrote(offset: offset, count: buffer.count, to: self)
            return 0
        } catch {
            return failed("writing \(buffer.count) bytes at \(offset)", error)
        }
    }

    override func flush() -> Int32 {
        do throws(DiskError) {
            try disk.flush()
            views.flushed(self)
            return 0
        } catch {
            return failed("flushing", error)
        }
    }

    override func discard(offset: UInt64, length: UInt64) -> Int32 {
        do throws(DiskError) {
            try disk.discard(offset: start + offset, length: length)
            views.wrote(offset: offset, count: Int(clamping: length), to: self)
            return 0
        } catch {
            return failed("discarding \(length) bytes at \(offset)", error)
        }
    }

    override func zero(offset: UInt64, length: UInt64) -> Int32 { discard(offset: offset, length: length) }

    override func seek(from offset: UInt64, data: Bool) -> SeekResult {
        do throws(DiskError) {
            if !data { return .found(min(try disk.nextHole(from: start + offset) - start, size)) }
            guard let found = try disk.nextData(from: start + offset), found - start < size else {
                return .failed(ENXIO)
            }
            return .found(found - start)
        } catch {
            return .failed(failed("looking for data at \(offset)", error))
        }
    }

    /// Of a partition not known better than of the whole disk.
    override var allocatedBytes: UInt64 { min((try? disk.allocatedBytes()) ?? size, size) }

    private func failed(_ doing: String, _ error: DiskError) -> Int32 {
        report(partition == nil ? doing : "\(name): \(doing)", error)
        return error.errnoValue
    }
}

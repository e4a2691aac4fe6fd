import DiskStorage
import FuseHost
import Glibc
import VirtualDisk

/// `disk.raw`: the whole disk as a file.
final class DiskFile: ExposedFile, @unchecked Sendable {  // a constant reference to a Sendable disk
    private let disk: Disk
    private let report: @Sendable (String, DiskError) -> Void

    /// `report` is told of each request that failed.
    init(
        _ disk: Disk, mode: UInt32, owner: UInt32, group: UInt32,
        report: @escaping @Sendable (String, DiskError) -> Void
    ) {
        self.disk = disk
        self.report = report
        super.init(
            name: "disk.raw", size: disk.size, isWritable: disk.isWritable, mode: mode, owner: owner, group: group,
            modified: disk.modificationTime)
    }

    override func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) -> Int32 {
        guard let start = buffer.baseAddress else { return 0 }
        do throws(DiskError) {
            unsafe try disk.read(into: IOBuffer(start: start, count: buffer.count), at: offset)
            return 0
        } catch {
            return failed("reading \(buffer.count) bytes at \(offset)", error)
        }
    }

    override func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) -> Int32 {
        guard let start = buffer.baseAddress else { return 0 }
        do throws(DiskError) {
            unsafe try disk.write(IOBytes(start: start, count: buffer.count), at: offset)
            return 0
        } catch {
            return failed("writing \(buffer.count) bytes at \(offset)", error)
        }
    }

    override func flush() -> Int32 {
        do throws(DiskError) {
            try disk.flush()
            return 0
        } catch {
            return failed("flushing", error)
        }
    }

    override func discard(offset: UInt64, length: UInt64) -> Int32 {
        do throws(DiskError) {
            try disk.discard(offset: offset, length: length)
            return 0
        } catch {
            return failed("discarding \(length) bytes at \(offset)", error)
        }
    }

    override func zero(offset: UInt64, length: UInt64) -> Int32 { discard(offset: offset, length: length) }

    override func seek(from offset: UInt64, data: Bool) -> SeekResult {
        do throws(DiskError) {
            if !data { return .found(try disk.nextHole(from: offset)) }
            guard let found = try disk.nextData(from: offset) else { return .failed(ENXIO) }
            return .found(found)
        } catch {
            return .failed(failed("looking for data at \(offset)", error))
        }
    }

    override var allocatedBytes: UInt64 { min((try? disk.allocatedBytes()) ?? size, size) }

    private func failed(_ doing: String, _ error: DiskError) -> Int32 {
        report(doing, error)
        return error.errnoValue
    }
}

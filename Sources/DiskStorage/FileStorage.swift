internal import CLinux
internal import Glibc

/// A regular file or a block device.
public final class FileStorage: Storage {
    public let traits: StorageTraits
    public let name: String
    /// Device and inode number: what "the same file" means. Another one after ``replaceContents(with:for:)``.
    public var identity: FileIdentity { currentIdentity.withLock { $0 } }
    let currentIdentity: Locked<FileIdentity>
    public var fileIdentity: FileIdentity? { identity }
    let descriptor: Int32
    /// The locks of ``lockImage(isShared:takingOverFrom:)`` that it has.
    let imageLock = Locked(HeldImageLock())
    /// Whether it ends with this process anyway.
    let isTemporary: Bool
    /// Who replaces the file, where this process cannot.
    let replacer: (any FileReplacer)?
    /// The device's size; 0 for a file.
    private let deviceLength: UInt64

    /// Takes over `descriptor`, which must be a regular file or a block device, and closes it in the end.
    public init(
        adopting descriptor: Int32, name: String, isWritable: Bool, isTemporary: Bool = false,
        replacer: (any FileReplacer)? = nil
    ) throws(DiskError) {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0 else {
            let error = clinux_errno()
            close(descriptor)
            throw .system(error, "examine the file", image: name)
        }
        let isDevice = status.st_mode & S_IFMT == S_IFBLK
        guard isDevice || status.st_mode & S_IFMT == S_IFREG else {
            close(descriptor)
            throw DiskError(.refused, "is neither a regular file nor a block device", image: name)
        }
        var bytes: UInt64 = 0
        if isDevice {
            let result = unsafe clinux_device_size(descriptor, &bytes)
            guard result >= 0 else {
                close(descriptor)
                throw .system(result, "ask for the device's size", image: name)
            }
        }
        self.descriptor = descriptor
        self.name = name
        self.isTemporary = isTemporary
        self.replacer = replacer
        deviceLength = bytes
        currentIdentity = Locked(FileIdentity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino)))
        traits = StorageTraits(
            descriptor: descriptor, isWritable: isWritable, canDiscard: isWritable, hasFixedLength: isDevice)
    }

    /// Opens a path.
    public convenience init(path: String, isWritable: Bool) throws(DiskError) {
        let descriptor = unsafe clinux_open(path, isWritable ? O_RDWR : O_RDONLY, 0)
        guard descriptor >= 0 else { throw .system(descriptor, "open the file", image: path) }
        try self.init(adopting: descriptor, name: path, isWritable: isWritable)
    }

    /// Creates a file that must not exist yet.
    public convenience init(creating path: String, mode: UInt32 = 0o644) throws(DiskError) {
        let descriptor = unsafe clinux_open(path, O_RDWR | O_CREAT | O_EXCL, mode)
        guard descriptor >= 0 else { throw .system(descriptor, "create the file", image: path) }
        try self.init(adopting: descriptor, name: path, isWritable: true)
    }

    /// Creates a file without a name in a folder: it is gone when it is closed. Nothing of it need survive, so that
    /// ``flush()`` does nothing.
    public convenience init(temporaryIn folder: String, name: String? = nil) throws(DiskError) {
        var descriptor = unsafe clinux_open(folder, O_RDWR | Int32(clinux_O_TMPFILE), 0o600)
        if [EOPNOTSUPP, EISDIR, ENOENT].contains(-descriptor) {
            // A file system without such files (NFS): one with a name, which goes at once.
            descriptor = unsafe clinux_temporary(folder)
        }
        guard descriptor >= 0 else { throw .system(descriptor, "create a temporary file", image: folder) }
        try self.init(
            adopting: descriptor, name: name ?? "temporary file in \(folder)", isWritable: true, isTemporary: true)
    }

    deinit {
        unlockImage()
        close(descriptor)
    }

    public func length() throws(DiskError) -> UInt64 {
        if traits.hasFixedLength { return deviceLength }
        return UInt64(try status().st_size)
    }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        do throws(DiskError) {
            return try Self.read(descriptor, into: buffer, at: offset)
        } catch {
            throw error.about(name)
        }
    }

    public func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        do throws(DiskError) { try Self.write(descriptor, bytes, at: offset) } catch { throw error.about(name) }
    }

    /// pread(2) until the buffer is full or the file ends.
    public static func read(_ descriptor: Int32, into buffer: IOBuffer, at offset: UInt64) throws(DiskError) -> Int {
        guard let start = off_t(exactly: offset) else { return 0 }
        var done = 0
        while done < buffer.count {
            let result = unsafe pread(descriptor, buffer.pointer + done, buffer.count - done, start &+ done)
            if result > 0 {
                done += result
            } else if result == 0 {
                break
            } else if clinux_errno() != EINTR {
                throw .system(clinux_errno(), "read \(buffer.count) bytes", offset: offset)
            }
        }
        return done
    }

    /// Bytes that one pwrite(2) is given at most.
    ///
    /// A file system with large folios makes those of its page cache as large as the writes that fill it, and on some
    /// (ext4 in Linux 6.18) each small write to such a folio goes through all its blocks: random writes of 4 KiB to
    /// what was filled by 1 MiB are five times as slow as to what was filled by this. The additional calls cost a few
    /// hundredths of the time that the copying takes.
    private static let writePiece = 32 << 10

    /// pwrite(2) until all is written.
    public static func write(_ descriptor: Int32, _ bytes: IOBytes, at offset: UInt64) throws(DiskError) {
        guard let start = off_t(exactly: offset) else {
            throw .system(EFBIG, "write \(bytes.count) bytes", offset: offset)
        }
        var done = 0
        while done < bytes.count {
            let result = unsafe pwrite(
                descriptor, bytes.pointer + done, min(bytes.count - done, writePiece), start &+ done)
            if result > 0 {
                done += result
            } else if result == 0 || clinux_errno() != EINTR {
                throw .system(result == 0 ? EIO : clinux_errno(), "write \(bytes.count) bytes", offset: offset)
            }
        }
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        guard !range.isEmpty else { return }
        let offset = Int64(clamping: range.lowerBound)
        let length = Int64(clamping: range.upperBound) - offset
        if traits.hasFixedLength {
            if mustZero {
                let result = clinux_device_zero(descriptor, range.lowerBound, UInt64(length))
                if result < 0 { try writeZeros(range, for: purpose) }
            } else {
                _ = clinux_device_discard(descriptor, range.lowerBound, UInt64(length))
            }
            return
        }
        let result = clinux_punch_hole(descriptor, offset, length)
        switch -result {
        case ...0: break
        case EOPNOTSUPP, ENOSYS, ENODEV, EINVAL: if mustZero { try writeZeros(range, for: purpose) }
        default: throw .system(result, "give back \(length) bytes", image: name, offset: range.lowerBound)
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        guard !traits.hasFixedLength else {
            if length > deviceLength {
                throw .system(ENOSPC, "grow a device to \(length) bytes", image: name)
            }
            return
        }
        guard let size = off_t(exactly: length) else { throw .system(EFBIG, "grow to \(length) bytes", image: name) }
        guard ftruncate(descriptor, size) == 0 else {
            throw .system(clinux_errno(), "set the length to \(length) bytes", image: name)
        }
    }

    public func allocate(_ length: UInt64) throws(DiskError) {
        guard let size = Int64(exactly: length) else { throw .system(EFBIG, "grow to \(length) bytes", image: name) }
        guard length > 0 else { return }
        let result = clinux_allocate(descriptor, 0, size)
        switch -result {
        case ...0: break
        case EOPNOTSUPP, ENOSYS: try writeZeros(0..<length, for: .guestData)
        default: throw .system(result, "take \(length) bytes of space", image: name)
        }
    }

    public func flush() throws(DiskError) {
        if isTemporary { return }
        while fdatasync(descriptor) != 0 {
            let error = clinux_errno()
            if error == EINVAL || error == EROFS { return }  // nothing to be made stable there
            if error != EINTR { throw .system(error, "flush", image: name) }
        }
    }

    public func startWriteback() {
        if !isTemporary { clinux_start_writeback(descriptor) }
    }

    public func allocatedBytes() throws(DiskError) -> UInt64 {
        if traits.hasFixedLength { return deviceLength }
        return UInt64(try status().st_blocks) * 512
    }

    public func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? {
        let end = try length()
        guard offset < end, let from = off_t(exactly: offset) else { return nil }
        let data = lseek(descriptor, from, Int32(clinux_SEEK_DATA))
        guard data >= 0 else { return clinux_errno() == ENXIO ? nil : offset..<end }
        let hole = lseek(descriptor, data, Int32(clinux_SEEK_HOLE))
        guard hole > data else { return UInt64(data)..<max(end, UInt64(data) + 1) }
        return UInt64(data)..<UInt64(hole)
    }

    /// When the content was last changed, in nanoseconds since 1970.
    public func modificationTime() throws(DiskError) -> Int64 {
        let time = try status().st_mtim
        return Int64(time.tv_sec) &* 1_000_000_000 &+ Int64(time.tv_nsec)
    }

    /// Says that it will be read from its beginning to its end.
    public func expectSequentialReads() { _ = posix_fadvise(descriptor, 0, 0, Int32(POSIX_FADV_SEQUENTIAL)) }

    /// Takes a shared lock of one byte for as long as the file is open; 0 or -errno.
    func lockByte(_ offset: Int64) -> Int32 { clinux_ofd_lock(descriptor, offset, 1, false) }

    /// Whether another opener has that byte locked.
    func isLockedByOther(_ offset: Int64) -> Bool { clinux_ofd_is_locked(descriptor, offset, 1) == 1 }

    private func status() throws(DiskError) -> stat {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0 else {
            throw .system(clinux_errno(), "examine the file", image: name)
        }
        return status
    }
}

/// What tells two files apart, whatever they are called.
public struct FileIdentity: Hashable, Sendable {
    public let device: UInt64
    public let inode: UInt64

    public init(device: UInt64, inode: UInt64) {
        self.device = device
        self.inode = inode
    }
}

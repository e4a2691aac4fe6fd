internal import FuseShim
import Glibc

// The functions that the C shim calls for each request, on any lane. `host` is the file tree, `handle` the address of
// an exposed file; the mount session keeps both alive until the last lane has ended, so no reference is counted here.

/// The table for ``fuseshim_session_new``.
func fileOperations() -> fuseshim_operations {
    unsafe fuseshim_operations(
        lookup: onLookup, attributes: onAttributes, change: onChange, open: onOpen, read: onRead, write: onWrite,
        closed: onClosed, flush: onFlush, sync: onSync, range: onRange, seek: onSeek, entry: onEntry,
        statistics: onStatistics)
}

/// Runs a body with the file of a handle, without counting a reference.
@inline(__always)
private func withFile(_ handle: UInt64, _ body: (ExposedFile) -> Int32) -> Int32 {
    // The handle is the address that onOpen answered with.
    guard let address = unsafe UnsafeRawPointer(bitPattern: UInt(handle)) else { return EBADF }
    return unsafe Unmanaged<ExposedFile>.fromOpaque(address)._withUnsafeGuaranteedRef(body)
}

@inline(__always)
private func withTree(_ host: UnsafeMutableRawPointer?, _ body: (FileTree) -> Int32) -> Int32 {
    guard let host = unsafe host else { return EIO }
    return unsafe Unmanaged<FileTree>.fromOpaque(host)._withUnsafeGuaranteedRef(body)
}

// MARK: Hot path

@c private func onRead(
    _ handle: UInt64, _ buffer: UnsafeMutableRawPointer?, _ size: Int, _ offset: UInt64,
    _ done: UnsafeMutablePointer<Int>?
) -> Int32 {
    withFile(handle) { file in
        guard offset < file.size else { return 0 }
        let count = min(size, Int(clamping: file.size - offset))
        // The lane's buffer holds `size` bytes or more.
        let failure = unsafe file.read(into: UnsafeMutableRawBufferPointer(start: buffer, count: count), at: offset)
        if failure == 0 {
            unsafe done?.pointee = count
            unsafe file.readBytes.add(count, buffer)
        }
        return failure
    }
}

@c private func onWrite(
    _ handle: UInt64, _ data: UnsafeRawPointer?, _ size: Int, _ offset: UInt64, _ flags: Int32,
    _ done: UnsafeMutablePointer<Int>?
) -> Int32 {
    withFile(handle) { file in
        guard file.isWritable else { return EROFS }
        // As on a disk: what begins at the end finds no space, what reaches over it is cut.
        guard offset < file.size else { return size == 0 ? 0 : ENOSPC }
        let count = min(size, Int(clamping: file.size - offset))
        // The request's data lies in the lane's buffer until this returns.
        var failure = unsafe file.write(UnsafeRawBufferPointer(start: data, count: count), at: offset)
        if failure == 0, flags & O_DSYNC != 0 { failure = file.flush() }
        if failure == 0 {
            unsafe done?.pointee = count
            unsafe file.writtenBytes.add(count, data)
        }
        file.noteWrite()
        return failure
    }
}

// MARK: Open files

@c private func onOpen(
    _ host: UnsafeMutableRawPointer?, _ inode: UInt64, _ flags: Int32, _ answer: UnsafeMutablePointer<fuseshim_opened>?
) -> Int32 {
    unsafe withTree(host) { tree in
        guard let file = tree.file(inode: inode) else { return ENOENT }
        let writes = flags & O_ACCMODE != O_RDONLY
        if writes && !file.isWritable { return EROFS }
        let keepsCache: Bool
        switch file.opened(forWriting: writes) {
        case .opened(let keeps): keepsCache = keeps
        case .refused(let failure): return failure
        }
        let opened = fuseshim_opened(
            handle: UInt64(UInt(bitPattern: unsafe Unmanaged.passUnretained(file).toOpaque())),
            keep_cache: keepsCache,
            direct: !file.isStable || flags & directFlag != 0,
            parallel_writes: true,
            no_flush_on_close: !writes)
        unsafe answer?.pointee = opened
        return 0
    }
}

/// O_DIRECT, which Glibc's module lacks: its value is the architecture's.
#if arch(arm64) || arch(arm)
private let directFlag: Int32 = 0x10000
#else
private let directFlag: Int32 = 0x4000
#endif

@c private func onClosed(_ handle: UInt64, _ flags: Int32) {
    _ = withFile(handle) { file in
        file.closed(forWriting: flags & O_ACCMODE != O_RDONLY)
        return 0
    }
}

@c private func onFlush(_ handle: UInt64) -> Int32 {
    withFile(handle) { $0.isWritable ? $0.flush() : 0 }
}

@c private func onSync(_ handle: UInt64) -> Int32 {
    withFile(handle) { $0.flush() }
}

@c private func onRange(
    _ handle: UInt64, _ operation: fuseshim_range_operation, _ offset: UInt64, _ length: UInt64, _ keepSize: Bool
) -> Int32 {
    withFile(handle) { file in
        guard file.isWritable else { return EROFS }
        // The rule of block devices: a range that ends behind the end is cut if the size may stay, else refused.
        guard offset < file.size else { return EINVAL }
        guard length <= file.size - offset || keepSize else { return EINVAL }
        let length = min(length, file.size - offset)
        defer { file.noteWrite() }
        switch operation {
        case FUSESHIM_DISCARD: return file.discard(offset: offset, length: length)
        case FUSESHIM_ZERO: return file.zero(offset: offset, length: length)
        default: return file.allocate(offset: offset, length: length)
        }
    }
}

@c private func onSeek(
    _ handle: UInt64, _ offset: UInt64, _ data: Bool, _ found: UnsafeMutablePointer<UInt64>?
) -> Int32 {
    withFile(handle) { file in
        guard offset < file.size else { return ENXIO }
        switch file.seek(from: offset, data: data) {
        case .found(let position):
            unsafe found?.pointee = position
            return 0
        case .failed(let failure): return failure
        }
    }
}

// MARK: Names and attributes

@c private func onLookup(
    _ host: UnsafeMutableRawPointer?, _ parent: UInt64, _ name: UnsafePointer<CChar>?,
    _ found: UnsafeMutablePointer<fuseshim_attributes>?
) -> Int32 {
    unsafe withTree(host) { tree in
        guard parent == UInt64(FUSESHIM_ROOT), let name = unsafe name, let found = unsafe found,
            let inode = unsafe tree.inode(named: name)
        else { return ENOENT }
        return unsafe tree.describe(inode: inode, into: &found.pointee) ? 0 : ENOENT
    }
}

@c private func onAttributes(
    _ host: UnsafeMutableRawPointer?, _ inode: UInt64, _ answer: UnsafeMutablePointer<fuseshim_attributes>?
) -> Int32 {
    unsafe withTree(host) { tree in
        guard let answer = unsafe answer else { return EIO }
        return unsafe tree.describe(inode: inode, into: &answer.pointee) ? 0 : ENOENT
    }
}

/// The size is fixed and so are mode and owner; times are taken note of silently. A change to size 0 by path is what
/// open(2) with O_TRUNC looks like: it is granted and does nothing, as on a block device.
@c private func onChange(
    _ host: UnsafeMutableRawPointer?, _ inode: UInt64, _ change: UnsafePointer<fuseshim_change>?,
    _ answer: UnsafeMutablePointer<fuseshim_attributes>?
) -> Int32 {
    unsafe withTree(host) { tree in
        guard let change = unsafe change?.pointee, let answer = unsafe answer else { return EIO }
        if change.sets_other { return EPERM }
        if change.sets_size {
            guard let file = tree.file(inode: inode) else { return EISDIR }
            guard file.isWritable else { return EROFS }
            let openTruncate = change.size == 0 && !change.through_handle
            guard openTruncate || change.size == file.size else { return EPERM }
        }
        return unsafe tree.describe(inode: inode, into: &answer.pointee) ? 0 : ENOENT
    }
}

@c private func onEntry(
    _ host: UnsafeMutableRawPointer?, _ position: UInt64, _ name: UnsafeMutablePointer<UnsafePointer<CChar>?>?,
    _ inode: UnsafeMutablePointer<UInt64>?, _ mode: UnsafeMutablePointer<UInt32>?
) -> Int32 {
    unsafe withTree(host) { tree in
        guard let entry = unsafe tree.entry(at: position) else { return ENOENT }
        unsafe name?.pointee = entry.name
        unsafe inode?.pointee = entry.inode
        unsafe mode?.pointee = UInt32(S_IFREG)
        return 0
    }
}

@c private func onStatistics(
    _ host: UnsafeMutableRawPointer?, _ answer: UnsafeMutablePointer<fuseshim_statistics>?
) -> Int32 {
    unsafe withTree(host) { tree in
        guard let file = tree.first, let answer = unsafe answer else { return EIO }
        // The first file is the disk; the others show parts of it.
        let free = file.size - min(file.size, file.allocatedBytes)
        unsafe answer.pointee = fuseshim_statistics(
            total_bytes: file.size, free_bytes: free, files: UInt64(tree.count))
        return 0
    }
}

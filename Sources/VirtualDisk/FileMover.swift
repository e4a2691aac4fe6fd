internal import CLinux
internal import DiskStorage
internal import Glibc
internal import SystemPackage

/// Gives files other names, without ever overwriting one.
enum FileMover {
    static func exists(_ path: String) throws(DiskError) -> Bool { try status(path) != nil }

    /// The device that a path is on.
    static func device(_ path: String) throws(DiskError) -> UInt64 { try status(path)?.device ?? 0 }

    /// Whether both names are of one file.
    static func isSame(_ path: String, _ other: String) throws(DiskError) -> Bool {
        guard let a = try status(path), let b = try status(other) else { return false }
        return a == b
    }

    private static func status(_ path: String) throws(DiskError) -> FileIdentity? {
        var status = stat()
        guard unsafe lstat(path, &status) == 0 else {
            let error = clinux_errno()
            if [ENOENT, ENOTDIR].contains(error) { return nil }
            throw .system(error, "examine the file", image: path)
        }
        return FileIdentity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
    }

    /// Throws unless a regular file is there.
    static func expectFile(_ path: String) throws(DiskError) {
        var status = stat()
        guard unsafe lstat(path, &status) == 0 else {
            throw DiskError(.notFound, "this file of the image is missing", image: path)
        }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw DiskError(.refused, "this file of the image is no regular file: not renamed", image: path)
        }
    }

    /// Renames in one step; false where that cannot be done there.
    static func renameWithoutReplacing(_ path: String, _ newPath: String) throws(DiskError) -> Bool {
        switch unsafe -clinux_rename_new(path, newPath) {
        case 0:
            try flushFolder(FileFinder.folder(of: newPath))
            return true
        case EXDEV: return false
        case EINVAL, ENOSYS:
            // A file system without that: with a link, which does not overwrite either.
            guard unsafe link(path, newPath) == 0 else {
                if [EPERM, EOPNOTSUPP, EMLINK].contains(clinux_errno()) { return false }
                throw .system(clinux_errno(), "rename the file to \(newPath)", image: path)
            }
            guard unsafe unlink(path) == 0 else { throw .system(clinux_errno(), "remove the file", image: path) }
            try flushFolder(FileFinder.folder(of: newPath))
            return true
        case let error: throw .system(error, "rename the file to \(newPath)", image: path)
        }
    }

    /// Has a file be there under another name too: by a hard link, or as a durable copy.
    static func place(_ path: String, at newPath: String, _ control: OperationControl) throws(DiskError) {
        if unsafe link(path, newPath) == 0 { return }
        let error = clinux_errno()
        guard [EXDEV, EPERM, EOPNOTSUPP, EMLINK].contains(error) else {
            throw .system(error, "give the file the name \(newPath)", image: path)
        }
        let source = try FileStorage(path: path, isWritable: false)
        try make(newPath, like: source) { (target) throws(DiskError) in try copy(source, to: target, control) }
    }

    /// Creates a file that holds `bytes`, durably and in one step.
    static func create(_ path: String, _ bytes: [UInt8], like other: String) throws(DiskError) {
        try make(path, like: try FileStorage(path: other, isWritable: false)) { (target) throws(DiskError) in
            try target.write(bytes, at: 0, for: .descriptor)
        }
    }

    /// Creates a file under another name, has it filled, and then gives it its own.
    private static func make(
        _ path: String, like other: FileStorage, _ fill: (FileStorage) throws(DiskError) -> Void
    ) throws(DiskError) {
        let folder = FileFinder.folder(of: path)
        let temporary = "\(folder)/.\((FilePath(path).lastComponent?.string ?? "").prefix(200)).vdmount-new"
        unsafe unlink(temporary)  // one that a crash has left
        let target = try FileStorage(creating: temporary, mode: 0o600)
        do throws(DiskError) {
            try fill(target)
            target.copyAttributes(of: other)
            try target.flush()
            guard try renameWithoutReplacing(temporary, path) else {
                throw .system(EXDEV, "give the new file its name", image: path)
            }
        } catch {
            unsafe unlink(temporary)
            throw error
        }
    }

    private static func copy(
        _ source: FileStorage, to target: FileStorage, _ control: OperationControl
    ) throws(DiskError) {
        let length = try source.length()
        try target.setLength(length)
        let done = control.progress.done
        let transfer = RangeTransfer(from: source, to: target)
        var position: UInt64 = 0
        while let data = try source.nextData(from: position) {
            var offset = data.lowerBound
            while offset < min(data.upperBound, length) {
                try control.checkCancelled()
                let count = min(4 << 20, min(data.upperBound, length) - offset)
                let isShared = try transfer?.transfer(from: offset, to: offset, length: count) ?? false
                if !isShared {
                    let bytes = try source.availableBytes(at: offset, count: Int(count), for: .guestData)
                    try target.write(bytes, at: offset, for: .guestData)
                }
                offset += count
                control.advance(to: done + offset)
            }
            position = max(offset, data.upperBound)
            if position >= length { break }
        }
        control.advance(to: done + length)
    }

    static func remove(_ path: String) throws(DiskError) {
        guard unsafe unlink(path) == 0 || clinux_errno() == ENOENT else {
            throw .system(clinux_errno(), "remove the file", image: path)
        }
    }

    /// Makes names durable.
    static func flushFolder(_ path: String) throws(DiskError) {
        let descriptor = unsafe clinux_open(path, O_RDONLY | O_DIRECTORY, 0)
        guard descriptor >= 0 else { return }
        defer { close(descriptor) }
        guard fsync(descriptor) == 0 || clinux_errno() == EINVAL else {
            throw .system(clinux_errno(), "make the names of files durable", image: path)
        }
    }
}

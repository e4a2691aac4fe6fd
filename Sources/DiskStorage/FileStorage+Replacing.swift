internal import CLinux
internal import Glibc

extension FileStorage {
    /// Writes a new file beside this one, and gives it this one's name with rename(2), which leaves one or the other
    /// there whenever a machine stops. The descriptor stays the same number; the image lock, if it is held, is held on
    /// the new file before anybody can find it.
    ///
    /// Owner, mode and extended attributes stay. Where the folder cannot be written, or the file has no name any more,
    /// the bytes are written over the old ones.
    public func replaceContents(with bytes: [UInt8], for purpose: StoragePurpose) throws(DiskError) {
        if let replacer, replacer.isInCharge { return try replace(by: replacer, bytes, purpose) }
        guard !traits.hasFixedLength, !isTemporary, let path = currentPath() else {
            return try overwrite(bytes, purpose)
        }
        let slash = path.lastIndex(of: "/") ?? path.startIndex
        let folder = String(path[..<slash])
        let newPath = "\(folder)/.\(path[path.index(after: slash)...].prefix(200)).vdmount-new"
        let folderDescriptor = unsafe clinux_open(folder.isEmpty ? "/" : folder, O_RDONLY | O_DIRECTORY, 0)
        guard folderDescriptor >= 0 else { return try overwrite(bytes, purpose) }
        defer { close(folderDescriptor) }
        // One that a crash has left: whoever writes such a file has this one locked.
        unsafe unlink(newPath)
        let replacement: FileStorage
        do throws(DiskError) {
            replacement = try FileStorage(creating: newPath, mode: 0o600)
        } catch {
            guard [EACCES, EPERM, EROFS, ENAMETOOLONG].contains(error.errno) else { throw error.about(name) }
            return try overwrite(bytes, purpose)
        }
        do throws(DiskError) {
            try replacement.write(bytes, at: 0, for: purpose)
            clinux_copy_attributes(descriptor, replacement.descriptor)
            try replacement.flush()
            fsync(folderDescriptor)  // other files that were made for the new content
            if imageLock.withLock({ $0.isHeld }) { try replacement.lockImage() }
            guard unsafe rename(newPath, path) == 0 else {
                throw .system(clinux_errno(), "replace the file", image: name)
            }
        } catch {
            unsafe unlink(newPath)
            throw error
        }
        try takeOver(replacement)
        while fsync(folderDescriptor) != 0 {
            let error = clinux_errno()
            if error == EINVAL { return }  // nothing to be made stable there
            if error != EINTR { throw .system(error, "make the file's new name durable", image: name) }
        }
    }

    /// Goes on with another open file under the same descriptor. The lock belongs to what both share from then on.
    private func takeOver(_ replacement: FileStorage) throws(DiskError) {
        replacement.imageLock.withLock { $0 = HeldImageLock() }
        guard clinux_take_over(replacement.descriptor, descriptor) >= 0 else {
            throw .system(clinux_errno(), "take over the new file", image: name)
        }
        currentIdentity.withLock { $0 = replacement.identity }
    }

    private func replace(
        by replacer: any FileReplacer, _ bytes: [UInt8], _ purpose: StoragePurpose
    ) throws(DiskError) {
        let isLocked = imageLock.withLock { $0.isHeld }
        guard let made = try replacer.replace(identity, with: bytes, isLocked: isLocked) else {
            return try overwrite(bytes, purpose)
        }
        let replacement = try FileStorage(adopting: made, name: name, isWritable: true)
        // Written over in place: this descriptor has the file, and its lock.
        guard replacement.identity != identity else { return }
        try takeOver(replacement)
    }

    private func overwrite(_ bytes: [UInt8], _ purpose: StoragePurpose) throws(DiskError) {
        try write(bytes, at: 0, for: purpose)
        try setLength(UInt64(bytes.count))
        try flush()
    }

    /// The path by which this very file can be reached now; nil if there is none.
    private func currentPath() -> String? {
        var target = [UInt8](repeating: 0, count: Int(PATH_MAX))
        let count = unsafe target.withUnsafeMutableBytes {
            unsafe $0.baseAddress.map { unsafe readlink("/proc/self/fd/\(descriptor)", unsafe $0, Int(PATH_MAX)) } ?? -1
        }
        guard count > 1, target[0] == UInt8(ascii: "/") else { return nil }
        let path = String(decoding: target[..<count], as: UTF8.self)
        var status = stat()
        guard unsafe lstat(path, &status) == 0,
            FileIdentity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino)) == identity
        else { return nil }
        return path
    }
}

/// Replaces files for a process that cannot open any.
public protocol FileReplacer: Sendable {
    /// Whether it does; else files are replaced by this process.
    var isInCharge: Bool { get }
    /// Has a new file made with these bytes, and the name of this one given to it, as
    /// ``FileStorage/replaceContents(with:for:)`` does.
    ///
    /// - Parameters:
    ///   - file: The file that is to be replaced.
    ///   - bytes: The content of the new one.
    ///   - isLocked: Whether the new file is to be locked as a writer's image before it gets the name.
    /// - Returns: A descriptor of the new file, for reading and writing, which has the lock; or of the same file, if
    ///   that could only be written over; nil if there is nobody who could do it.
    func replace(_ file: FileIdentity, with bytes: [UInt8], isLocked: Bool) throws(DiskError) -> Int32?
}

extension FileStorage {
    /// Replaces the content of the file at a path, which must still be that file, for another process that has it open
    /// and locked: ``FileReplacer/replace(_:with:isLocked:)``. The descriptor is the caller's, and with it the lock.
    public static func replace(
        _ identity: FileIdentity, at path: String, with bytes: [UInt8], isLocked: Bool
    ) throws(DiskError) -> Int32 {
        let file = try FileStorage(path: path, isWritable: true)
        guard file.identity == identity else {
            throw DiskError(.brokenLink, "was replaced meanwhile", image: path)
        }
        // What is locked is the new file; the old one is the other process's.
        if isLocked { file.imageLock.withLock { $0 = HeldImageLock(used: .writer, unshared: .exclusive) } }
        defer { file.imageLock.withLock { $0 = HeldImageLock() } }
        try file.replaceContents(with: bytes, for: .descriptor)
        let descriptor = fcntl(file.descriptor, F_DUPFD_CLOEXEC, 3)
        guard descriptor >= 0 else { throw .system(clinux_errno(), "open the new file", image: path) }
        return descriptor
    }

    /// Takes over owner, mode and extended attributes of another file, as far as this process may.
    public func copyAttributes(of other: FileStorage) { clinux_copy_attributes(other.descriptor, descriptor) }
}

internal import CLinux
internal import Glibc

/// Copies between two files that the kernel makes: by sharing blocks (reflinks of XFS, btrfs, bcachefs, NFS, …), or on
/// the server of a network file system. Neither brings a byte into this process.
public struct RangeTransfer: Sendable {
    /// What blocks begin and end at, in bytes of either file.
    public let alignment: UInt64
    private let source: Int32
    private let target: Int32
    private let isOnServer: Bool

    /// File systems on which copy_file_range(2) is the server's work (linux/magic.h; fs/ceph/super.h).
    private static let networkFileSystems: Set<UInt64> = [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400]

    /// Nil where both are not files of one kind of file system that could do it.
    public init?(from source: any Storage, to target: any Storage) {
        let descriptors = (source.traits.descriptor, target.traits.descriptor)
        guard descriptors.0 >= 0, descriptors.1 >= 0, !source.traits.hasFixedLength, !target.traits.hasFixedLength,
            target.traits.isWritable
        else { return nil }
        var block: UInt64 = 0
        var types: (UInt64, UInt64) = (0, 0)
        guard unsafe clinux_file_system(descriptors.0, &block, &types.0) == 0,
            unsafe clinux_file_system(descriptors.1, &block, &types.1) == 0, types.0 == types.1, block > 0,
            block.isPowerOfTwo
        else { return nil }
        alignment = max(block, 512)
        (self.source, self.target) = descriptors
        isOnServer = Self.networkFileSystems.contains(types.0)
        guard isOnServer || Self.canClone(from: source, to: descriptors.1, alignment) else { return nil }
    }

    /// Tries it on a file without a name beside the target: whether it can be done is known before a place is taken.
    private static func canClone(from source: any Storage, to target: Int32, _ block: UInt64) -> Bool {
        guard let data = try? source.nextData(from: 0), let length = try? source.length() else { return false }
        let start = data.lowerBound & ~(block - 1)
        guard start + block <= length, let folder = folder(of: target) else { return false }
        do throws(DiskError) {
            let file = try FileStorage(temporaryIn: folder)
            return clinux_clone_range(source.traits.descriptor, start, file.descriptor, 0, block) == 0
        } catch {
            // A process that may create nothing (a confined daemon) learns it with the first range.
            return [EACCES, EPERM].contains(error.errno)
        }
    }

    /// Where the file of a descriptor lies.
    private static func folder(of descriptor: Int32) -> String? {
        var path = [UInt8](repeating: 0, count: Int(PATH_MAX))
        let count = unsafe path.withUnsafeMutableBytes { memory in
            unsafe memory.baseAddress.map {
                unsafe readlink("/proc/self/fd/\(descriptor)", unsafe $0, memory.count)
            } ?? 0
        }
        guard count > 0, let slash = path.prefix(count).lastIndex(of: UInt8(ascii: "/")) else { return nil }
        return String(decoding: path[..<max(1, slash)], as: UTF8.self)
    }

    /// Makes `length` bytes of the target the same as those of the source. Answers false, with nothing done that
    /// counts, where it cannot be done for these two files; then it is not to be had for any other range either.
    public func transfer(from offset: UInt64, to place: UInt64, length: UInt64) throws(DiskError) -> Bool {
        let result = clinux_clone_range(source, offset, target, place, length)
        if result == 0 { return true }
        guard Self.isRefusal(-result) else {
            throw .system(result, "clone \(length) bytes", offset: place)
        }
        return isOnServer ? try copyOnServer(from: offset, to: place, length: length) : false
    }

    private func copyOnServer(from offset: UInt64, to place: UInt64, length: UInt64) throws(DiskError) -> Bool {
        var done: UInt64 = 0
        while done < length {
            let result = clinux_copy_range(source, offset + done, target, place + done, length - done)
            if result > 0 {
                done += UInt64(result)
            } else if result == 0 || Self.isRefusal(Int32(clamping: -result)) {
                return false
            } else {
                throw .system(Int32(clamping: result), "copy \(length) bytes", offset: place)
            }
        }
        return true
    }

    private static func isRefusal(_ error: Int32) -> Bool {
        [EXDEV, EOPNOTSUPP, EINVAL, ENOTTY, ENOSYS, EPERM, ETXTBSY, EBADF].contains(error)
    }
}

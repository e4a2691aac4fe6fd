internal import CLinux
internal import Glibc

/// Finds out which process holds the image locks of a file: the kernel does not tell for this kind of lock, but each
/// process's `/proc/PID/fdinfo` lists its own.
enum LockHolder {
    /// `PID (name)` of the first other process with a lock on the file, as far as we may look.
    static func find(_ file: FileIdentity) -> String? {
        let own = String(getpid())
        for process in entries(of: "/proc") where process != own && process.utf8.allSatisfy({ 48...57 ~= $0 }) {
            for descriptor in entries(of: "/proc/\(process)/fd") {
                var status = stat()
                guard unsafe stat("/proc/\(process)/fd/\(descriptor)", &status) == 0,
                    FileIdentity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino)) == file,
                    contents(of: "/proc/\(process)/fdinfo/\(descriptor)").contains("OFDLCK")
                else { continue }
                let name = contents(of: "/proc/\(process)/comm").filter { $0 != "\n" }
                return "\(process) (\(name))"
            }
        }
        return nil
    }

    private static func entries(of folder: String) -> [String] {
        guard let stream = unsafe opendir(folder) else { return [] }
        defer { unsafe closedir(stream) }
        var names: [String] = []
        while let entry = unsafe readdir(stream) {
            let name = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
            if name != ".", name != ".." { names.append(name) }
        }
        return names
    }

    private static func contents(of path: String) -> String {
        let descriptor = unsafe clinux_open(path, O_RDONLY, 0)
        guard descriptor >= 0 else { return "" }
        defer { close(descriptor) }
        var bytes = [UInt8](repeating: 0, count: 8192)
        let count = unsafe bytes.withUnsafeMutableBytes { unsafe read(descriptor, $0.baseAddress, $0.count) }
        return String(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
    }
}

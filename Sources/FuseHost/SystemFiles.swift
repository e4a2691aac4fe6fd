import Glibc

/// The few looks at /proc, /sys and paths that a mount needs, without Foundation.
public enum SystemFiles {
    /// What a file holds, at most `limit` bytes; nil if it cannot be read.
    static func contents(_ path: String, limit: Int = 16 << 20) -> [UInt8]? {
        let descriptor = openFile(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard descriptor >= 0 else { return nil }
        defer { close(descriptor) }
        return contents(of: descriptor, limit: limit)
    }

    /// The text of a file of at most 1 MiB; nil if it cannot be read.
    public static func text(_ path: String) -> String? {
        contents(path, limit: 1 << 20).map { String(decoding: $0, as: UTF8.self) }
    }

    static func contents(of descriptor: Int32, limit: Int) -> [UInt8]? {
        var bytes: [UInt8] = []
        while bytes.count < limit {
            guard let more = someContents(of: descriptor, limit: limit - bytes.count) else { return nil }
            if more.isEmpty { break }
            bytes += more
        }
        return bytes
    }

    /// What one read gets: nothing at the end, nil if it fails.
    static func someContents(of descriptor: Int32, limit: Int = 16384) -> [UInt8]? {
        var chunk = [UInt8](repeating: 0, count: min(limit, 16384))
        while true {
            let count = unsafe chunk.withUnsafeMutableBytes { buffer in
                unsafe Glibc.read(descriptor, buffer.baseAddress, buffer.count)
            }
            if count >= 0 { return Array(chunk[..<count]) }
            if errno != EINTR { return nil }
        }
    }

    /// The next message of a socket that keeps messages apart, of at most `limit` bytes; nil if it fails.
    static func message(from socket: Int32, limit: Int) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: limit)
        while true {
            let count = unsafe bytes.withUnsafeMutableBytes { unsafe recv(socket, $0.baseAddress, $0.count, 0) }
            if count >= 0 { return Array(bytes[..<count]) }
            if errno != EINTR { return nil }
        }
    }

    /// The first line of a small file.
    static func line(_ path: String) -> String? {
        guard let bytes = contents(path, limit: 65536) else { return nil }
        return String(decoding: bytes.prefix { $0 != 0x0A }, as: UTF8.self)
    }

    /// Writes a short text into an existing file; whether that worked.
    @discardableResult
    static func write(_ text: String, to path: String) -> Bool {
        let descriptor = openFile(path, O_WRONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return false }
        defer { close(descriptor) }
        return writeAll(text, to: descriptor)
    }

    @discardableResult
    static func writeAll(_ text: String, to descriptor: Int32) -> Bool {
        let bytes = Array(text.utf8)
        var done = 0
        while done < bytes.count {
            let count = unsafe bytes[done...].withUnsafeBytes { buffer in
                unsafe Glibc.write(descriptor, buffer.baseAddress, buffer.count)
            }
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { return false }
            done += count
        }
        return true
    }

    /// The names in a folder, without "." and "..".
    static func names(in folder: String) -> [String] {
        guard let stream = unsafe opendir(folder) else { return [] }
        defer { unsafe closedir(stream) }
        var names: [String] = []
        while let entry = unsafe readdir(stream) {
            let name = unsafe withUnsafePointer(to: &entry.pointee.d_name) { start in
                unsafe start.withMemoryRebound(to: CChar.self, capacity: 256) { unsafe String(cString: $0) }
            }
            if name != "." && name != ".." { names.append(name) }
        }
        return names
    }

    /// Where a symbolic link leads.
    public static func link(_ path: String) -> String? {
        var buffer = [UInt8](repeating: 0, count: Int(PATH_MAX))
        let count = unsafe buffer.withUnsafeMutableBytes { buffer in
            unsafe readlink(path, buffer.bindMemory(to: CChar.self).baseAddress!, buffer.count)
        }
        return count < 0 ? nil : String(decoding: buffer[..<count], as: UTF8.self)
    }

    /// The absolute path without links, nil (and errno) if there is nothing at it.
    static func realPath(_ path: String) -> String? {
        guard let resolved = unsafe realpath(path, nil) else { return nil }
        defer { unsafe free(resolved) }
        return unsafe String(cString: resolved)
    }

    /// The absolute path with the folder part free of links, and the last part untouched: it may be a dead mount.
    static func pathWithRealFolder(_ path: String) -> String? {
        var trimmed = path[...]
        while trimmed.count > 1 && trimmed.last == "/" { trimmed.removeLast() }
        let last = trimmed.lastIndex(of: "/").map { trimmed[trimmed.index(after: $0)...] } ?? trimmed
        guard !last.isEmpty, last != ".", last != ".." else { return realPath(path) }
        let folder = trimmed.dropLast(last.count)
        guard let real = realPath(folder.isEmpty ? "." : String(folder)) else { return nil }
        return real == "/" ? "/\(last)" : "\(real)/\(last)"
    }

    /// What stat(2) says of a path: its type and permission bits, or the errno value.
    static func status(_ path: String) -> (mode: UInt32, failure: Int32) {
        var status = stat()
        guard unsafe stat(path, &status) == 0 else { return (0, errno) }
        return (status.st_mode, 0)
    }

    /// The errno value of asking the file system at a path something that no cache answers.
    static func reach(_ path: String) -> Int32 {
        var status = statvfs()
        return unsafe statvfs(path, &status) == 0 ? 0 : errno
    }

    static func openFile(_ path: String, _ flags: Int32, mode: mode_t = 0) -> Int32 {
        while true {
            let descriptor = unsafe open(path, flags, mode)
            if descriptor >= 0 || errno != EINTR { return descriptor }
        }
    }

    static func sleep(milliseconds: Int) {
        var time = timespec(tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000)
        unsafe nanosleep(&time, nil)
    }
}

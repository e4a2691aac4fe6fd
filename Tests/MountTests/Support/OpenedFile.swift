import Glibc

/// What a system call answered.
struct SystemFailure: Error, Equatable, CustomStringConvertible {
    let code: Int32
    init(_ code: Int32) { self.code = code }
    var description: String { unsafe String(cString: strerror(code)) }
}

/// An open file, for reads and writes exactly as a test wants them: each function is one system call.
final class OpenedFile: Sendable {
    let descriptor: Int32

    /// O_DIRECT and lseek(2)'s SEEK_DATA and SEEK_HOLE, which Glibc's module lacks.
    #if arch(arm64) || arch(arm)
    static let direct: Int32 = 0x10000
    #else
    static let direct: Int32 = 0x4000
    #endif
    static let seekData: Int32 = 3
    static let seekHole: Int32 = 4

    /// Opens a file for as long as `body` runs.
    static func with<R>(_ path: String, _ flags: Int32 = O_RDONLY, _ body: (OpenedFile) throws -> R) throws -> R {
        let file = try OpenedFile(path, flags)
        defer { close(file.descriptor) }
        return try body(file)
    }

    private init(_ path: String, _ flags: Int32) throws {
        descriptor = unsafe open(path, flags | O_CLOEXEC, 0o600)
        if descriptor < 0 { throw SystemFailure(errno) }
    }

    /// Memory that O_DIRECT takes.
    private func withMemory<R>(_ count: Int, _ body: (UnsafeMutableRawBufferPointer) throws -> R) rethrows -> R {
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: max(count, 1), alignment: 4096)
        defer { unsafe memory.deallocate() }
        return try unsafe body(UnsafeMutableRawBufferPointer(rebasing: memory[..<count]))
    }

    /// pread(2)
    func read(at offset: Int, count: Int) throws -> [UInt8] {
        unsafe try withMemory(count) { memory in
            let done = unsafe pread(descriptor, memory.baseAddress, count, offset)
            if done < 0 { throw SystemFailure(errno) }
            return unsafe Array(memory[..<done])
        }
    }

    /// pwrite(2); answers how many bytes it took.
    func write(_ bytes: [UInt8], at offset: Int) throws -> Int {
        unsafe try withMemory(bytes.count) { memory in
            unsafe memory.copyBytes(from: bytes)
            let done = unsafe pwrite(descriptor, memory.baseAddress, bytes.count, offset)
            if done < 0 { throw SystemFailure(errno) }
            return done
        }
    }

    /// write(2), at the file's end if it was opened so.
    func append(_ bytes: [UInt8]) throws -> Int {
        let done = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(descriptor, $0.baseAddress, $0.count) }
        if done < 0 { throw SystemFailure(errno) }
        return done
    }

    /// fsync(2)
    func sync() throws { if fsync(descriptor) != 0 { throw SystemFailure(errno) } }

    /// ftruncate(2)
    func truncate(to size: Int) throws { if ftruncate(descriptor, size) != 0 { throw SystemFailure(errno) } }

    /// lseek(2)
    func seek(_ offset: Int, _ whence: Int32) throws -> Int {
        let found = lseek(descriptor, offset, whence)
        if found < 0 { throw SystemFailure(errno) }
        return found
    }

    /// Where the data is, as lseek(2) tells.
    func dataRanges() throws -> [Range<Int>] {
        var ranges: [Range<Int>] = []
        var position = 0
        while true {
            do {
                let start = try seek(position, Self.seekData)
                position = try seek(start, Self.seekHole)
                ranges.append(start..<position)
            } catch let failure as SystemFailure where failure.code == ENXIO {
                return ranges
            }
        }
    }

    /// mmap(2), MAP_SHARED, for as long as `body` runs.
    func mapped(at offset: Int, count: Int, writable: Bool, _ body: (MappedMemory) throws -> Void) throws {
        let protection = writable ? PROT_READ | PROT_WRITE : PROT_READ
        guard let start = unsafe mmap(nil, count, protection, MAP_SHARED, descriptor, offset),
            unsafe start != MAP_FAILED
        else { throw SystemFailure(errno) }
        defer { unsafe munmap(start, count) }
        unsafe try body(MappedMemory(bytes: UnsafeMutableRawBufferPointer(start: start, count: count)))
    }
}

/// A file in memory; valid in the call that hands it out.
@safe
struct MappedMemory {
    fileprivate let bytes: UnsafeMutableRawBufferPointer

    subscript(index: Int) -> UInt8 {
        get {
            unsafe precondition(index < bytes.count)
            return unsafe bytes[index]
        }
        nonmutating set {
            unsafe precondition(index < bytes.count)
            unsafe bytes[index] = newValue
        }
    }
}

/// `==`, which takes its time in a debug build.
func isEqual(_ a: ArraySlice<UInt8>, _ b: ArraySlice<UInt8>) -> Bool {
    guard a.count == b.count else { return false }
    return unsafe a.withUnsafeBytes { first in
        unsafe b.withUnsafeBytes { second in
            guard let start = first.baseAddress, let other = second.baseAddress else { return true }
            return unsafe memcmp(start, other, first.count) == 0
        }
    }
}

/// Whether two large files of mostly holes hold the same: compared is where one of them says that there is data.
func differenceOfSparseFiles(_ a: String, _ b: String) throws -> String? {
    try OpenedFile.with(a) { first in
        try OpenedFile.with(b) { second in
            for range in try first.dataRanges() + second.dataRanges() {
                for start in stride(from: range.lowerBound, to: range.upperBound, by: 1 << 20) {
                    let count = min(1 << 20, range.upperBound - start)
                    let bytes = try (first.read(at: start, count: count), second.read(at: start, count: count))
                    guard isEqual(bytes.0[...], bytes.1[...]) else {
                        return "\(a) and \(b) differ between \(start) and \(start + count)"
                    }
                }
            }
            return nil
        }
    }
}

/// What stat(2) says of a file.
struct FileStatus {
    let size: Int
    let mode: UInt32
    let owner: UInt32
    let group: UInt32
    /// st_blocks in bytes.
    let allocated: Int
    let modified: timespec

    init(_ path: String) throws {
        var status = stat()
        guard unsafe lstat(path, &status) == 0 else { throw SystemFailure(errno) }
        size = status.st_size
        mode = status.st_mode & 0o7777
        owner = status.st_uid
        group = status.st_gid
        allocated = status.st_blocks * 512
        modified = status.st_mtim
    }
}

/// What a file holds, as text; empty if there is none.
func contents(of path: String) -> String {
    guard let bytes = try? OpenedFile.with(path, O_RDONLY, { file in try file.allBytes() }) else { return "" }
    return String(decoding: bytes, as: UTF8.self)
}

extension OpenedFile {
    /// All bytes, also of a file in /proc, whose size nobody knows.
    func allBytes() throws -> [UInt8] {
        var bytes: [UInt8] = []
        while true {
            let part = try read(at: bytes.count, count: 1 << 16)
            if part.isEmpty { return bytes }
            bytes += part
        }
    }
}

/// Creates a file with these bytes, or overwrites one.
func writeFile(_ path: String, _ bytes: [UInt8]) throws {
    try OpenedFile.with(path, O_WRONLY | O_CREAT | O_TRUNC) { file in
        guard try file.write(bytes, at: 0) == bytes.count else { throw TestFailure("short write to \(path)") }
    }
}

/// ``writeFile(_:_:)``
func writeFile(_ path: String, _ text: String) throws { try writeFile(path, Array(text.utf8)) }

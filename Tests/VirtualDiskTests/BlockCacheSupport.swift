import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// What the tests of block caches have in common.
enum VCI {
    private static let reader = #filePath.replacing("VirtualDiskTests/BlockCacheSupport.swift", with: "Readers/vci.py")
    /// Bytes of a chunk of all caches that are small.
    static let chunk = 64 << 10

    /// A raw disk of random bytes.
    static func makeRaw(
        _ folder: TemporaryFolder, _ name: String = "disk.raw", size: Int, seed: UInt64
    ) throws -> (path: String, model: DiskModel) {
        var generator = SeededGenerator(seed: seed)
        var model = DiskModel(size: size)
        for offset in stride(from: 0, to: size, by: 1 << 20) {
            model.write(ConformanceTests.pool.bytes(min(1 << 20, size - offset), using: &generator), at: offset)
        }
        try folder.write(model.bytes, to: name)
        return (folder.file(name), model)
    }

    /// Options with a cache; what it says is collected.
    static func options(
        _ cache: String, size: UInt64? = 2 << 20, _ said: Locked<[CacheNotice]>? = nil, isWritable: Bool = false,
        wrap: (@Sendable (any Storage) -> any Storage)? = nil
    ) -> DiskOptions {
        var options = DiskOptions(isWritable: isWritable)
        options.lazyFlushInterval = 0
        options.cache = CacheOptions(path: cache, size: size) { notice in said?.withLock { $0.append(notice) } }
        options.wrapStorage = wrap
        return options
    }

    /// The second reader finds the cache closed cleanly and sound.
    static func expectSound(_ path: String, _ context: String = "") throws {
        let result = try Subprocess.run(["python3", reader, "check", path])
        #expect(result.status == 0, "\(context): \(result.outputText)\(result.errorText)")
        let report = try BlockCacheFile.check(path)
        #expect(report.findings.isEmpty, "\(context): \(report.findings)")
    }

    /// What it holds, the extent used longest ago first.
    static func extents(_ path: String) throws -> [(first: Int, blocks: Int, address: Int, node: Int)] {
        let result = try Subprocess.run(["python3", reader, "extents", path])
        try #require(result.status == 0, "\(result.outputText)\(result.errorText)")
        return result.outputText.split(separator: "\n").map { line in
            let numbers = line.split(separator: " ").compactMap { Int($0) }
            return (numbers[0], numbers[1], numbers[2], numbers[3])
        }
    }

    /// Everything that the file caches is what the disk holds there.
    static func expectAgreement(_ path: String, _ model: DiskModel, _ context: String = "") throws {
        let file = try FileStorage(path: path, isWritable: false)
        for extent in try extents(path) {
            let count = min(extent.blocks * 512, model.size - extent.first * 512)
            let bytes = try file.availableBytes(at: UInt64(extent.address) * 512, count: count, for: .guestData)
            if let mistake = model.mistake(in: bytes, at: extent.first * 512) {
                Issue.record("\(context): the cache's file: \(mistake)")
            }
        }
    }

    /// Copies a file as it is now.
    static func copy(_ path: String, to other: String) throws {
        _ = try Subprocess.run(["cp", "--sparse=always", path, other])
    }
}

/// Counts what is read of the guest's data from files whose name ends so.
final class ReadCounter: Sendable {
    private let counts = Locked((calls: 0, bytes: 0))

    var calls: Int { counts.withLock { $0.calls } }
    var bytes: Int { counts.withLock { $0.bytes } }
    func reset() { counts.withLock { $0 = (0, 0) } }

    /// What wraps the storages of a disk, but not its cache's. With `delay`, each read takes so many microseconds.
    func wrap(except cache: String, delay: UInt32 = 0) -> @Sendable (any Storage) -> any Storage {
        { [self] storage in
            storage.name == cache
                ? storage
                : ObservedStorage(storage) { [self] (access) throws(DiskError) in
                    guard case .read(_, let count, .guestData) = access else { return }
                    counts.withLock { counts in
                        counts.calls += 1
                        counts.bytes += count
                    }
                    if delay > 0 { usleep(delay) }
                }
        }
    }
}

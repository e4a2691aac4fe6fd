import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Files of an image, of which one is harmed in some way, and everything that can be done to such an image.
///
/// The real files are in a folder; what is opened are copies in memory with the harm done to them.
struct HostileImage {
    /// The path of the image's first file.
    let path: String
    /// Its files' content, by path.
    var files: [String: [UInt8]]
    /// How long the files are said to be, if that is more than they hold.
    var length: UInt64?

    /// What an attempt must keep to.
    static let memoryLimit = 64 << 20
    /// Seconds of the processor's time, of which others take their part while the tests run.
    static let timeLimit = 4.0

    /// An image of these files, the first of which is the one that is opened; only their names are in `folder`.
    init(_ files: [(name: String, bytes: [UInt8])], folder: TemporaryFolder) throws {
        path = folder.file(files[0].name)
        self.files = [:]
        for file in files {
            unsafe unlink(folder.file(file.name))
            try folder.write([], to: file.name)
            self.files[folder.file(file.name)] = file.bytes
        }
    }

    /// Reads the files of an image that was made in `folder`.
    init(path: String, folder: TemporaryFolder, names: [String]) throws {
        self.path = path
        files = [:]
        for name in names { files[folder.file(name)] = try folder.read(name) }
    }

    // MARK: - Doing everything

    /// Opens, reads, writes, discards, flushes, checks and repairs. Whatever it is: an error of ours or success, in
    /// little memory and time. Answers what went wrong instead.
    func exercise() -> String? {
        measure {
            readAll()
            readInformation()
            writeSome()
            check()
        }
    }

    /// Opens for writing, writes a little and closes; answers what went wrong with time and memory.
    func open() -> String? {
        measure {
            let kept = Locked<[String: PagedStorage]>([:])
            do throws(DiskError) {
                let disk = try Disk.open(path, options: options(isWritable: true, kept: kept))
                _ = try? disk.write([1, 2, 3], at: 0)
                try disk.close()
            } catch {}
        }
    }

    private func measure(_ body: () -> Void) -> String? {
        let start = clock()
        let before = MemoryPeak.reset()
        body()
        let time = Double(clock() - start) / Double(CLOCKS_PER_SEC)
        let memory = MemoryPeak.now - before
        if memory > Self.memoryLimit { return "took \(memory >> 20) MiB of memory" }
        if time > Self.timeLimit { return "took \(time) s" }
        return nil
    }

    /// Options that put copies of the files in the place of the real ones; `kept` collects them.
    private func options(
        isWritable: Bool, cacheSize: Int = 8 << 20, kept: Locked<[String: PagedStorage]>
    ) -> DiskOptions {
        var options = DiskOptions(isWritable: isWritable)
        options.lazyFlushInterval = 0
        options.locksImages = false
        options.tableCacheSize = cacheSize
        options.wrapStorage = { [files, length] storage in
            guard let bytes = files[storage.name] else { return storage }
            return kept.withLock { kept in
                if let known = kept[storage.name], known.traits.isWritable == storage.traits.isWritable { return known }
                let isWritable = storage.traits.isWritable
                let copy =
                    kept[storage.name].map { PagedStorage(copying: $0, isWritable: isWritable) }
                    ?? PagedStorage(bytes, length: length, name: storage.name, isWritable: isWritable)
                kept[storage.name] = copy
                return copy
            }
        }
        return options
    }

    /// Whether it opens for reading: the error's kind, or nil.
    func openingError() -> DiskError.Kind? {
        do throws(DiskError) {
            try Disk.open(path, options: options(isWritable: false, kept: Locked([:]))).close()
            return nil
        } catch {
            return error.kind
        }
    }

    /// Offsets and lengths that are worth a try, whatever the disk's size.
    private static func places(_ size: UInt64) -> [(offset: UInt64, count: Int)] {
        let piece: UInt64 = 96 << 10
        var places: [(UInt64, Int)] = []
        for start in [0, piece, 2 * piece, size / 3, size / 2, size - min(size, piece), size - min(size, 1)]
        where start <= size {
            places.append((start, Int(min(piece, size - start))))
        }
        return places
    }

    private func readAll() {
        do throws(DiskError) {
            let disk = try Disk.open(path, options: options(isWritable: false, kept: Locked([:])))
            for place in Self.places(disk.size) {
                do throws(DiskError) { _ = try disk.read(at: place.offset, count: place.count) } catch { continue }
            }
            var count = 0
            _ = try? disk.forEachExtent(offset: 0, length: disk.size) { (_) throws(DiskError) in
                count += 1
                return count < 2000
            }
            _ = try? disk.nextData(from: 0)
            // A hole may be behind millions of grains; what that takes is the disk's size, not an image's trick.
            if disk.size < 1 << 30 { _ = try? disk.nextHole(from: disk.size / 2) }
            _ = try? disk.images()
            try disk.close()
        } catch {}
    }

    private func readInformation() {
        let options = options(isWritable: false, kept: Locked([:]))
        _ = try? ImageInformation.read(path, options: options, wholeChain: true)
    }

    private func writeSome() {
        let kept = Locked<[String: PagedStorage]>([:])
        do throws(DiskError) {
            let disk = try Disk.open(path, options: options(isWritable: true, cacheSize: 64 << 10, kept: kept))
            for place in Self.places(disk.size) {
                let data = [UInt8](repeating: 0x5a, count: min(place.count, 6000))
                _ = try? disk.write(data, at: place.offset)
                _ = try? disk.read(at: place.offset, count: place.count)
            }
            _ = try? disk.flush()
            for place in Self.places(disk.size) {
                _ = try? disk.discard(offset: place.offset, length: UInt64(place.count))
                _ = try? disk.write([1, 2, 3], at: place.offset)
            }
            try disk.close()
        } catch {}
        // And what it left behind is opened once more.
        _ = try? Disk.open(path, options: options(isWritable: false, kept: kept)).close()
    }

    private func check() {
        let kept = Locked<[String: PagedStorage]>([:])
        _ = try? ImageCheck.run(path, options: options(isWritable: false, kept: kept))
        _ = try? ImageCheck.run(path, options: options(isWritable: false, kept: kept), repair: true)
        _ = try? Disk.open(path, options: options(isWritable: true, kept: kept)).close()
    }
}

/// The most memory that this process has had resident.
enum MemoryPeak {
    /// Begins anew, and answers what is resident now.
    static func reset() -> Int {
        trim()
        let descriptor = unsafe open("/proc/self/clear_refs", O_WRONLY)
        if descriptor >= 0 {
            // 5: the peak becomes what is resident now.
            unsafe write(descriptor, "5", 1)
            close(descriptor)
        }
        return now
    }

    /// Gives memory that is free back to the system, so that taking it again shows; malloc.h is in no module.
    private static func trim() {
        typealias Trim = @convention(c) (Int) -> Int32
        guard let symbol = unsafe dlsym(nil, "malloc_trim") else { return }
        _ = unsafe unsafeBitCast(symbol, to: Trim.self)(0)
    }

    /// The peak in bytes.
    static var now: Int {
        let descriptor = unsafe open("/proc/self/status", O_RDONLY)
        guard descriptor >= 0 else { return 0 }
        defer { close(descriptor) }
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = unsafe read(descriptor, &bytes, bytes.count)
        let text = String(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
        guard let line = text.split(separator: "\n").first(where: { $0.hasPrefix("VmHWM:") }) else { return 0 }
        return (line.split(separator: " ").compactMap { Int($0) }.first ?? 0) << 10
    }
}

/// Remembers what is being tried, for when the process dies of it.
struct Progress {
    private let storage: FileStorage
    static let length = 400

    /// Notes go to files in a folder; what the process says on standard error goes there too.
    init(folder: String) throws(DiskError) {
        storage = try FileStorage(creating: folder + "/progress")
        let errors = unsafe open(folder + "/errors", O_WRONLY | O_CREAT | O_TRUNC, 0o600)
        if errors >= 0 { dup2(errors, 2) }
    }

    func note(_ text: String) {
        let bytes = Array(text.utf8.prefix(Self.length))
        try? storage.write(bytes + [UInt8](repeating: 32, count: Self.length - bytes.count), at: 0, for: .guestData)
    }

    /// What was noted last in a file.
    static func last(in folder: TemporaryFolder, _ name: String) -> String {
        let bytes = (try? folder.read(name)) ?? []
        return String(decoding: bytes.reversed().drop { $0 == 32 }.reversed(), as: UTF8.self)
    }
}

/// Values at the edges of what a field of `width` bytes can hold, and a few random ones.
func hostileValues(width: Int, was: UInt64, using generator: inout SeededGenerator) -> [UInt64] {
    let bits = UInt64(width * 8)
    let all: UInt64 = width == 8 ? .max : 1 << bits - 1
    var values: Set<UInt64> = [0, 1, 2, 3, all, all - 1, all >> 1, all >> 1 + 1, was &+ 1, was &- 1, was &* 2, was / 2]
    for bit in [3, 7, 9, 12, 16, 20, 22, 31, 32, 41, 53, 54, 55, 62] where bit < bits {
        values.insert(1 << UInt64(bit))
    }
    for bit in [9, 32, 41, 54] where bit < bits { values.insert(1 << UInt64(bit) - 1) }
    for _ in 0..<3 { values.insert(generator.next() >> UInt64.random(in: 0...60, using: &generator)) }
    return values.map { $0 & all }.sorted()
}

extension [UInt8] {
    /// An integer of `width` bytes, least significant first.
    func number(at offset: Int, width: Int) -> UInt64 {
        (0..<width).reduce(UInt64(0)) { $0 | UInt64(self[offset + $1]) << UInt64($1 * 8) }
    }

    /// A copy in which that integer is another.
    func setting(_ value: UInt64, at offset: Int, width: Int) -> [UInt8] {
        var copy = self
        for index in 0..<width { copy[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
        return copy
    }
}

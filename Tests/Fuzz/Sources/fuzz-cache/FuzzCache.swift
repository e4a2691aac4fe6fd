import DiskStorage
import Glibc
import VirtualDisk

/// What libFuzzer calls with every input.
///
/// The first byte says how the cache is used, the rest is its file. Bit 0: the identity of the disk is put into the
/// header, which a fuzzer would hardly find. Bit 1: the disk lies below an overlay. Whatever the bytes are, the disk
/// must open, each call must end, and a cache of another disk must not be believed.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let input = [UInt8](UnsafeBufferPointer(start: data, count: count))
    guard let how = input.first else { return 0 }
    CacheTrial.shared.run(how, Array(input.dropFirst()))
    return 0
}

/// A disk, and what its cache says of it.
struct CacheTrial {
    static let shared = CacheTrial()

    private static let size = 5 * 65536 + 1536
    private let disk: String
    private let cache: String
    private let content: [UInt8]
    private var identity: [UInt8] = []

    private init() {
        var template = Array("/dev/shm/vdmount-fuzz-XXXXXX".utf8CString)
        mkdtemp(&template)
        let folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        disk = folder + "/disk.raw"
        cache = folder + "/cache.vci"
        content = (0..<Self.size).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 9) }
        do {
            try FileStorage(creating: disk).write(content, at: 0, for: .guestData)
            var options = DiskOptions()
            options.cache = CacheOptions(path: cache, size: 2 << 20)
            let first = try Disk.open(disk, options: options)
            _ = try first.read(at: 0, count: Self.size)
            try first.close()
            let file = try FileStorage(path: cache, isWritable: false)
            identity = try file.availableBytes(at: 41, count: 32, for: .header)
        } catch {
            preconditionFailure("\(error)")
        }
    }

    func run(_ how: UInt8, _ bytes: [UInt8]) {
        var bytes = bytes
        let isKnown = how & 1 != 0
        if isKnown, bytes.count >= 73 { bytes.replaceSubrange(41..<73, with: identity) }
        let storage = SmallStorage(bytes, name: cache)
        var options = DiskOptions()
        options.locksImages = false
        options.lazyFlushInterval = 0
        options.tableCacheSize = 128 << 10
        options.cache = CacheOptions(path: cache, size: 2 << 20)
        if how & 2 != 0 { options.overlay = .temporary(folder: "/dev/shm") }
        options.wrapStorage = { [cache] in $0.name == cache ? storage : $0 }
        for _ in 0..<2 {
            do {
                let disk = try Disk.open(disk, options: options)
                for (start, count) in [(0, Self.size), (70_000, 5000), (Self.size - 600, 600)] {
                    let found = try disk.read(at: UInt64(start), count: count)
                    precondition(isKnown || found == Array(content[start..<start + count]), "another disk's data")
                }
                try disk.close()
            } catch let error {
                precondition((error as? DiskError)?.kind == .invalidArgument, "\(error)")
                return
            }
        }
    }
}

/// Memory that does not grow beyond what a small file system would hold.
private final class SmallStorage: Storage {
    private static let limit: UInt64 = 8 << 20
    let traits = StorageTraits(isWritable: true, canDiscard: true)
    let name: String
    private let memory: MemoryStorage

    init(_ bytes: [UInt8], name: String) {
        self.name = name
        memory = MemoryStorage(bytes, name: name)
    }

    private func check(_ end: UInt64, _ overflow: Bool = false) throws(DiskError) {
        if overflow || end > Self.limit { throw .system(ENOSPC, "grow") }
    }

    func length() -> UInt64 { memory.length() }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) -> Int {
        memory.read(into: buffer, at: offset, for: purpose)
    }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        let (end, overflow) = offset.addingReportingOverflow(UInt64(bytes.count))
        try check(end, overflow)
        try memory.write(bytes, at: offset, for: purpose)
    }

    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        try memory.discard(range, mustZero: mustZero, for: purpose)
    }

    func setLength(_ length: UInt64) throws(DiskError) {
        try check(length)
        try memory.setLength(length)
    }

    func flush() {}
    func allocatedBytes() -> UInt64 { memory.length() }
    func nextData(from offset: UInt64) -> Range<UInt64>? { memory.nextData(from: offset) }
}

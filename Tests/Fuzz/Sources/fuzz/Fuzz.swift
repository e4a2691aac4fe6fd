import DiskImage
import DiskStorage
import Glibc
import VirtualDisk

/// What libFuzzer calls with every input.
///
/// The first byte says how the image is used, the next four how many bytes of the rest are the image; what is left is
/// a second file, `b.vmdk`, which the image may name as an extent or a parent. Either may be given in pieces (see
/// `withPieces`). Whatever the bytes are, the library must end each call with a result or a `DiskError`.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let input = [UInt8](UnsafeBufferPointer(start: data, count: count))
    guard input.count > 5 else { return 0 }
    let split = input[1..<5].reversed().reduce(0) { $0 << 8 | Int($1) }
    let rest = input.dropFirst(5)
    let image = withVHDChecksums(withOverlayChecksum(withPieces(Array(rest.prefix(split)))))
    Trial(how: input[0], image: image, other: withPieces(Array(rest.dropFirst(split)))).run()
    return 0
}

/// An overlay's header with the checksum that it needs to be looked at: a fuzzer would hardly ever find it.
func withOverlayChecksum(_ image: [UInt8]) -> [UInt8] {
    guard image.count >= 4096, image.starts(with: "vdmount overlay".utf8) else { return image }
    var sum = UInt32.max
    for byte in image[..<4092] {
        sum ^= UInt32(byte)
        for _ in 0..<8 { sum = sum & 1 == 0 ? sum >> 1 : (sum >> 1) ^ 0xedb8_8320 }
    }
    var image = image
    for index in 0..<4 { image[4092 + index] = UInt8(truncatingIfNeeded: ~sum >> UInt32(index * 8)) }
    return image
}

/// The same for a VHD: its footer, the copy, and the header that follows that.
func withVHDChecksums(_ image: [UInt8]) -> [UInt8] {
    guard image.count >= 1536 else { return image }
    var result = image
    let structures = [
        (0, 512, 64, "conectix"), (image.count - 512, 512, 64, "conectix"), (512, 1024, 36, "cxsparse"),
    ]
    for (start, count, place, cookie) in structures where image[start...].starts(with: cookie.utf8) {
        for index in 0..<4 { result[start + place + index] = 0 }
        let sum = ~result[start..<start + count].reduce(UInt32(0)) { $0 &+ UInt32($1) }
        for index in 0..<4 {
            result[start + place + index] = UInt8(truncatingIfNeeded: sum >> UInt32(24 - 8 * index))
        }
    }
    return result
}

/// A VHDX is mostly zeros, and has many MiB: its bytes are given as `pieces`, the MiB of the file in a byte, and for
/// each piece a sector's number in four bytes, in two how many bytes follow, and these. Its checksums are put right.
func withPieces(_ input: [UInt8]) -> [UInt8] {
    let word = Array("pieces".utf8)
    guard input.count > word.count, input.starts(with: word) else { return input }
    var image = [UInt8](repeating: 0, count: Int(min(input[word.count], 8)) << 20)
    func number(_ place: Int, _ count: Int) -> Int {
        input[place..<place + count].reversed().reduce(0) { $0 << 8 | Int($1) }
    }
    var position = word.count + 1
    while position + 6 < input.count {
        let start = number(position, 4) * 512
        let count = min(number(position + 4, 2), input.count - position - 6)
        position += 6
        if start + count <= image.count {
            image.replaceSubrange(start..<start + count, with: input[position..<position + count])
        }
        position += count
    }
    return withVHDXChecksums(image)
}

private let remainders: [UInt32] = (0..<256).map { byte in
    (0..<8).reduce(UInt32(byte)) { value, _ in value & 1 != 0 ? value >> 1 ^ 0x82f6_3b78 : value >> 1 }
}

/// Headers, region tables, and whatever looks like a log entry in the MiB after the first.
private func withVHDXChecksums(_ image: [UInt8]) -> [UInt8] {
    guard image.count >= 2 << 20, image.starts(with: "vhdxfile".utf8) else { return image }
    var image = image
    func put(_ range: Range<Int>) {
        for index in 0..<4 { image[range.lowerBound + 4 + index] = 0 }
        let sum = ~image[range].reduce(UInt32.max) { $0 >> 8 ^ remainders[Int(UInt8(truncatingIfNeeded: $0) ^ $1)] }
        for index in 0..<4 { image[range.lowerBound + 4 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(8 * index)) }
    }
    for start in [64 << 10, 128 << 10] { put(start..<start + 4096) }
    for start in [192 << 10, 256 << 10] { put(start..<start + (64 << 10)) }
    for start in stride(from: 1 << 20, to: 2 << 20, by: 4096) where image[start...].starts(with: "loge".utf8) {
        let length = image[start + 8..<start + 12].reversed().reduce(0) { $0 << 8 | Int($1) }
        if length >= 4096, start + length <= 2 << 20 { put(start..<start + length) }
    }
    return image
}

/// One input.
struct Trial {
    let how: UInt8
    let image: [UInt8]
    let other: [UInt8]

    private static let folder: String = {
        var template = Array("/dev/shm/vdmount-fuzz-XXXXXX".utf8CString)
        mkdtemp(&template)
        let folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        for name in ["a.vmdk", "b.vmdk"] { close(open(folder + "/" + name, O_CREAT | O_RDWR, 0o600)) }
        return folder
    }()

    func run() {
        let path = Self.folder + "/a.vmdk"
        let (image, other) = (image, other)
        var options = DiskOptions(isWritable: how & 1 != 0)
        options.locksImages = false
        options.lazyFlushInterval = 0
        options.tableCacheSize = 128 << 10
        options.depthLimit = 4
        options.wrapStorage = { storage in
            BoundedStorage(storage.name.hasSuffix("a.vmdk") ? image : other, name: storage.name)
        }
        _ = try? ImageInformation.read(path, options: options, wholeChain: how & 2 != 0)
        if how & 4 != 0 { _ = try? ImageCheck.run(path, options: options, repair: how & 1 != 0) }
        guard let disk = try? Disk.open(path, options: options) else { return }
        use(disk)
        try? disk.close()
    }

    private func use(_ disk: Disk) {
        let places = [0, disk.size / 3, disk.size / 2, disk.size - min(disk.size, 70_001)]
        for place in places {
            _ = try? disk.read(at: place, count: Int(min(70_001, disk.size - place)))
        }
        var steps = 0
        try? disk.forEachExtent(offset: 0, length: min(disk.size, 1 << 30)) { _ in
            steps += 1
            return steps < 1000
        }
        guard disk.isWritable else { return }
        for place in places {
            let count = Int(min(5000, disk.size - place))
            _ = try? disk.write([UInt8](repeating: how, count: count), at: place)
            _ = try? disk.discard(offset: place, length: min(200_000, disk.size - place))
        }
        _ = try? disk.flush()
        _ = try? disk.read(at: 0, count: Int(min(70_001, disk.size)))
    }
}

/// Memory that does not grow beyond what a small file system would hold.
final class BoundedStorage: Storage {
    private static let limit: UInt64 = 16 << 20
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

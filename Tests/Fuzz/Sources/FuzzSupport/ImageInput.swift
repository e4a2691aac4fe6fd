import DiskStorage
import Glibc

/// An input that is an image and another file.
///
/// The first byte says how the image is used, the next four how many bytes of the rest are the image; what is left is
/// a second file, `b.vmdk`, which the image may name as an extent or a parent. Either may be given in pieces (see
/// `withPieces`).
public struct ImageInput {
    public let how: UInt8
    public let image: [UInt8]
    public let other: [UInt8]

    /// Nil: it is too short.
    public init?(_ data: UnsafePointer<UInt8>, _ count: Int) {
        let input = [UInt8](UnsafeBufferPointer(start: data, count: count))
        guard input.count > 5 else { return nil }
        let split = input[1..<5].reversed().reduce(0) { $0 << 8 | Int($1) }
        let rest = input.dropFirst(5)
        how = input[0]
        image = withVHDChecksums(withOverlayChecksum(withPieces(Array(rest.prefix(split)))))
        other = withPieces(Array(rest.dropFirst(split)))
    }

    /// A folder for the process, in memory, in which both have names.
    public static let folder: String = {
        var template = Array("/dev/shm/vdmount-fuzz-XXXXXX".utf8CString)
        mkdtemp(&template)
        let folder = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        for name in ["a.vmdk", "b.vmdk"] { close(open(folder + "/" + name, O_CREAT | O_RDWR, 0o600)) }
        return folder
    }()
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

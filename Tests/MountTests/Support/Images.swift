import DiskTesting
import Glibc

/// Random writes for qemu-io, which a model file takes as well.
struct WritePlan {
    private var generator: SeededGenerator
    private let size: Int

    init(seed: UInt64, size: Int) {
        generator = SeededGenerator(seed: seed)
        self.size = size
    }

    /// A number in a range.
    mutating func number(_ range: ClosedRange<Int>) -> Int { Int.random(in: range, using: &generator) }

    /// A write of a pattern that is not 0, of up to `maximum` bytes, on sector boundaries or anywhere.
    mutating func write(maximum: Int = 300 << 10, aligned: Bool = false) -> String {
        let (offset, count) = range(maximum: maximum, aligned: aligned)
        return "write -P \(number(1...255)) \(offset) \(count)"
    }

    mutating func writes(_ count: Int, maximum: Int = 300 << 10, aligned: Bool = false) -> [String] {
        (0..<count).map { _ in write(maximum: maximum, aligned: aligned) }
    }

    /// What a guest does to a disk: writes, zeros and discards, with and without the edges of sectors.
    mutating func mixture(_ count: Int) -> [String] {
        (0..<count).map { _ in
            switch number(0...9) {
            case 0:
                let (offset, count) = range(maximum: 400 << 10, aligned: true)
                return "write -z \(offset) \(count)"
            case 1:
                let (offset, count) = range(maximum: 1 << 20, aligned: true)
                return "discard \(offset) \(count)"
            case 2: return "flush"
            case 3: return write(maximum: 2 << 20, aligned: true)
            default: return write(maximum: 100 << 10)
            }
        } + ["flush"]
    }

    /// A range inside the disk; now and then it touches the disk's end.
    mutating func range(maximum: Int, aligned: Bool) -> (offset: Int, count: Int) {
        let count = number(1...min(maximum, size))
        let offset = number(0...9) == 0 ? size - count : number(0...size - count)
        guard aligned else { return (offset, count) }
        let start = offset & ~511
        return (start, min(size - start, max(512, count & ~511)))
    }
}

/// The images of a test.
extension Stage {
    /// An image made by qemu-img.
    func makeImage(
        _ name: String, size: Int, subformat: String = "monolithicSparse", _ options: String = ""
    ) throws -> String {
        let options = "subformat=\(subformat)" + (options.isEmpty ? "" : ",\(options)")
        try tool("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, file(name), "\(size)")
        return file(name)
    }

    /// A snapshot made by qemu-img.
    func makeSnapshot(_ name: String, of parent: String, _ options: String = "") throws -> String {
        let base = String(parent.split(separator: "/").last ?? "")
        let list = options.isEmpty ? [] : ["-o", options]
        try tool(["qemu-img", "create", "-q", "-f", "vmdk"] + list + ["-b", base, "-F", "vmdk", file(name)])
        return file(name)
    }

    /// The raw file that qemu-img makes of an image, with all that lies below it.
    func convert(_ image: String, to name: String = "expected.raw") throws -> String {
        try tool("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, file(name))
        return file(name)
    }

    /// A sparse file of zeros.
    func makeRaw(_ name: String, size: Int) throws -> String {
        try tool("truncate", "-s", "\(size)", file(name))
        return file(name)
    }

    /// What can be seen of all images in the folder: names, sizes, times, and (unless they are too large) bytes.
    func fingerprint(ofBytes: Bool = true) throws -> String {
        let sums = ofBytes ? "&& sha256sum *.vmdk" : ""
        return try tool("sh", "-c", "cd '\(path)' && stat -c '%n %s %b %y %z' *.vmdk \(sums)")
    }

    /// The space that the files with this beginning of their names take.
    func usage(_ prefix: String) throws -> Int {
        let lines = try tool("sh", "-c", "du -B1 '\(path)/\(prefix)'*").split(separator: "\n")
        return lines.reduce(0) { $0 + (Int($1.prefix { $0 != "\t" }) ?? 0) }
    }
}

/// Changes the descriptor inside a sparse image, or alone in its file, within the room that there is.
func editDescriptor(_ image: String, _ change: (String) -> String) throws {
    try OpenedFile.with(image, O_RDWR) { file in
        let head = try file.read(at: 0, count: 64)
        let isInside = head.starts(with: Array("KDMV".utf8))
        func field(_ offset: Int) -> Int { head[offset..<offset + 8].reversed().reduce(0) { $0 << 8 | Int($1) } }
        let offset = isInside ? field(28) * 512 : 0
        let room = isInside ? field(36) * 512 : 1 << 16
        let text = String(decoding: try file.read(at: offset, count: room).prefix { $0 != 0 }, as: UTF8.self)
        var bytes = Array(change(text).utf8)
        guard bytes.count <= room else { throw TestFailure("no room for the descriptor") }
        if isInside { bytes += [UInt8](repeating: 0, count: room - bytes.count) }
        _ = try file.write(bytes, at: offset)
        if !isInside { try file.truncate(to: bytes.count) }
    }
}

/// The descriptor with the line that begins so replaced, or (with nil) left out.
func replacingLine(_ text: String, _ beginning: String, _ line: String?) -> String {
    text.split(separator: "\n", omittingEmptySubsequences: false)
        .compactMap { $0.hasPrefix(beginning) ? line : String($0) }.joined(separator: "\n")
}

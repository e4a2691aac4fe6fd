public import DiskStorage
internal import Glibc
public import VirtualDisk

/// What a disk must hold: all its bytes in memory, changed beside the disk and compared with it.
public struct DiskModel: Sendable {
    /// The disk's bytes.
    public private(set) var bytes: [UInt8]

    /// A disk of `size` zeros.
    public init(size: Int) { bytes = [UInt8](repeating: 0, count: size) }

    /// The number of bytes.
    public var size: Int { bytes.count }

    /// The same disk cut off, or with zeros added: what a child of another size shows of its parent.
    public func resized(to size: Int) -> DiskModel {
        var result = DiskModel(size: size)
        result.write(bytes.prefixArray(min(size, self.size)), at: 0)
        return result
    }

    /// Writes here alone.
    public mutating func write(_ data: [UInt8], at offset: Int) {
        try? bytes.withIOBuffer { (memory) throws(DiskError) in
            try data.withIOBytes { (data) throws(DiskError) in memory.slice(offset, data.count).copy(from: data) }
        }
    }

    /// Zeros here alone.
    public mutating func zero(_ range: Range<Int>) {
        try? bytes.withIOBuffer { (memory) throws(DiskError) in memory.slice(range.lowerBound, range.count).zero() }
    }

    /// What is wrong with what the disk holds in a range; nil if nothing is.
    public func mistake(of disk: Disk, in range: Range<Int>) throws(DiskError) -> String? {
        let found = try disk.read(at: UInt64(range.lowerBound), count: range.count)
        return mistake(in: found, at: range.lowerBound)
    }

    /// What is wrong with bytes that were read at `offset`; nil if nothing is.
    public func mistake(in found: [UInt8], at offset: Int) -> String? {
        let isSame = unsafe bytes.withUnsafeBytes { expected in
            unsafe found.withUnsafeBytes { found in
                guard let a = expected.baseAddress, let b = found.baseAddress else { return true }
                return unsafe memcmp(a + offset, b, found.count) == 0
            }
        }
        if isSame { return nil }
        let wrong = found.indices.filter { found[$0] != bytes[offset + $0] }
        guard let first = wrong.first, let last = wrong.last else { return nil }
        return "\(wrong.count) bytes between \(offset + first) and \(offset + last) differ: "
            + "byte \(offset + first) is \(found[first]) and should be \(bytes[offset + first])"
    }
}

extension [UInt8] {
    /// The first `count` bytes, copied in one go.
    public func prefixArray(_ count: Int) -> [UInt8] { slice(0, count) }

    /// `count` bytes from `offset` on, copied in one go.
    public func slice(_ offset: Int, _ count: Int) -> [UInt8] {
        (try? withIOBytes { (memory) throws(DiskError) in memory.slice(offset, count).array }) ?? []
    }
}

/// Random bytes to take data from: quicker than making each write's own.
public struct RandomPool: Sendable {
    private let bytes: [UInt8]

    /// `size` bytes, the same for the same seed.
    public init(size: Int = 2 << 20, seed: UInt64) {
        var generator = SeededGenerator(seed: seed)
        var bytes: [UInt8] = []
        bytes.reserveCapacity(size + 8)
        while bytes.count < size {
            var word = generator.next()
            unsafe withUnsafeBytes(of: &word) { unsafe bytes.append(contentsOf: $0) }
        }
        self.bytes = bytes
    }

    /// `count` bytes from a random place.
    public func bytes(_ count: Int, using generator: inout SeededGenerator) -> [UInt8] {
        bytes.slice(Int.random(in: 0...bytes.count - count, using: &generator), count)
    }
}

internal import Glibc

extension IOBytes {
    /// Where the first byte that is another than in `other` stands; nil if all are the same. Both have as many bytes.
    public func firstDifference(from other: IOBytes) -> Int? {
        precondition(count == other.count)
        // The system's comparison is fast, and does not say where.
        let step = 4096
        var offset = 0
        while offset < count {
            let length = min(step, count - offset)
            if unsafe memcmp(pointer + offset, other.pointer + offset, length) != 0 {
                for place in offset..<offset + length where self[place] != other[place] { return place }
            }
            offset += length
        }
        return nil
    }

    /// The byte at `index`.
    public subscript(index: Int) -> UInt8 {
        precondition(index >= 0 && index < count)
        return unsafe pointer.load(fromByteOffset: index, as: UInt8.self)
    }
}

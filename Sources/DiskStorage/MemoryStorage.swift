/// A storage in memory: for tests, small generated images and side data.
public final class MemoryStorage: Storage {
    public let traits = StorageTraits(isWritable: true, canDiscard: true)
    public let name: String
    private let contents: Locked<[UInt8]>

    public init(_ bytes: [UInt8] = [], name: String = "memory") {
        contents = Locked(bytes)
        self.name = name
    }

    /// A copy of all bytes.
    public var bytes: [UInt8] { contents.withLock { $0 } }

    public func length() -> UInt64 { UInt64(contents.withLock { $0.count }) }

    public func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) -> Int {
        contents.withLock { bytes in
            guard offset < UInt64(bytes.count) else { return 0 }
            let count = min(buffer.count, bytes.count - Int(offset))
            let source = bytes[Int(offset)..<Int(offset) + count]
            unsafe source.withUnsafeBytes { memory in
                if let start = memory.baseAddress { unsafe buffer.copy(from: IOBytes(start: start, count: count)) }
            }
            return count
        }
    }

    public func write(_ data: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        guard let start = Int(exactly: offset), start <= 1 << 32, data.count <= 1 << 32 else {
            throw .system(27, "write beyond 4 GiB of memory", image: name, offset: offset)  // EFBIG
        }
        contents.withLock { bytes in
            if bytes.count < start + data.count {
                bytes.append(contentsOf: repeatElement(0, count: start + data.count - bytes.count))
            }
            unsafe bytes.withUnsafeMutableBytes { memory in
                if let base = memory.baseAddress, data.count > 0 {
                    unsafe (base + start).copyMemory(from: data.pointer, byteCount: data.count)
                }
            }
        }
    }

    public func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        contents.withLock { bytes in
            let end = Int(min(range.upperBound, UInt64(bytes.count)))
            for index in Int(min(range.lowerBound, UInt64(bytes.count)))..<end { bytes[index] = 0 }
        }
    }

    public func setLength(_ length: UInt64) throws(DiskError) {
        guard let count = Int(exactly: length), count <= 1 << 32 else {
            throw .system(27, "grow memory beyond 4 GiB", image: name)  // EFBIG
        }
        contents.withLock { bytes in
            if count < bytes.count {
                bytes.removeLast(bytes.count - count)
            } else {
                bytes.append(contentsOf: repeatElement(0, count: count - bytes.count))
            }
        }
    }

    public func flush() {}

    public func allocatedBytes() -> UInt64 { length() }

    public func nextData(from offset: UInt64) -> Range<UInt64>? {
        let end = length()
        return offset < end ? offset..<end : nil
    }
}

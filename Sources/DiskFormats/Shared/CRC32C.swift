internal import CISAL

/// CRC-32C (Castagnoli's polynomial; RFC 3720, section 12.1) by ISA-L. All pointers to that library are in this file.
struct CRC32C {
    private var register = UInt32.max

    /// The checksum of all bytes so far.
    var value: UInt32 { ~register }

    /// Takes in what follows.
    mutating func update(_ bytes: [UInt8]) {
        // The library takes its lengths as Int32; it reads only.
        for start in stride(from: 0, to: bytes.count, by: 1 << 30) {
            unsafe bytes.withUnsafeBufferPointer { memory in
                guard let base = memory.baseAddress else { return }
                let count = Int32(min(memory.count - start, 1 << 30))
                register = unsafe crc32_iscsi(UnsafeMutablePointer(mutating: base + start), count, register)
            }
        }
    }

    /// The checksum of `bytes`.
    static func checksum(_ bytes: [UInt8]) -> UInt32 {
        var sum = CRC32C()
        sum.update(bytes)
        return sum.value
    }
}

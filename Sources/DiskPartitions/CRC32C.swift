internal import CISAL

/// CRC-32C (Castagnoli's polynomial; RFC 3720, section 12.1) by ISA-L. All pointers to that library are in this file.
public struct CRC32C {
    /// The checksum so far as ext4 keeps it: what the standard inverts in the end.
    public private(set) var register: UInt32

    /// Of nothing so far; ext4 begins with what it had elsewhere.
    public init(register: UInt32 = .max) { self.register = register }

    /// The checksum of all bytes so far.
    public var value: UInt32 { ~register }

    /// Takes in what follows.
    public mutating func update(_ bytes: [UInt8]) {
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
    public static func checksum(_ bytes: [UInt8]) -> UInt32 {
        var sum = CRC32C()
        sum.update(bytes)
        return sum.value
    }
}

/// The CRC-16 of ext4's group descriptors (polynomial 0x8005, the least significant bit first; Linux, lib/crc16.c).
struct CRC16 {
    private(set) var value: UInt16 = .max

    mutating func update(_ bytes: some Sequence<UInt8>) {
        for byte in bytes {
            value ^= UInt16(byte)
            for _ in 0..<8 { value = value & 1 != 0 ? value >> 1 ^ 0xa001 : value >> 1 }
        }
    }
}

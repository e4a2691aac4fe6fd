internal import CDeflate

/// The CRC-32 of the GUID partition table (UEFI 2.10, 5.3.2: the polynomial of CCITT, as in zlib and gzip).
public func crc32(_ bytes: [UInt8]) -> UInt32 {
    // The memory is lent for the call, with its length.
    unsafe bytes.withUnsafeBytes { unsafe libdeflate_crc32(0, $0.baseAddress, $0.count) }
}

public import ArgumentParser

/// A size as people read it: `1.5 GiB`.
public func humanSize(_ bytes: UInt64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    var unit = 0
    var scale: UInt64 = 1
    while unit < units.count - 1, bytes / scale >= 1024 {
        scale <<= 10
        unit += 1
    }
    if unit == 0 { return "\(bytes) bytes" }
    let tenths = bytes / scale * 10 + bytes % scale * 10 / scale
    return tenths % 10 == 0 ? "\(tenths / 10) \(units[unit])" : "\(tenths / 10).\(tenths % 10) \(units[unit])"
}

/// A size as people type it: bytes, or K, M, G, T (powers of 1024).
public struct ByteCount: ExpressibleByArgument {
    /// In bytes.
    public let bytes: UInt64

    public init?(argument: String) {
        var digits = argument.uppercased()
        for suffix in ["IB", "B"] where digits.hasSuffix(suffix) {
            digits.removeLast(suffix.count)
            break
        }
        var shift: UInt64 = 0
        if let unit = digits.last, let index = ["K", "M", "G", "T", "P"].firstIndex(of: String(unit)) {
            shift = UInt64(index + 1) * 10
            digits.removeLast()
        }
        guard let number = UInt64(digits) else { return nil }
        let (value, overflow) = number.multipliedReportingOverflow(by: 1 << shift)
        guard !overflow else { return nil }
        bytes = value
    }
}

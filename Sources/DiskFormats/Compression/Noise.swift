internal import DiskStorage

/// Tells bytes that no compressor makes smaller (encrypted or compressed ones) without compressing them.
enum Noise {
    /// Samples, each of so many bytes, over the whole of a block.
    private static let sampleCount = 16
    private static let sampleSize = 256
    /// Of random bytes, chi-squared (255 degrees of freedom) has the mean 255 and the standard deviation 22.6. Text,
    /// code and tables are far above it, counters and patterns below.
    private static let randomRange = 150...400

    /// Whether the samples' bytes are spread as random ones are: neither less evenly nor more.
    static func isLikely(_ bytes: IOBytes) -> Bool {
        let size = sampleSize * sampleCount
        guard bytes.count >= size * 4 else { return false }
        var counts = InlineArray<256, UInt16>(repeating: 0)
        let stride = (bytes.count - sampleSize) / (sampleCount - 1)
        for sample in 0..<sampleCount {
            let start = unsafe bytes.pointer + sample * stride
            for place in 0..<sampleSize {
                counts[Int(unsafe start.load(fromByteOffset: place, as: UInt8.self))] += 1
            }
        }
        var squares = 0
        for value in 0..<256 { squares += Int(counts[value]) * Int(counts[value]) }
        return randomRange.contains(squares * 256 / size - size)
    }
}

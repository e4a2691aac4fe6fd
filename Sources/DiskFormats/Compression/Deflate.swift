internal import CDeflate
internal import DiskStorage

/// DEFLATE (RFC 1951), in its zlib wrapping (RFC 1950) or without one, by libdeflate. All pointers to that library are
/// in this file.
enum Deflate {
    /// Decompressors that are not in use: one allocation serves all later calls.
    private static let idle = Locked<[Decompressor]>([])
    /// Decompressors kept for later calls at most.
    private static let idleLimit = 16

    /// Decompresses the zlib stream at the front of `input` and answers how many bytes it held. What follows the
    /// stream is ignored; a broken stream, or one that holds more than `output` takes, is an error.
    static func inflateZlib(_ input: IOBytes, into output: IOBuffer) throws(DiskError) -> Int {
        let decompressor = try takeDecompressor()
        defer { idle.withLock { if $0.count < idleLimit { $0.append(decompressor) } } }
        return try decompressor.inflateZlib(input, into: output)
    }

    /// The same for a deflate stream without any wrapping.
    static func inflate(_ input: IOBytes, into output: IOBuffer) throws(DiskError) -> Int {
        let decompressor = try takeDecompressor()
        defer { idle.withLock { if $0.count < idleLimit { $0.append(decompressor) } } }
        return try decompressor.inflate(input, into: output)
    }

    private static func takeDecompressor() throws(DiskError) -> Decompressor {
        if let decompressor = idle.withLock({ $0.popLast() }) { return decompressor }
        return try Decompressor()
    }

    /// libdeflate's decompressor, used by one thread at a time.
    @safe
    // Whoever took it from the list of idle ones has it alone.
    private final class Decompressor: @unchecked Sendable {
        private let state: OpaquePointer

        init() throws(DiskError) {
            guard let state = unsafe libdeflate_alloc_decompressor() else { throw Deflate.noMemory }
            unsafe self.state = state
        }

        deinit { unsafe libdeflate_free_decompressor(state) }

        func inflateZlib(_ input: IOBytes, into output: IOBuffer) throws(DiskError) -> Int {
            var taken = 0
            var count = 0
            // Both memories are lent for the call, with their lengths.
            let result = unsafe libdeflate_zlib_decompress_ex(
                state, input.pointer, input.count, output.pointer, output.count, &taken, &count)
            try check(result, "zlib", input.count, output.count)
            return count
        }

        func inflate(_ input: IOBytes, into output: IOBuffer) throws(DiskError) -> Int {
            var taken = 0
            var count = 0
            // Both memories are lent for the call, with their lengths.
            let result = unsafe libdeflate_deflate_decompress_ex(
                state, input.pointer, input.count, output.pointer, output.count, &taken, &count)
            try check(result, "deflate", input.count, output.count)
            return count
        }

        private func check(
            _ result: libdeflate_result, _ kind: StaticString, _ input: Int, _ output: Int
        ) throws(DiskError) {
            switch result {
            case LIBDEFLATE_SUCCESS: break
            case LIBDEFLATE_INSUFFICIENT_SPACE:
                throw DiskError(.invalidImage, "compressed data decompresses to more than \(output) bytes")
            default:
                throw DiskError(.invalidImage, "compressed data is damaged (\(input) bytes of a \(kind) stream)")
            }
        }
    }

    /// Compresses to zlib streams; used by one thread at a time.
    @safe
    final class Compressor {
        private let state: OpaquePointer

        /// `level` is zlib's: 1 is fast, 9 is small, 6 is usual.
        init(level: Int32 = 6) throws(DiskError) {
            precondition((0...12).contains(level))
            guard let state = unsafe libdeflate_alloc_compressor(level) else { throw Deflate.noMemory }
            unsafe self.state = state
        }

        deinit { unsafe libdeflate_free_compressor(state) }

        /// The most bytes that `count` bytes can become.
        func zlibBound(_ count: Int) -> Int { unsafe libdeflate_zlib_compress_bound(state, count) }

        /// Compresses `input` and answers the length of the stream, or nil if it does not fit into `output`.
        func deflateZlib(_ input: IOBytes, into output: IOBuffer) -> Int? {
            let count = unsafe libdeflate_zlib_compress(
                state, input.pointer, input.count, output.pointer, output.count)
            return count == 0 ? nil : count
        }
    }

    private static var noMemory: DiskError { .system(12, "get memory for compression") }  // ENOMEM
}

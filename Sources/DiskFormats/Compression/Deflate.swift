internal import CDeflate
internal import DiskStorage

/// DEFLATE (RFC 1951), in its zlib wrapping (RFC 1950) or without one, by libdeflate. All pointers to that library are
/// in this file.
enum Deflate {
    private static let idle = IdleDecompressors { () throws(DiskError) in try Decompressor() }

    /// Decompresses the zlib stream at the front of `input` and answers how many bytes it held. What follows the
    /// stream is ignored; a broken stream, or one that holds more than `output` takes, is an error.
    static func inflateZlib(_ input: IOBytes, into output: IOBuffer) throws(DiskError) -> Int {
        try idle.lend { (decompressor) throws(DiskError) in try decompressor.inflate(.zlib, input, into: output) }
    }

    /// Fills `output` from a deflate stream without any wrapping; less than that is an error, too.
    static func inflateCluster(_ input: IOBytes, into output: IOBuffer) throws(DiskError) {
        let count = try idle.lend { (decompressor) throws(DiskError) in
            try decompressor.inflate(.deflate, input, into: output)
        }
        guard count == output.count else {
            throw DiskError(.invalidImage, "a compressed cluster holds \(count) of \(output.count) bytes")
        }
    }

    /// What is decompressed.
    private enum Stream: String {
        case zlib, deflate
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

        func inflate(_ stream: Stream, _ input: IOBytes, into output: IOBuffer) throws(DiskError) -> Int {
            var taken = 0
            var count = 0
            // Both memories are lent for the call, with their lengths.
            let result =
                switch stream {
                case .zlib:
                    unsafe libdeflate_zlib_decompress_ex(
                        state, input.pointer, input.count, output.pointer, output.count, &taken, &count)
                case .deflate:
                    unsafe libdeflate_deflate_decompress_ex(
                        state, input.pointer, input.count, output.pointer, output.count, &taken, &count)
                }
            switch result {
            case LIBDEFLATE_SUCCESS: return count
            case LIBDEFLATE_INSUFFICIENT_SPACE:
                throw DiskError(.invalidImage, "compressed data decompresses to more than \(output.count) bytes")
            default:
                throw DiskError(
                    .invalidImage,
                    "compressed data is damaged (\(input.count) bytes of a \(stream.rawValue) stream)")
            }
        }
    }

    /// Compresses to zlib or deflate streams; used by one thread at a time.
    @safe
    final class Compressor {
        private let state: OpaquePointer
        /// For what does not get smaller: bytes are copied to the stream.
        private let storing: OpaquePointer

        /// `level` is zlib's: 1 is fast, 9 is small, 6 is usual.
        init(level: Int32 = 6) throws(DiskError) {
            precondition((0...12).contains(level))
            guard let state = unsafe libdeflate_alloc_compressor(level) else { throw Deflate.noMemory }
            guard let storing = unsafe libdeflate_alloc_compressor(0) else {
                unsafe libdeflate_free_compressor(state)
                throw Deflate.noMemory
            }
            unsafe self.state = state
            unsafe self.storing = storing
        }

        deinit {
            unsafe libdeflate_free_compressor(state)
            unsafe libdeflate_free_compressor(storing)
        }

        /// The most bytes that `count` bytes can become.
        func zlibBound(_ count: Int) -> Int {
            unsafe max(
                libdeflate_zlib_compress_bound(state, count), libdeflate_zlib_compress_bound(storing, count))
        }

        /// Compresses `input` and answers the length of the stream, or nil if it does not fit into `output`.
        func deflateZlib(_ input: IOBytes, into output: IOBuffer) -> Int? {
            let compressor = Noise.isLikely(input) ? unsafe storing : unsafe state
            let count = unsafe libdeflate_zlib_compress(
                compressor, input.pointer, input.count, output.pointer, output.count)
            return count == 0 ? nil : count
        }

        /// The same without any wrapping; nil also for what would not get smaller.
        func deflate(_ input: IOBytes, into output: IOBuffer) -> Int? {
            if Noise.isLikely(input) { return nil }
            let count = unsafe libdeflate_deflate_compress(
                state, input.pointer, input.count, output.pointer, output.count)
            return count == 0 ? nil : count
        }
    }

    private static var noMemory: DiskError { .system(12, "get memory for compression") }  // ENOMEM
}

internal import CZstd
internal import DiskStorage

/// Zstandard (RFC 8878), by libzstd. All pointers to that library are in this file.
enum Zstandard {
    private static let idle = IdleDecompressors { () throws(DiskError) in try Decompressor() }

    /// Decompresses the frames at the front of `input` until `output` is full, and ignores what follows them. Fewer
    /// bytes, or a frame that holds more, are an error.
    ///
    /// Each frame goes straight to its place, so that it takes no memory beyond `output`, whatever window it asks for.
    static func decompress(_ input: IOBytes, into output: IOBuffer) throws(DiskError) {
        try idle.lend { (decompressor) throws(DiskError) in
            var taken = 0
            var done = 0
            while done < output.count {
                let (frame, count) = try decompressor.decompressFrame(
                    input.slice(taken, input.count - taken), into: output.slice(done, output.count - done))
                taken += frame
                done += count
            }
        }
    }

    /// Compresses to frames; used by one thread at a time.
    @safe
    final class Compressor {
        private let context: OpaquePointer
        /// The library's own level for who says nothing.
        private static let level: Int32 = 3

        init() throws(DiskError) {
            guard let context = unsafe ZSTD_createCCtx() else {
                throw .system(12, "get memory for compression")  // ENOMEM
            }
            unsafe self.context = context
        }

        deinit { unsafe ZSTD_freeCCtx(context) }

        /// Compresses `input` to one frame and answers its length, or nil if it does not fit into `output`.
        func compress(_ input: IOBytes, into output: IOBuffer) -> Int? {
            let count = unsafe ZSTD_compressCCtx(
                context, output.pointer, output.count, input.pointer, input.count, Self.level)
            return ZSTD_isError(count) == 0 ? count : nil
        }
    }

    /// libzstd's decompressor, used by one thread at a time.
    @safe
    // Whoever took it from the list of idle ones has it alone.
    private final class Decompressor: @unchecked Sendable {
        private let context: OpaquePointer

        init() throws(DiskError) {
            guard let context = unsafe ZSTD_createDCtx() else {
                throw .system(12, "get memory for decompression")  // ENOMEM
            }
            unsafe self.context = context
        }

        deinit { unsafe ZSTD_freeDCtx(context) }

        /// Decompresses one frame; answers how many bytes it had, and how many it has become.
        func decompressFrame(_ input: IOBytes, into output: IOBuffer) throws(DiskError) -> (frame: Int, count: Int) {
            // Both memories are lent for the calls, with their lengths.
            let frame = unsafe ZSTD_findFrameCompressedSize(input.pointer, input.count)
            guard ZSTD_isError(frame) == 0, frame > 0 else { throw Self.damaged(input.count) }
            let count = unsafe ZSTD_decompressDCtx(context, output.pointer, output.count, input.pointer, frame)
            guard ZSTD_isError(count) == 0 else { throw Self.damaged(input.count) }
            return (frame, count)
        }

        private static func damaged(_ count: Int) -> DiskError {
            DiskError(.invalidImage, "compressed data is damaged (\(count) bytes of Zstandard frames)")
        }
    }
}

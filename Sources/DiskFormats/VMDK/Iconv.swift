internal import DiskStorage
internal import Glibc

/// The C library's converter between character encodings. All pointers to it are in this file.
enum Iconv {
    /// Converts a whole text, or answers nil if it is not valid in `source` or has characters that `target` lacks.
    static func convert(_ text: [UInt8], from source: String, to target: String) throws(DiskError) -> [UInt8]? {
        guard let converter = unsafe iconv_open(target, source), unsafe converter != failure else {
            throw DiskError(
                .unsupported,
                "this system cannot convert text from \(source) to \(target): install its conversion modules "
                    + "(Debian: libc6, libc-gconv-modules-extra)")
        }
        defer { unsafe iconv_close(converter) }
        // No encoding that is asked for needs more than four bytes for what another says in one, and none has states.
        var output = [CChar](repeating: 0, count: text.count * 4 + 16)
        var input = text.map { CChar(bitPattern: $0) }
        var inputLeft = input.count
        var outputLeft = output.count
        let result = unsafe input.withUnsafeMutableBufferPointer { source in
            unsafe output.withUnsafeMutableBufferPointer { target in
                var from = source.baseAddress
                var to = target.baseAddress
                // Both memories live in the enclosing scopes; the library keeps to the lengths given with them.
                return unsafe iconv(converter, &from, &inputLeft, &to, &outputLeft)
            }
        }
        // Not zero: characters were replaced by others, which is a loss too.
        guard result == 0, inputLeft == 0 else { return nil }
        return output.prefix(output.count - outputLeft).map { UInt8(bitPattern: $0) }
    }

    /// What `iconv_open` answers when it fails: `(iconv_t) -1`.
    private static var failure: iconv_t? { unsafe iconv_t(bitPattern: -1) }
}

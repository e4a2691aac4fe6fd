import Glibc

/// Calls a body with the strings as C strings, valid until it returns; one nil follows the last.
func withCStrings<Result>(_ list: [String], _ body: (UnsafeBufferPointer<UnsafePointer<CChar>?>) -> Result) -> Result {
    let copies = unsafe list.map { unsafe UnsafePointer(strdup($0)) } + [nil]
    defer {
        for index in unsafe copies.indices { unsafe free(UnsafeMutablePointer(mutating: copies[index])) }
    }
    return unsafe copies.withUnsafeBufferPointer(body)
}

/// The text in a buffer that a C function filled, up to its zero byte.
func text(from buffer: [CChar]) -> String {
    String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
}

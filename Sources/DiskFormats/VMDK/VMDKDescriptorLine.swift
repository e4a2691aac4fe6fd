/// One line of a descriptor: its bytes as they were read, and what they mean.
///
/// A line that nothing changes is written as it was, byte for byte; one that is changed keeps its key's spelling, the
/// blanks round the `=` and its quotes.
struct VMDKDescriptorLine: Sendable {
    /// The bytes without the line feed (a carriage return before it is among them); nil: to be made from the content.
    var raw: [UInt8]?
    var content: Content

    enum Content: Sendable {
        /// A comment, a blank line or something unknown.
        case other
        case entry(Entry)
        /// An extent's line, as it was when ``raw`` was read.
        case extent(VMDKExtentDescription)
    }

    /// `key = "value"`.
    struct Entry: Sendable {
        /// What stands before the key: blanks.
        var leading = ""
        /// The key as it is written.
        var key: String
        /// The `=` with the blanks round it.
        var equals: String
        var isQuoted: Bool
        var value: String
        /// What stands after the value: blanks.
        var trailing = ""

        /// An entry in the usual style of its section: `key=value` in the header, `ddb.key = "value"` in the database.
        init(key: String, value: String, isQuoted: Bool) {
            self.key = key
            self.value = value
            self.isQuoted = isQuoted
            equals = key.utf8.count > 4 && hasSameLetters(key.prefix(4), "ddb.") ? " = " : "="
        }

        /// The entry that a line is, or nil if it is none.
        init?(parsing line: String) {
            let text = line.utf8
            let start = text.drop(while: isBlank)
            guard let first = start.first, first != UInt8(ascii: "#"), first != UInt8(ascii: "=") else { return nil }
            guard let equalSign = start.firstIndex(of: UInt8(ascii: "=")) else { return nil }
            let paddedKey = start[..<equalSign]
            let keyLength = paddedKey.reversed().drop(while: isBlank).count
            let keyEnd = start.index(start.startIndex, offsetBy: keyLength)
            let value = start[start.index(after: equalSign)...].drop(while: isBlank)
            leading = String(Substring(text[..<start.startIndex]))
            key = String(Substring(start[..<keyEnd]))
            equals = String(Substring(start[keyEnd..<value.startIndex]))
            let contentLength = value.reversed().drop(while: isBlank).count
            let end = value.index(value.startIndex, offsetBy: contentLength)
            trailing = String(Substring(value[end...]))
            let content = value[..<end]
            // The quotes are the first and the last character: what stands between may hold further ones.
            isQuoted = contentLength >= 2 && content.first == quote && content.last == quote
            self.value = String(Substring(isQuoted ? content.dropFirst().dropLast() : content))
        }

        /// Takes a new value; quotes are added if it needs them.
        mutating func set(_ newValue: String) {
            value = newValue
            if !isQuoted, newValue.isEmpty || newValue.utf8.contains(where: { isBlank($0) || $0 == quote }) {
                isQuoted = true
            }
        }

        /// The line for it.
        var line: String { leading + key + equals + (isQuoted ? "\"\(value)\"" : value) + trailing }
    }
}

/// The quotation mark.
private let quote = UInt8(ascii: "\"")

/// Whether two texts are the same but for the case of ASCII letters.
func hasSameLetters(_ a: some StringProtocol, _ b: some StringProtocol) -> Bool {
    a.utf8.elementsEqual(b.utf8) { lowercased($0) == lowercased($1) }
}

private func lowercased(_ byte: UInt8) -> UInt8 {
    (UInt8(ascii: "A")...UInt8(ascii: "Z")).contains(byte) ? byte | 0x20 : byte
}

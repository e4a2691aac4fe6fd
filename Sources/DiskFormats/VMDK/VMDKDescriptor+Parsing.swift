internal import DiskStorage

extension VMDKDescriptor {
    /// Whether a file that begins with these bytes is a descriptor: its first line says so or, where that comment is
    /// missing, it has a version and says of which kind it is.
    static func looksLikeDescriptor(_ head: [UInt8]) -> Bool {
        var hasVersion = false
        for bytes in text(in: head).prefix(4096).split(separator: UInt8(ascii: "\n")) {
            let line = String(decoding: bytes, as: UTF8.self)
            if isTitle(line) { return true }
            let start = trimmed(line)
            if start.isEmpty || start.hasPrefix("#") { continue }
            guard let entry = VMDKDescriptorLine.Entry(parsing: line) else { return false }
            if !hasVersion {
                guard hasSameLetters(entry.key, "version"), isKnownVersion(entry.value) else { return false }
                hasVersion = true
            } else if hasSameLetters(entry.key, "createType") || hasSameLetters(entry.key, "parentCID") {
                return true
            }
        }
        return false
    }

    /// Whether a line is `# Disk DescriptorFile`, with or without its blanks.
    private static func isTitle(_ line: String) -> Bool {
        hasSameLetters(line.filter { !$0.isWhitespace }, "#DiskDescriptorFile")
    }

    private static func isKnownVersion(_ text: String) -> Bool { Int(text).map { (1...4).contains($0) } ?? false }

    /// The bytes of the text: from after a byte order mark and blank lines on, to the first NUL.
    private static func text(in bytes: [UInt8]) -> ArraySlice<UInt8> {
        var text = bytes.prefix { $0 != 0 }
        if text.starts(with: [0xef, 0xbb, 0xbf]) { text = text.dropFirst(3) }
        return text.drop { isBlank($0) || $0 == UInt8(ascii: "\n") }
    }

    /// Parses the text. Padding with NULs ends it.
    init(parsing bytes: [UInt8]) throws(DiskError) {
        let text = Self.text(in: bytes)
        guard text.count <= Self.textLimit else {
            throw DiskError(.invalidImage, "the descriptor has \(text.count) bytes; \(Self.textLimit) are the limit")
        }
        guard Self.looksLikeDescriptor(Array(text.prefix(4096))) else {
            throw DiskError(
                .invalidImage, "this is not a VMDK descriptor: it does not begin with '# Disk DescriptorFile'")
        }
        guard text.count(where: { $0 == UInt8(ascii: "\n") }) < Self.lineLimit else {
            throw DiskError(.invalidImage, "the descriptor has more than \(Self.lineLimit) lines")
        }
        var pieces = text.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        let endsWithNewline = pieces.last?.isEmpty ?? false
        if endsWithNewline { pieces.removeLast() }
        self.init(lines: [], encoding: try Self.findEncoding(pieces, of: text), extents: [])
        leading = Array(bytes[..<text.startIndex])
        self.endsWithNewline = endsWithNewline
        usesCarriageReturns = pieces.first?.last == 13
        lines.reserveCapacity(pieces.count)
        for piece in pieces { try parseLine(piece) }
        try checkValues()
    }

    private mutating func parseLine(_ bytes: ArraySlice<UInt8>) throws(DiskError) {
        var line = VMDKDescriptorLine(raw: Array(bytes), content: .other)
        let decoded = try encoding.decode(line.raw ?? [])
        // A line that is not text in the encoding is shown as well as can be, and written back as it was.
        let text = decoded ?? String(decoding: bytes, as: UTF8.self)
        if VMDKExtentDescription.isExtentLine(text) {
            guard decoded != nil else {
                throw DiskError(.invalidImage, "the extent line '\(clipped(text))' is not text in \(encoding.name)")
            }
            guard extents.count < Self.extentLimit else {
                throw DiskError(.invalidImage, "the descriptor has more than \(Self.extentLimit) extents")
            }
            let extent = try VMDKExtentDescription(parsing: text)
            extents.append(extent)
            line.content = .extent(extent)
        } else if let entry = VMDKDescriptorLine.Entry(parsing: text) {
            line.content = .entry(entry)
        }
        lines.append(line)
    }

    private func checkValues() throws(DiskError) {
        if let version = value("version"), !Self.isKnownVersion(version) {
            throw DiskError(.unsupported, "the descriptor's version is '\(clipped(version))'; 1 to 4 are known")
        }
        var sectors: UInt64 = 0
        for extent in extents {
            sectors = try sectors.adding(extent.sectorCount, "the size of the disk")
            guard sectors <= VMDKExtentDescription.sectorLimit else {
                throw DiskError(
                    .invalidImage, "the extents have more than \(VMDKExtentDescription.sectorLimit) sectors together")
            }
        }
    }

    /// The encoding that the text names or, if it is not valid in that one, UTF-8 or windows-1252.
    private static func findEncoding(
        _ lines: [ArraySlice<UInt8>], of text: ArraySlice<UInt8>
    ) throws(DiskError) -> TextEncoding {
        let name = encodingName(lines)
        let declared = name.map { TextEncoding(name: $0) } ?? .utf8
        let bytes = Array(text)
        if bytes.allSatisfy({ $0 < 0x80 }) { return declared ?? .ascii }
        guard let declared else {
            throw DiskError(.unsupported, "the descriptor's encoding '\(clipped(name ?? ""))' is not known")
        }
        for encoding in [declared, .utf8] where try encoding.decode(bytes) != nil { return encoding }
        return .windows1252
    }

    /// VMware's products write `encoding` in the header, some `ddb.encoding` alone. Keys are ASCII in every encoding.
    private static func encodingName(_ lines: [ArraySlice<UInt8>]) -> String? {
        var databaseName: String?
        for bytes in lines {
            let start = bytes.drop(while: isBlank).first
            guard let start, [UInt8(ascii: "e"), UInt8(ascii: "d")].contains(start | 0x20) else { continue }
            guard let entry = VMDKDescriptorLine.Entry(parsing: String(decoding: bytes, as: UTF8.self)) else {
                continue
            }
            if hasSameLetters(entry.key, "encoding") { return entry.value }
            if databaseName == nil, hasSameLetters(entry.key, "ddb.encoding") { databaseName = entry.value }
        }
        return databaseName
    }
}

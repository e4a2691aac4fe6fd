internal import DiskStorage

/// How an extent may be used, as its line in the descriptor begins.
enum VMDKExtentAccess: String, Sendable, CaseIterable {
    case readWrite = "RW"
    case readOnly = "RDONLY"
    case noAccess = "NOACCESS"
}

/// What an extent is, as its line in the descriptor says.
enum VMDKExtentType: String, Sendable, CaseIterable {
    /// The bytes themselves, in a file from some sector on.
    case flat = "FLAT"
    /// A hosted sparse extent (``VMDKSparseHeader``).
    case sparse = "SPARSE"
    /// Zeros; there is no file.
    case zero = "ZERO"
    /// The bytes themselves, in a file on ESX.
    case vmfs = "VMFS"
    /// An ESX sparse extent (``COWDHeader``).
    case vmfsSparse = "VMFSSPARSE"
    /// The bytes themselves, in a thin file on ESX.
    case vmfsThin = "VMFSTHIN"
    /// A space-efficient sparse extent (``SESparseHeader``).
    case seSparse = "SESPARSE"
    /// A redo log on vSAN.
    case vsanSparse = "VSANSPARSE"
    /// A device, mapped by ESX.
    case vmfsRDM = "VMFSRDM"
    /// A device, used by ESX as it is.
    case vmfsRaw = "VMFSRAW"

    /// Whether the extent's bytes lie in its file as they are.
    var isFlat: Bool {
        switch self {
        case .flat, .vmfs, .vmfsThin, .vmfsRDM, .vmfsRaw: true
        case .sparse, .zero, .vmfsSparse, .seSparse, .vsanSparse: false
        }
    }

    /// Whether the extent's file has a header and tables.
    var isSparse: Bool { !isFlat && self != .zero }
}

/// A line of the descriptor's extent section (VMware Virtual Disk Format 5.0, "The Extent Description"):
///
///     ACCESS SECTORS TYPE ["FILE" [OFFSET [REST]]]
///
/// as in `RW 4192256 SPARSE "disk-s001.vmdk"`. SECTORS and OFFSET are in sectors of 512 bytes.
struct VMDKExtentDescription: Sendable, Equatable {
    var access: VMDKExtentAccess
    var sectorCount: UInt64
    var type: VMDKExtentType
    /// The file, relative to the descriptor's folder; nil for ``VMDKExtentType/zero``.
    var fileName: String?
    /// The sector of the file at which the extent begins.
    var fileOffsetSector: UInt64
    /// What follows the offset (a partition's UUID, a device's identifier), as it is written; empty if nothing does.
    var rest: String

    init(
        access: VMDKExtentAccess = .readWrite, sectorCount: UInt64, type: VMDKExtentType, fileName: String? = nil,
        fileOffsetSector: UInt64 = 0, rest: String = ""
    ) {
        self.access = access
        self.sectorCount = sectorCount
        self.type = type
        self.fileName = fileName
        self.fileOffsetSector = fileOffsetSector
        self.rest = rest
    }

    /// Sectors of a disk at most: its size in bytes fits into 63 bits.
    static let sectorLimit: UInt64 = 1 << 54

    /// Whether a line is one of an extent: it begins with an access word of its own.
    static func isExtentLine(_ line: String) -> Bool {
        var words = WordScanner(line)
        guard let word = words.next(), VMDKExtentAccess(rawValue: word.uppercased()) != nil else { return false }
        return !words.rest.hasPrefix("=")
    }

    /// Parses a line for which ``isExtentLine(_:)`` holds.
    init(parsing line: String) throws(DiskError) {
        var words = WordScanner(line)
        guard let accessWord = words.next(), let access = VMDKExtentAccess(rawValue: accessWord.uppercased()) else {
            throw Self.malformed(line, "it begins with none of RW, RDONLY, NOACCESS")
        }
        guard let sectors = words.next().flatMap({ UInt64($0) }), sectors <= Self.sectorLimit else {
            throw Self.malformed(line, "its size is not a number of sectors up to \(Self.sectorLimit)")
        }
        guard let typeWord = words.next() else { throw Self.malformed(line, "it has no type") }
        guard let type = VMDKExtentType(rawValue: typeWord.uppercased()) else {
            throw DiskError(.unsupported, "an extent is of the unknown type '\(clipped(typeWord))'")
        }
        self.init(access: access, sectorCount: sectors, type: type)
        fileName = try words.nextQuoted(in: line)
        if fileName == nil || fileName == "" {
            guard type == .zero || access == .noAccess else { throw Self.malformed(line, "it names no file") }
            fileName = nil
        }
        guard let word = words.next() else { return }
        guard let offset = UInt64(word), offset <= Self.sectorLimit else {
            throw Self.malformed(line, "its offset is not a number of sectors up to \(Self.sectorLimit)")
        }
        fileOffsetSector = offset
        rest = words.rest
    }

    /// The line for it.
    var line: String {
        var text = "\(access.rawValue) \(sectorCount) \(type.rawValue)"
        guard let fileName else { return text }
        text += " \"\(fileName)\""
        if type == .flat || fileOffsetSector != 0 || !rest.isEmpty { text += " \(fileOffsetSector)" }
        if !rest.isEmpty { text += " " + rest }
        return text
    }

    fileprivate static func malformed(_ line: String, _ reason: String) -> DiskError {
        DiskError(.invalidImage, "the extent line '\(clipped(line))' is malformed: \(reason)")
    }
}

/// The beginning of a text from an image, for a message.
func clipped(_ text: String) -> String { text.printable(limit: 120) }

/// Takes words off a line, one after the other.
private struct WordScanner {
    private var text: Substring.UTF8View

    init(_ line: String) { text = Substring(line).utf8 }

    /// What has not been taken, without the blanks round it.
    var rest: String { trimmed(String(Substring(text))) }

    /// The next word, or nil at the end.
    mutating func next() -> String? {
        skipBlanks()
        let word = text.prefix { !isBlank($0) }
        text = text.dropFirst(word.count)
        return word.isEmpty ? nil : String(Substring(word))
    }

    /// The next word if it stands in quotes. It ends at the first quote which a blank or the line's end follows: a name
    /// may hold quotes of its own.
    mutating func nextQuoted(in line: String) throws(DiskError) -> String? {
        skipBlanks()
        guard text.first == UInt8(ascii: "\"") else { return nil }
        let inner = text.dropFirst()
        var index = inner.startIndex
        while index < inner.endIndex {
            let following = inner.index(after: index)
            if inner[index] == UInt8(ascii: "\""), following == inner.endIndex || isBlank(inner[following]) {
                text = inner[following...]
                return String(Substring(inner[..<index]))
            }
            index = following
        }
        throw VMDKExtentDescription.malformed(line, "its file name has no closing quote")
    }

    private mutating func skipBlanks() { text = text.drop(while: isBlank) }
}

/// Whether a byte is a space or a tab, or the return of a CRLF.
func isBlank(_ byte: UInt8) -> Bool {
    byte == UInt8(ascii: " ") || byte == UInt8(ascii: "\t") || byte == UInt8(ascii: "\r")
}

/// A text without the blanks round it.
func trimmed(_ text: String) -> String {
    let start = text.utf8.drop(while: isBlank)
    let end = start.reversed().drop(while: isBlank)
    return String(Substring(start.prefix(end.count)))
}

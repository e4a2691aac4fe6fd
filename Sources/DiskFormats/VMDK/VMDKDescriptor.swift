internal import DiskStorage

/// A VMDK's descriptor: the text that says what the disk consists of (VMware Virtual Disk Format 5.0, "The Descriptor
/// File"; docs/formats-vmdk.md).
///
/// | section | lines |
/// |---|---|
/// | header | `version=1`, `encoding="UTF-8"`, `CID=…`, `parentCID=…`, `createType="…"`, `parentFileNameHint="…"`, … |
/// | extents | ``VMDKExtentDescription`` |
/// | disk database | `ddb.adapterType = "ide"`, `ddb.geometry.cylinders = "20"`, `ddb.uuid.image = "…"`, … |
///
/// All lines are kept in their order, those that mean nothing here too; what is changed is changed in its place. Keys
/// are the same in any case. Of several lines with one key the first counts, as for QEMU and VirtualBox.
struct VMDKDescriptor: Sendable {
    /// The parentCID of a disk that has no parent.
    static let noContentID: UInt32 = 0xffff_ffff
    /// The CID of a disk whose `ddb.longContentID` counts.
    static let longContentIDMark: UInt32 = 0xffff_fffe
    /// Bytes of the text at most.
    static let textLimit = 2 << 20
    /// Lines at most: no text that another program writes comes near, and each takes memory.
    static let lineLimit = 100_000
    /// Extents at most.
    static let extentLimit = 65_536

    /// What stands before the text: a byte order mark and blank lines.
    var leading: [UInt8] = []
    /// The text, line by line.
    var lines: [VMDKDescriptorLine]
    /// How names and other values are written.
    var encoding: TextEncoding
    /// Whether lines end in CRLF.
    var usesCarriageReturns = false
    /// Whether the last line has an end.
    var endsWithNewline = true
    /// The extents, in the order of the disk.
    var extents: [VMDKExtentDescription]
}

// MARK: - Entries by name

extension VMDKDescriptor {
    /// The value of a header entry (`createType`) or, with its prefix, of a database entry (`ddb.uuid`).
    func value(_ key: String) -> String? {
        for line in lines {
            if case .entry(let entry) = line.content, hasSameLetters(entry.key, key) { return entry.value }
        }
        return nil
    }

    /// Changes an entry in its place, adds it at the end of its section, or (with nil) removes it.
    ///
    /// A value that cannot be written (it has a line end, or a character that the encoding lacks) is found by
    /// ``encoded()``.
    mutating func setValue(_ key: String, _ value: String?, isQuoted: Bool = true) {
        let isOurs = { (line: VMDKDescriptorLine) -> Bool in
            if case .entry(let entry) = line.content { return hasSameLetters(entry.key, key) }
            return false
        }
        guard let value else {
            lines.removeAll(where: isOurs)
            return
        }
        guard let index = lines.firstIndex(where: isOurs), case .entry(var entry) = lines[index].content else {
            let entry = VMDKDescriptorLine.Entry(key: key, value: value, isQuoted: isQuoted)
            lines.insert(VMDKDescriptorLine(content: .entry(entry)), at: placeForNewEntry(key))
            return
        }
        guard entry.value != value else { return }
        entry.set(value)
        lines[index] = VMDKDescriptorLine(content: .entry(entry))
    }

    /// After the last entry of the same section; a new database section begins at the end.
    private mutating func placeForNewEntry(_ key: String) -> Int {
        let isDatabase = hasSameLetters(key.prefix(4), "ddb.")
        let last = lines.lastIndex { line in
            if case .entry(let entry) = line.content {
                return hasSameLetters(entry.key.prefix(4), "ddb.") == isDatabase
            }
            return false
        }
        if let last { return last + 1 }
        if isDatabase {
            if lines.contains(where: { $0.raw.map { trimmed(String(decoding: $0, as: UTF8.self)) } == "#DDB" }) == false
            {
                for text in ["", "# The Disk Data Base", "#DDB", ""] { append(text) }
            }
            return lines.count
        }
        return lines.isEmpty ? 0 : 1
    }

    /// Adds a line of ASCII characters.
    mutating func append(_ text: String) {
        lines.append(VMDKDescriptorLine(raw: Array(text.utf8) + (usesCarriageReturns ? [13] : []), content: .other))
    }

    /// The value of `ddb.KEY`.
    func diskDatabase(_ key: String) -> String? { value("ddb." + key) }

    /// Changes, adds or (with nil) removes `ddb.KEY`.
    mutating func setDiskDatabase(_ key: String, _ newValue: String?) { setValue("ddb." + key, newValue) }
}

// MARK: - The header's entries

extension VMDKDescriptor {
    /// The version, 1 to 4; 1 if there is none.
    var version: Int { value("version").flatMap { Int($0) } ?? 1 }

    /// The content identifier: a new random number at the first write after an open. 0 if there is none, as for QEMU.
    var contentID: UInt32 {
        get { value("CID").flatMap(Self.parseContentID) ?? 0 }
        set { setValue("CID", Self.hexadecimal(newValue), isQuoted: false) }
    }

    /// The parent's content identifier when the child was made; ``noContentID`` for a base.
    var parentContentID: UInt32 {
        get { value("parentCID").flatMap(Self.parseContentID) ?? Self.noContentID }
        set { setValue("parentCID", Self.hexadecimal(newValue), isQuoted: false) }
    }

    /// The kind of image by name, as it is written.
    var createTypeName: String {
        get { value("createType") ?? "" }
        set { setValue("createType", newValue) }
    }

    /// The kind of image; nil if the name is unknown.
    var createType: VMDKCreateType? { VMDKCreateType(name: createTypeName) }

    /// How the parent was called when the child was made: a relative or absolute path, of any system.
    var parentFileNameHint: String? {
        get { value("parentFileNameHint") }
        set { setValue("parentFileNameHint", newValue) }
    }

    /// Whether the snapshot is one of the storage array.
    var isNativeSnapshot: Bool { value("isNativeSnapshot").map { hasSameLetters($0, "yes") } ?? false }

    /// The file in which ESX tracks which blocks changed.
    var changeTrackPath: String? {
        get { value("changeTrackPath").flatMap { $0.isEmpty ? nil : $0 } }
        set { setValue("changeTrackPath", newValue) }
    }

    private static func parseContentID(_ text: String) -> UInt32? {
        let digits = hasSameLetters(text.prefix(2), "0x") ? text.dropFirst(2) : text[...]
        return digits.first == "+" ? nil : UInt32(digits, radix: 16)
    }

    static func hexadecimal(_ number: UInt32) -> String {
        let digits = String(number, radix: 16)
        return String(repeating: "0", count: 8 - digits.count) + digits
    }

    /// Sectors of the disk: all extents together. ``init(parsing:)`` has checked that there are not too many.
    var sectorCount: UInt64 { extents.reduce(0) { $0 &+ $1.sectorCount } }
}

/// The kinds of images (`createType`).
enum VMDKCreateType: String, Sendable, CaseIterable {
    case monolithicSparse
    case monolithicFlat
    case twoGbMaxExtentSparse
    case twoGbMaxExtentFlat
    case streamOptimized
    case vmfs
    case vmfsSparse
    case vmfsThin
    case vmfsPreallocated
    case vmfsEagerZeroedThick
    case seSparse
    case vsanSparse
    case fullDevice
    case partitionedDevice
    case vmfsRaw
    case vmfsRDM
    case vmfsRDMP
    case custom

    /// The kind of that name, in any case; some have two.
    init?(name: String) {
        switch name.lowercased() {
        case "2gbmaxextentsparse": self = .twoGbMaxExtentSparse
        case "2gbmaxextentflat": self = .twoGbMaxExtentFlat
        case "vmfsrawdevicemap": self = .vmfsRDM
        case "vmfspassthroughrawdevicemap": self = .vmfsRDMP
        case let lower:
            guard let found = Self.allCases.first(where: { $0.rawValue.lowercased() == lower }) else { return nil }
            self = found
        }
    }
}

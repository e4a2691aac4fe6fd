public import DiskStorage

/// What a partition or disk can hold, as far as its magic numbers tell; raw values are the names that Linux' tools use.
public enum FileSystemKind: String, Sendable, CaseIterable {
    case ext2
    case ext3
    case ext4
    case xfs
    case btrfs
    case vfat
    case exfat
    case ntfs
    case iso9660
    case hfs
    case hfsplus
    case apfs
    case f2fs
    case squashfs
    case refs = "ReFS"
    case swap
    /// A swap area that a sleeping system's memory is in.
    case swapSuspended = "swsuspend"
    case luks = "crypto_LUKS"
    case bitLocker = "BitLocker"
    case lvm2 = "LVM2_member"
    case linuxRAID = "linux_raid_member"
    case zfs = "zfs_member"

    /// Whether there are files in it that could be mounted; the others are swap, or hold or hide something else.
    public var isMountable: Bool {
        switch self {
        case .swap, .swapSuspended, .luks, .bitLocker, .lvm2, .linuxRAID, .zfs: false
        default: true
        }
    }
}

/// What was found in a partition.
public struct FileSystem: Sendable, Equatable {
    public let kind: FileSystemKind
    /// Which of its variants, such as `FAT32`, or the version of LUKS or RAID metadata.
    public let version: String?
    /// The label that its user gave it.
    public let label: String?
    /// Its UUID, or the serial number that Linux shows as such.
    public let uuid: String?

    init(_ kind: FileSystemKind, version: String? = nil, label: String? = nil, uuid: String? = nil) {
        self.kind = kind
        self.version = version
        self.label = label
        self.uuid = uuid
    }

    /// Looks at what the `length` bytes from `offset` on hold; nil if it is nothing known, or not inside the source.
    /// An error means that the source cannot be read.
    ///
    /// Where several magic numbers are found, what encloses something else comes first (a RAID member before the file
    /// system of which it has a copy), and then what is written nearer to the front: it was written over more.
    public static func detect(
        in source: some SectorSource, offset: UInt64, length: UInt64
    ) throws(DiskError) -> FileSystem? {
        try Probe(source, offset: offset, length: length)?.detect()
    }

    /// Whether anything known is there, as far as it can be read.
    static func isKnown(in source: some SectorSource, offset: UInt64, length: UInt64) -> Bool {
        (try? detect(in: source, offset: offset, length: length)) != nil
    }
}

/// A range of a source, relative to its beginning, of which the front is read already.
struct Probe<Source: SectorSource> {
    private let source: Source
    private let offset: UInt64
    /// Bytes in the range.
    let length: UInt64
    /// The bytes at the front.
    private let front: FieldReader

    /// Enough for all superblocks at the front, of which btrfs' (at 64 KiB) is the last.
    private static var frontSize: UInt64 { 72 << 10 }

    /// Nil if the range is not inside the source.
    init?(_ source: Source, offset: UInt64, length: UInt64) throws(DiskError) {
        guard offset <= source.size, length <= source.size - offset else { return nil }
        self.source = source
        self.offset = offset
        self.length = length
        guard let front = try source.fields(at: offset, count: Int(min(length, Self.frontSize))) else { return nil }
        self.front = front
    }

    /// The fields of a structure of `count` bytes, or nil if the range ends before.
    func fields(at position: UInt64, count: Int) throws(DiskError) -> FieldReader? {
        guard count >= 0, position <= length, UInt64(count) <= length - position else { return nil }
        if position < UInt64(front.count), count <= front.count - Int(position) {
            return FieldReader(try front.bytes(at: Int(position), count: count))
        }
        // Inside the range, which is inside the source.
        return try source.fields(at: offset + position, count: count)
    }

    /// The structure of `count` bytes that `parse` finds there, or nil: it is none, or the range ends before.
    func structure<T>(
        at position: UInt64, count: Int, _ parse: (FieldReader) throws(DiskError) -> T?
    ) throws(DiskError) -> T? {
        guard let fields = try fields(at: position, count: count) else { return nil }
        return try parse(fields)
    }
}

extension Probe {
    /// Looks for all kinds, in the order that ``FileSystem/detect(in:offset:length:)`` states.
    func detect() throws(DiskError) -> FileSystem? {
        let detectors: [(Self) -> () throws(DiskError) -> FileSystem?] = [
            Self.linuxRAID, Self.bitLocker, Self.luks, Self.lvm2, Self.zfs,
            Self.xfs, Self.squashfs, Self.ntfs, Self.exfat, Self.refs, Self.apfs, Self.vfat,
            Self.ext, Self.f2fs, Self.hfs, Self.swap, Self.iso9660, Self.btrfs,
        ]
        for detector in detectors {
            if let found = try detector(self)() { return found }
        }
        return nil
    }
}

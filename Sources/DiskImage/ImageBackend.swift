public import DiskStorage

/// An open image: translates between offsets of the disk and places in its storages, and never moves guest data.
///
/// The disk calls it from many threads. ``map(offset:length:into:)`` may run beside anything;
/// ``reserve(offset:length:)``, ``commit(_:)`` and ``drop(offset:length:leaving:)`` for one block are never called at
/// the same time by the disk, which holds that block's lock, but may run for different blocks at once.
public protocol ImageBackend: AnyObject, Sendable {
    /// The format's name, as in the registry.
    var format: String { get }
    /// The size of the disk in bytes.
    var virtualSize: UInt64 { get }
    /// The unit of allocation in bytes: a power of two, or 0 if everything is always allocated. Every block lies inside
    /// one aligned unit of this size.
    var blockSize: UInt64 { get }
    /// The bytes of a sector: 512 or 4096.
    var sectorSize: UInt32 { get }
    /// Whether it was opened for writing.
    var isWritable: Bool { get }
    /// The storages that extents refer to by index; does not change while the image is open.
    var storages: [StorageHandle] { get }
    /// The names of all its files, the one opened first.
    var files: [String] { get }

    /// Appends the extents of a range to `batch`, in ascending order and without gaps, beginning at `offset`.
    /// Stops early only when the batch is full; covers at least one byte. The range lies inside the disk.
    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError)

    /// Reads bytes of an ``Extent/Kind/encoded`` extent; `buffer` is not longer than the extent.
    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError)

    /// What must be put right in the files before the image is used. Called once for the top image of a disk, after all
    /// its parents were found and belong to it, so that an image whose disk cannot be had stays as it is.
    func prepareForUse() throws(DiskError)

    /// Makes the image ready for changes: unclean marks, content identifiers. Called once, before the first change.
    func beginWriting() throws(DiskError)

    /// Finds space, in one piece, for the blocks of a range that is not data: at least for the one with the range's
    /// first byte, at most for all. The reservation covers whole blocks; of a format that notes for parts of a block
    /// whether the image holds them (sector bitmaps), it covers whole such parts, in a block that may be there already.
    /// Where bytes are ``Extent/Kind/frozen``, it may be their own place.
    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation

    /// The reserved space has been written: point to it. What is durable when is ``flush()``'s business.
    func commit(_ reservation: consuming Reservation) throws(DiskError)

    /// The reserved space will not be used.
    func abandon(_ reservation: consuming Reservation)

    /// Frees whole blocks. Answers the extent kind that the range has now, or nil if this format cannot drop these
    /// blocks and their bytes must be written as zeros. The range covers whole blocks (the last one of the disk
    /// counts as whole at the end of the disk).
    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool

    /// Whether whole blocks of zeros that are written where this image holds nothing are dropped instead, so that they
    /// take no space.
    var dropsZeroBlocks: Bool { get }

    /// When it returns, all data written and all blocks committed before the call are on stable storage.
    func flush() throws(DiskError)

    /// Flushes, clears unclean marks and gives back what is held. No call follows it.
    func close() throws(DiskError)

    /// How this image names its parent; nil for a base.
    var parentLink: ParentLink? { get }
    /// What children of this image record of it.
    var identity: ImageIdentity { get }
    /// Whether `parent` is the image that this one was made over; throws ``DiskError/Kind/brokenLink`` if not.
    func checkLink(to parent: any ImageBackend) throws(DiskError)

    /// What a person asks about the image beyond its size, in the order in which to show it.
    var properties: [ImageProperty] { get }
    /// The internal snapshots that it holds, the oldest first as a rule.
    var snapshots: [InternalSnapshot] { get }

    /// How an image of the same kind is created, in one file that grows with what is written.
    /// ``DiskError/Kind/unsupported`` where it is of another kind, or has in it what a new one would not have.
    func creationSettings() throws(DiskError) -> CreationSettings
}

/// How an image is created, beside its size, its unit of allocation and what it says of itself.
public struct CreationSettings: Sendable, Equatable {
    /// The format's name for the kind of image; nil: its usual one.
    public var variant: String?
    /// What the format alone understands.
    public var options: [String: String]

    public init(variant: String? = nil, options: [String: String] = [:]) {
        self.variant = variant
        self.options = options
    }
}

extension ImageBackend {
    public func prepareForUse() throws(DiskError) {}
    public var snapshots: [InternalSnapshot] { [] }

    public func creationSettings() throws(DiskError) -> CreationSettings {
        throw DiskError(.unsupported, "images of this kind are not made anew from an old one", image: files.first)
    }

    /// Most formats store what is written.
    public var dropsZeroBlocks: Bool { false }

    /// When any of its files was changed last, in nanoseconds since 1970; nil where no storage knows.
    public func modificationTime() throws(DiskError) -> Int64? {
        var latest: Int64?
        for handle in storages {
            guard let file = handle.storage as? FileStorage else { continue }
            latest = max(latest ?? .min, try file.modificationTime())
        }
        return latest
    }
}

/// What a dropped range shall read as afterwards.
public enum DroppedKind: Sendable {
    /// As the layer below says.
    case absent
    /// As zeros, whatever lies below.
    case zero
}

/// What can be asked of an image that knows it.
public struct ImageProperty: Sendable {
    /// The name in machine-readable output: lower case, with hyphens.
    public let key: String
    /// The name for people.
    public let title: String
    /// The value, for both.
    public let value: String

    public init(_ key: String, _ title: String, _ value: String) {
        self.key = key
        self.title = title
        self.value = value
    }
}

/// What a child can record of its parent, and a parent answers to.
public struct ImageIdentity: Sendable, Equatable {
    /// The image's UUID, where the format stores one.
    public var uuid: DiskUUID?
    /// The UUID that changes at the first write after an open.
    public var modificationUUID: DiskUUID?
    /// VMDK's content identifier.
    public var contentID: UInt32?

    public init(uuid: DiskUUID? = nil, modificationUUID: DiskUUID? = nil, contentID: UInt32? = nil) {
        self.uuid = uuid
        self.modificationUUID = modificationUUID
        self.contentID = contentID
    }
}

/// How a child names its parent.
public struct ParentLink: Sendable, Equatable {
    /// The paths stored in the child, to be tried in this order; may be empty.
    public var paths: [String]
    /// The parent's UUID, to search for where no path leads to it.
    public var uuid: DiskUUID?
    /// The same for a child that records the parent's modification UUID alone.
    public var modificationUUID: DiskUUID?
    /// The parent's format if the child records it; nil: it is probed.
    public var format: String?
    /// Whether a parent that no format recognises is refused unless its name says that it is raw: for children that
    /// record nothing by which a wrong guess would show.
    public var mustBeRecognized: Bool

    public init(
        paths: [String], uuid: DiskUUID? = nil, modificationUUID: DiskUUID? = nil, format: String? = nil,
        mustBeRecognized: Bool = false
    ) {
        self.paths = paths
        self.uuid = uuid
        self.modificationUUID = modificationUUID
        self.format = format
        self.mustBeRecognized = mustBeRecognized
    }
}

extension ParentLink {
    /// Whether a child can name its parent by what stands in the parent itself.
    public var hasIdentity: Bool { uuid != nil || modificationUUID != nil }

    /// Whether the image with that identity is the one that is searched for.
    public func matches(_ identity: ImageIdentity) -> Bool {
        if let uuid { return identity.uuid == uuid }
        guard let modificationUUID else { return false }
        return (identity.modificationUUID ?? identity.uuid) == modificationUUID
    }
}

/// A state of a disk that its own image keeps beside the present one.
public struct InternalSnapshot: Sendable, Equatable {
    /// The number or word that stands for it in its image.
    public let id: String
    public let name: String
    /// The size of the disk at that time, in bytes.
    public let virtualSize: UInt64
    /// When it was made, in seconds since 1970.
    public let date: UInt64
    /// Bytes of a virtual machine's memory and devices that were saved with it; 0: of the disk alone.
    public let machineStateSize: UInt64

    public init(id: String, name: String, virtualSize: UInt64, date: UInt64, machineStateSize: UInt64) {
        self.id = id
        self.name = name
        self.virtualSize = virtualSize
        self.date = date
        self.machineStateSize = machineStateSize
    }
}

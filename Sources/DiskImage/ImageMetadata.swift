public import DiskStorage

/// What an image says of itself and its parent, beside the disk: each format stores some of it.
public struct ImageMetadata: Sendable, Equatable {
    public var comment: String?
    /// The image's own UUID.
    public var uuid: DiskUUID?
    /// The UUID that changes whenever the content does.
    public var modificationUUID: DiskUUID?
    public var parentUUID: DiskUUID?
    public var parentModificationUUID: DiskUUID?
    /// The CHS geometry of the disk as hardware: VirtualBox's PCHS.
    public var physicalGeometry: DiskGeometry?
    /// The CHS geometry as a BIOS translates it: VirtualBox's LCHS.
    public var logicalGeometry: DiskGeometry?

    public init() {}

    /// Which of the fields.
    public struct Fields: OptionSet, Sendable {
        public let rawValue: UInt8
        public init(rawValue: UInt8) { self.rawValue = rawValue }

        public static let comment = Fields(rawValue: 1 << 0)
        public static let uuid = Fields(rawValue: 1 << 1)
        public static let modificationUUID = Fields(rawValue: 1 << 2)
        public static let parentUUID = Fields(rawValue: 1 << 3)
        public static let parentModificationUUID = Fields(rawValue: 1 << 4)
        public static let physicalGeometry = Fields(rawValue: 1 << 5)
        public static let logicalGeometry = Fields(rawValue: 1 << 6)

        /// The names for people and machines, in order.
        public var names: [String] {
            let all: [(Fields, String)] = [
                (.comment, "comment"), (.uuid, "uuid"), (.modificationUUID, "modification-uuid"),
                (.parentUUID, "parent-uuid"), (.parentModificationUUID, "parent-modification-uuid"),
                (.physicalGeometry, "physical-geometry"), (.logicalGeometry, "logical-geometry"),
            ]
            return all.filter { contains($0.0) }.map(\.1)
        }
    }

    /// The fields that are there.
    public var fields: Fields {
        var fields: Fields = []
        if comment != nil { fields.insert(.comment) }
        if uuid != nil { fields.insert(.uuid) }
        if modificationUUID != nil { fields.insert(.modificationUUID) }
        if parentUUID != nil { fields.insert(.parentUUID) }
        if parentModificationUUID != nil { fields.insert(.parentModificationUUID) }
        if physicalGeometry != nil { fields.insert(.physicalGeometry) }
        if logicalGeometry != nil { fields.insert(.logicalGeometry) }
        return fields
    }
}

/// What shall be different in an image, its disk's content apart.
public struct ImageChanges: Sendable {
    /// The fields that are there get this value; an empty comment removes the comment, a null UUID that UUID.
    public var metadata = ImageMetadata()
    /// Another parent, or none; nil: as it is.
    public var parent: ParentChange?
    /// VMDK's content identifier (CID), for a copy that takes an image's place; other formats have none.
    public var contentID: UInt32?

    public init() {}

    /// What the image is made over from now on.
    public enum ParentChange: Sendable {
        /// Nothing: it becomes a base. What it does not hold reads as zeros then.
        case none
        /// This image: whatever the format records of a parent (paths, UUIDs, content identifiers, format) is
        /// recorded anew.
        case image(CreateRequest.ParentDescription)
    }

    /// Whether nothing shall be different.
    public var isEmpty: Bool { metadata.fields.isEmpty && parent == nil && contentID == nil }
}

/// A back end that can change what its image says of its parent.
///
/// The image is open for writing, and nobody uses it meanwhile. Each change is atomic as far as the format allows:
/// after a crash at any moment the image opens, is as before or as after, and shows the same bytes.
public protocol RelinkableBackend: ImageBackend {
    /// Throws what ``relink(to:)`` would of an image that cannot have that parent, for who has much to do before that.
    /// Of the image's file nothing is changed.
    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError)

    /// Names another parent, or none, durably. ``DiskError/Kind/unsupported``, with the image as it was, if it cannot.
    func relink(to parent: ImageChanges.ParentChange) throws(DiskError)
}

/// A back end that can change what its image says of itself, and the size of its disk.
public protocol EditableBackend: RelinkableBackend {
    /// The fields of ``ImageMetadata`` that this image can store.
    var settableFields: ImageMetadata.Fields { get }
    /// What it stores of them now.
    var metadata: ImageMetadata { get }

    /// Makes the changes, durably. ``DiskError/Kind/unsupported``, with the image as it was, if the format cannot store
    /// one of them, or not in this image (too long a path, no room for a comment).
    func apply(_ changes: ImageChanges) throws(DiskError)

    /// Gives the disk another size in bytes, durably; ``ImageBackend/virtualSize`` is the new one afterwards, or, where
    /// it is fixed for as long as the image is open, when it is opened again.
    ///
    /// New bytes are absent (zeros in a base, and in what has no layers), but for those in front of `parentEnd`, which
    /// hide a parent's: they read as zeros at every moment from when the disk is larger. Where the disk ended inside a
    /// block, the caller has made sure that this image holds that block, or that its parent has zeros behind the disk's
    /// end up to the end of the block.
    ///
    /// Of a disk that gets smaller the blocks that end up outside are given up; the caller has made sure that nothing
    /// of worth is in them. ``DiskError/Kind/unsupported`` where this image cannot have that size.
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError)
}

extension EditableBackend {
    public func relink(to parent: ImageChanges.ParentChange) throws(DiskError) {
        var changes = ImageChanges()
        changes.parent = parent
        try apply(changes)
    }

    /// Gives the disk another size; nothing of a parent is hidden.
    public func resize(to size: UInt64) throws(DiskError) { try resize(to: size, hidingParentUpTo: 0) }
}

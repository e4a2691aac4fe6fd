/// A run of bytes of an image with one meaning: the answer of a format to "where is this?".
///
/// 24 bytes and no reference inside, so that a batch of them lives on the stack.
public struct Extent: Equatable, Sendable {
    /// What the bytes are.
    public enum Kind: UInt8, Sendable {
        /// They lie, as they are, in one of the image's storages.
        case data
        /// They are zeros, whatever the layers below hold.
        case zero
        /// This image says nothing of them: ask the layer below, or zeros if there is none.
        case absent
        /// They lie compressed in one of the image's storages; only the back end can read them.
        case encoded
        /// They lie, as they are, in one of the image's storages, but must not be overwritten there as data is: a write
        /// reserves first, also where the reservation turns out to be the same place. So it is where the image must be
        /// told before, or where an internal snapshot has the same block.
        case frozen

        /// Whether they lie in a storage as they are.
        @inlinable public var isStored: Bool { self == .data || self == .frozen }
    }

    /// Where they begin in the storage, in bytes (data, frozen); what the back end needs to find the
    /// encoded block (encoded); else 0.
    public var fileOffset: UInt64
    /// How many bytes of the disk they are.
    public var length: UInt64
    /// What they are.
    public var kind: Kind
    /// Which of the image's storages holds them (data, frozen, encoded).
    public var storage: UInt16
    /// How many decoded bytes of the block come before them (encoded).
    public var skip: UInt32

    @inlinable
    public init(_ kind: Kind, length: UInt64, storage: UInt16 = 0, fileOffset: UInt64 = 0, skip: UInt32 = 0) {
        self.kind = kind
        self.length = length
        self.storage = storage
        self.fileOffset = fileOffset
        self.skip = skip
    }
}

/// A bounded list of extents that lives on the stack of whoever asks; neighbours that continue each other are joined.
public struct ExtentBatch: ~Copyable {
    /// The most extents in one answer.
    public static let capacity = 32

    @usableFromInline var extents = InlineArray<32, Extent>(repeating: Extent(.absent, length: 0))
    /// How many extents there are.
    public private(set) var count = 0
    /// How many bytes of the disk they cover.
    public private(set) var coveredLength: UInt64 = 0

    public init() {}

    /// The extent at `index`, in the order of the disk.
    public subscript(index: Int) -> Extent {
        precondition(index < count)
        return extents[index]
    }

    /// Forgets all extents.
    public mutating func removeAll() {
        count = 0
        coveredLength = 0
    }

    /// Adds what follows in the disk. Answers false, and adds nothing, when the batch is full.
    @inline(__always)
    public mutating func append(_ extent: Extent) -> Bool {
        if count > 0 {
            let last = extents[count - 1]
            if last.kind == extent.kind, last.storage == extent.storage, extent.kind != .encoded,
                !extent.kind.isStored || last.fileOffset &+ last.length == extent.fileOffset
            {
                extents[count - 1].length = last.length &+ extent.length
                coveredLength &+= extent.length
                return true
            }
            guard count < Self.capacity else { return false }
        }
        extents[count] = extent
        count += 1
        coveredLength &+= extent.length
        return true
    }
}

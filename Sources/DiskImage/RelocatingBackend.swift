public import DiskStorage

/// A block that shall lie elsewhere in the image's file.
public struct Relocation: Sendable {
    /// The block's first byte in the disk.
    public let offset: UInt64
    /// How many bytes of the disk it has.
    public let length: UInt64
    /// The storage in which it lies and shall lie.
    public let storage: UInt16
    /// Where it lies, in bytes of the storage.
    public let source: UInt64
    /// Where it shall lie.
    public let target: UInt64

    public init(offset: UInt64, length: UInt64, storage: UInt16, source: UInt64, target: UInt64) {
        self.offset = offset
        self.length = length
        self.storage = storage
        self.source = source
        self.target = target
    }
}

/// A back end in whose file blocks lie without gaps: what was dropped leaves holes, which the last blocks fill, and the
/// file becomes shorter.
///
/// The disk moves the data. It asks for a block, takes the block's lock unless somebody has it, sees whether the block
/// still lies where it was said to, copies, and calls ``commit(_:)``; otherwise ``abandon(_:)``. Copies are durable
/// before the entry that points to them, and the old place is used again, or cut off, after the entry is durable: that
/// is the back end's ``ImageBackend/flush()``, as for reservations.
public protocol RelocatingBackend: ImageBackend {
    /// Allows blocks to be moved although the guest has changed nothing: what the image is, stays.
    func allowRelocation()
    /// Whether there may be holes that a block could fill.
    var needsRelocation: Bool { get }
    /// A block to move, with its new place taken; nil if there is none now.
    func nextRelocation() throws(DiskError) -> Relocation?
    /// The block has been copied: point to its new place. Called with the block's lock held.
    func commit(_ relocation: Relocation) throws(DiskError)
    /// The block stays where it is.
    func abandon(_ relocation: Relocation)
}

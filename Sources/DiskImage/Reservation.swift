/// Space for blocks that are about to be written for the first time: got from ``ImageBackend/reserve(offset:length:)``,
/// given back by ``ImageBackend/commit(_:)`` or ``ImageBackend/abandon(_:)``.
///
/// Not copyable, so that one is neither forgotten nor used twice.
public struct Reservation: ~Copyable, Sendable {
    /// The first byte of the disk it is for: the beginning of a block, or of a smaller unit of which the format notes
    /// whether the image holds it.
    public let offset: UInt64
    /// How many bytes of the disk it is for, to the end of the last such unit or of the disk.
    public let length: UInt64
    /// Which of the image's storages the bytes go to.
    public let storage: UInt16
    /// Where in that storage, in bytes; the whole length lies there in one piece.
    public let fileOffset: UInt64
    /// Whether the space reads as zeros now, so that zeros need not be written to it.
    public let isZero: Bool

    public init(offset: UInt64, length: UInt64, storage: UInt16, fileOffset: UInt64, isZero: Bool) {
        self.offset = offset
        self.length = length
        self.storage = storage
        self.fileOffset = fileOffset
        self.isZero = isZero
    }
}

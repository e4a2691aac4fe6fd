internal import DiskImage
internal import DiskStorage

/// What takes the place of an image of an open disk that had to be closed and could not be opened again: every request
/// fails, and none gets wrong bytes.
final class FailedImage: ImageBackend {
    let format: String
    let virtualSize: UInt64
    let blockSize: UInt64
    let sectorSize: UInt32
    let isWritable: Bool
    let storages: [StorageHandle] = []
    let files: [String]
    let parentLink: ParentLink?
    let identity: ImageIdentity
    let properties: [ImageProperty] = []
    private let failure: DiskError

    /// - Parameter image: The one that was closed.
    /// - Parameter failure: Why it could not be opened again.
    init(_ image: any ImageBackend, _ failure: DiskError) {
        (format, virtualSize, blockSize, sectorSize) =
            (image.format, image.virtualSize, image.blockSize, image.sectorSize)
        (isWritable, files, parentLink, identity) = (image.isWritable, image.files, image.parentLink, image.identity)
        self.failure = failure
    }

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) { throw failure }
    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) { throw failure }
    func beginWriting() throws(DiskError) { throw failure }
    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation { throw failure }
    func commit(_ reservation: consuming Reservation) throws(DiskError) { throw failure }
    func abandon(_ reservation: consuming Reservation) {}
    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) throws(DiskError) -> Bool { throw failure }
    func flush() throws(DiskError) { throw failure }
    /// It is closed.
    func close() throws(DiskError) {}
    func checkLink(to parent: any ImageBackend) throws(DiskError) { throw failure }
}

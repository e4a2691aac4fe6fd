internal import DiskImage
internal import DiskStorage

/// An open raw image: byte n of the disk is byte n of the file. Its size is the file's, whole sectors or not.
final class RawImage: ImageBackend {
    let format = "raw"
    let virtualSize: UInt64
    let blockSize: UInt64 = 0
    let sectorSize: UInt32 = 512
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    let parentLink: ParentLink? = nil
    let identity = ImageIdentity()

    init(_ request: OpenRequest) throws(DiskError) {
        virtualSize = try request.storage.length()
        isWritable = request.isWritable
        storages = [StorageHandle(request.storage)]
        files = [request.path]
    }

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        _ = batch.append(Extent(.data, length: length, fileOffset: offset))
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        preconditionFailure("a raw image has no encoded extents")
    }

    func beginWriting() {}

    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        preconditionFailure("a raw image allocates nothing")
    }

    func commit(_ reservation: consuming Reservation) {}
    func abandon(_ reservation: consuming Reservation) {}
    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) -> Bool { false }
    func flush() throws(DiskError) { try storages[0].storage.flush() }
    func close() throws(DiskError) { if isWritable { try flush() } }

    func checkLink(to parent: any ImageBackend) throws(DiskError) {
        preconditionFailure("a raw image has no parent")
    }

    var properties: [ImageProperty] { [] }
}

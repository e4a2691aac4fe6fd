internal import DiskImage
internal import DiskStorage

/// An open fixed VHD: the disk's bytes, and the footer behind them.
final class VHDFixedImage: ImageBackend {
    let format = "vhd"
    let virtualSize: UInt64
    let blockSize: UInt64 = 0
    let sectorSize: UInt32 = 512
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    private let structure: VHDStructure

    init(_ structure: VHDStructure, _ request: OpenRequest) {
        self.structure = structure
        virtualSize = structure.virtualSize
        isWritable = request.isWritable
        storages = [StorageHandle(request.storage)]
        files = [request.path]
    }

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        _ = batch.append(Extent(.data, length: length, fileOffset: offset))
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        preconditionFailure("a VHD has no encoded extents")
    }

    /// A footer whose checksum is wrong is put right first.
    func beginWriting() throws(DiskError) {
        guard !structure.damages.isEmpty, let place = structure.endFooterOffset else { return }
        let count = structure.hasShortFooter ? VHDFooter.byteCount - 1 : VHDFooter.byteCount
        try storages[0].storage.write(Array(structure.footerBytes.prefix(count)), at: place, for: .footer)
        try storages[0].storage.flush()
    }

    func reserve(offset: UInt64, length: UInt64) throws(DiskError) -> Reservation {
        preconditionFailure("a fixed VHD allocates nothing")
    }

    func commit(_ reservation: consuming Reservation) {}
    func abandon(_ reservation: consuming Reservation) {}
    func drop(offset: UInt64, length: UInt64, leaving kind: DroppedKind) -> Bool { false }
    func flush() throws(DiskError) { try storages[0].flushIfWritten() }
    func close() throws(DiskError) { if isWritable { try flush() } }

    var identity: ImageIdentity { structure.identity }
    let parentLink: ParentLink? = nil

    func checkLink(to parent: any ImageBackend) throws(DiskError) {
        preconditionFailure("a fixed VHD has no parent")
    }

    var properties: [ImageProperty] { structure.properties }
}

internal import DiskImage
internal import DiskStorage

/// An open fixed VHD: the disk's bytes, and the footer behind them.
@safe
final class VHDFixedImage: ImageBackend, @unchecked Sendable {  // see the structure
    let format = "vhd"
    let virtualSize: UInt64
    let blockSize: UInt64 = 0
    let sectorSize: UInt32 = 512
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    /// What the footer says; it changes only while nobody uses the image.
    private(set) var structure: VHDStructure
    /// By what rule the disk's size was asked to be found.
    let askedRule: VHDSizeRule?

    init(_ structure: VHDStructure, _ request: OpenRequest) throws(DiskError) {
        self.structure = structure
        askedRule = try VHDSizeRule.asked(request)
        virtualSize = structure.virtualSize
        isWritable = request.isWritable
        storages = [StorageHandle(request.storage)]
        files = [request.path]
    }

    /// Takes over what the footer in the file says now.
    func adoptFile() throws(DiskError) {
        structure = try VHDStructure(storages[0].storage, rule: askedRule, describesDamage: false)
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

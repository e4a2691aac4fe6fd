internal import DiskImage
internal import DiskStorage

/// The header's way into the file when it changes: it has several sectors, and a power cut may leave some of them new
/// and some old. So it is written behind the file's end first, and taken from there if its checksum is wrong.
///
/// There all its bits are inverted: what a guest has written last may be a copy of an overlay's file, even of this one.
extension OverlayHeader {
    /// What two headers of one overlay have in common: all in front of what is said of the parent, with the UUID.
    private static let constantByteCount = 64

    /// The header of an overlay; of one that may be written, nothing of an interrupted change is left.
    init(_ storage: any Storage, isWritable: Bool) throws(DiskError) {
        let bytes = try storage.bytes(at: 0, count: Self.byteCount, for: .header, "the header")
        let copy = Self.hasMagic(bytes) ? try Self.copy(of: bytes, in: storage) : nil
        do throws(DiskError) {
            self = try Self(parsing: bytes)
        } catch {
            guard let copy else { throw error }
            self = copy.header
            guard isWritable else { return }
            try storage.write(copy.header.encode(), at: 0, for: .header)
            try storage.flush()
        }
        if let copy, isWritable {
            try storage.setLength(copy.place)
            try storage.flush()
        }
    }

    /// The header at the file's end, if one is there that belongs to these first bytes. Nobody who writes to the disk
    /// can make one by accident: he does not know the UUID.
    private static func copy(
        of bytes: [UInt8], in storage: any Storage
    ) throws(DiskError) -> (header: OverlayHeader, place: UInt64)? {
        let length = try storage.length()
        guard length % UInt64(byteCount) == 0, length > 2 * UInt64(byteCount) else { return nil }
        let place = length - UInt64(byteCount)
        let found = try storage.bytes(at: place, count: byteCount, for: .header, "the file's end").map { ~$0 }
        guard found[..<constantByteCount] == bytes[..<constantByteCount], let header = try? Self(parsing: found),
            header.dataOffset <= place
        else { return nil }
        return (header, place)
    }

    /// Writes this header in the place of another one of the same overlay, durably. After a power cut at any moment the
    /// one or the other is found.
    func replace(in storage: any Storage) throws(DiskError) {
        let length = try storage.length()
        guard let place = length.alignedUp(to: UInt64(Self.byteCount)) else {
            throw DiskError(.system, "the file cannot become any longer", errno: 27)  // EFBIG
        }
        let bytes = encode()
        do throws(DiskError) {
            try storage.write(bytes.map { ~$0 }, at: place, for: .header)
            try storage.flush()
        } catch {
            try? storage.setLength(length)  // the first error is the one to tell
            throw error
        }
        try storage.write(bytes, at: 0, for: .header)
        try storage.flush()
        try storage.setLength(length)
        try storage.flush()
    }
}

extension OverlayHeader.Parent {
    /// What is recorded of an image.
    init(_ parent: CreateRequest.ParentDescription, of path: String) throws(DiskError) {
        guard parent.path.utf8.count <= OverlayHeader.pathLimit, parent.format.utf8.count <= 8 else {
            throw DiskError(.invalidArgument, "the path of the image below is too long", image: path)
        }
        let hasIdentity = parent.identity != ImageIdentity()
        self.init(
            identity: parent.identity, size: parent.virtualSize, modified: hasIdentity ? nil : parent.modified,
            format: parent.format, path: parent.path)
    }
}

extension OverlayImage: RelinkableBackend {
    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) {
        _ = try OverlayHeader.Parent(parent, of: files[0])
        guard !storages[0].storage.traits.hasFixedLength else {
            throw DiskError(.unsupported, "is an overlay on a device, which has no room for another header")
        }
    }

    /// Nothing that is written to the overlay may be under way.
    func relink(to change: ImageChanges.ParentChange) throws(DiskError) {
        guard case .image(let parent) = change, parent.virtualSize == virtualSize else {
            throw DiskError(.unsupported, "an overlay lies over an image with a disk of the same size")
        }
        try checkParent(parent)
        let record = try OverlayHeader.Parent(parent, of: files[0])
        try flush()
        let new = OverlayHeader(
            virtualSize: header.virtualSize, blockShift: header.blockShift, uuid: header.uuid, parent: record)
        try new.replace(in: storages[0].storage)
        parentRecord.withLock { $0 = record }
    }
}

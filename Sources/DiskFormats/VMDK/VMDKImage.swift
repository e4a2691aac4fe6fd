internal import DiskImage
internal import DiskStorage

/// An open VMDK image: a descriptor and the extents that it lists.
// Sendable: the translations do not change after init.
@safe
final class VMDKImage: RelocatingBackend, CompactableBackend, @unchecked Sendable {
    let format = "vmdk"
    let virtualSize: UInt64
    let blockSize: UInt64
    let sectorSize: UInt32 = 512
    let isWritable: Bool
    let storages: [StorageHandle]
    let files: [String]
    /// The descriptor as it is on the disk now, and how to write it there.
    let descriptor: Locked<VMDKDescriptorFile>
    /// All tables of all extents.
    let tables: TableSet
    /// What belongs to each extent beside its translation, in the order of the disk.
    let extents: [VMDKOpenExtent]
    /// The extents' translations, in the order of the disk.
    private let maps: UnsafeMutableBufferPointer<VMDKExtentMap>
    private let cache: TableCache
    /// The way to its other files.
    let companions: any CompanionOpener
    /// Whether what children compare stays as it is.
    let keepsIdentity: Bool
    /// The way of blocks to the front, while the image is compacted.
    let mover = BlockMover()
    /// Held while a grain table is made.
    let addingTable = Locked(false)

    init(_ opened: VMDKOpenedParts, _ request: OpenRequest) throws(DiskError) {
        extents = opened.extents
        storages = opened.storages
        files = opened.files
        tables = opened.tables
        cache = request.cache
        companions = request.companions
        keepsIdentity = request.keepsIdentity
        isWritable = request.isWritable
        descriptor = Locked(opened.descriptor)
        virtualSize = opened.extents.last.map { $0.map.start + $0.map.length } ?? 0
        // One after the other, without a list of them in between: there may be many.
        blockSize = Self.allocationUnit(opened.extents, virtualSize)
        unsafe maps = .allocate(capacity: opened.extents.count)
        for (index, extent) in opened.extents.enumerated() { unsafe maps.initializeElement(at: index, to: extent.map) }
    }

    deinit { unsafe maps.deallocate() }

    /// The largest grain, if every grain lies aligned in the disk; else, since grains count from their extent's
    /// beginning, a unit as large as the disk.
    private static func allocationUnit(_ extents: [VMDKOpenExtent], _ size: UInt64) -> UInt64 {
        let grain = extents.lazy.compactMap { $0.map.grains?.grainSize }.max() ?? 0
        let isUnaligned = extents.contains { $0.map.grains != nil && $0.map.start & (grain - 1) != 0 }
        guard grain > 0, isUnaligned else { return grain }
        return 1 << UInt64(64 - (size - 1).leadingZeroBitCount)
    }

    // MARK: - Translation

    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var index = extentIndex(of: offset)
        var done: UInt64 = 0
        while done < length {
            let map = unsafe maps.baseAddress.unsafelyUnwrapped + index
            let inExtent = unsafe offset &+ done &- map.pointee.start
            let part = unsafe min(length &- done, map.pointee.length &- inExtent)
            let covered = unsafe try map.pointee.map(inExtent, part, into: &batch)
            done &+= covered
            if covered < part { return }
            index &+= 1
        }
    }

    /// The extent that holds a byte inside the disk.
    @inline(__always)
    func extentIndex(of offset: UInt64) -> Int {
        var low = 0
        var high = unsafe maps.count
        while high &- low > 1 {
            let middle = (low &+ high) >> 1
            if unsafe maps[middle].start <= offset { low = middle } else { high = middle }
        }
        return low
    }

    func readEncoded(_ extent: Extent, into buffer: IOBuffer) throws(DiskError) {
        guard let grains = extents.first(where: { $0.map.storage == extent.storage })?.compressedGrains else {
            preconditionFailure("an encoded extent from a file without compressed grains")
        }
        try grains.read(at: extent.fileOffset, skipping: Int(extent.skip), into: buffer)
    }

    /// Some kinds of extents are read, and their descriptor can be changed, but not the disk.
    func checkDiskIsWritable() throws(DiskError) {
        for extent in extents {
            let what: String
            switch extent.map.kind {
            case .compressed: what = "a streamOptimized image cannot be written in place"
            case .seSparse: what = "an seSparse extent can be read, not written"
            default: continue
            }
            throw DiskError(
                .unsupported, "\(what): make a snapshot on it with 'vdimg create --parent', and mount that",
                image: storages[Int(extent.map.storage)].storage.name)
        }
    }

    func prepareForUse() throws(DiskError) { if isWritable { try checkDiskIsWritable() } }

    // MARK: - Identity

    var identity: ImageIdentity {
        descriptor.withLock { file in
            file.text.identity
        }
    }

    var parentLink: ParentLink? {
        descriptor.withLock { file in
            let hint = file.text.parentFileNameHint.flatMap { $0.isEmpty ? nil : $0 }
            let uuid = file.text.parentUUID
            guard file.text.parentContentID != VMDKDescriptor.noContentID || uuid != nil else { return nil }
            return ParentLink(paths: hint.map { [$0] } ?? [], uuid: uuid)
        }
    }

    /// A child checks its parent by content identifier (VMware), by UUID and modification UUID (VirtualBox), or both:
    /// whatever both sides have must agree.
    func checkLink(to parent: any ImageBackend) throws(DiskError) {
        let child = descriptor.withLock { $0.text }
        let found = parent.identity
        let name = parent.files.first ?? ""
        if let uuid = child.parentUUID, let other = found.uuid, uuid != other {
            throw DiskError(
                .brokenLink, "was made over the image with UUID \(uuid), but \(name) has UUID \(other)")
        }
        if child.parentContentID != VMDKDescriptor.noContentID, let contentID = found.contentID,
            child.parentContentID != contentID
        {
            throw DiskError(
                .brokenLink,
                "was made over content \(hexadecimal(child.parentContentID)) of its parent, but \(name) now has "
                    + "content \(hexadecimal(contentID)): the parent was changed after this snapshot was taken, "
                    + "or is another image"
            )
        }
        if let uuid = child.parentModificationUUID, let other = found.modificationUUID, uuid != other {
            throw DiskError(
                .brokenLink,
                "was made over modification \(uuid) of its parent, but \(name) now has modification \(other): "
                    + "the parent was changed after this snapshot was taken")
        }
        let isVerified =
            child.parentUUID != nil && found.uuid != nil
            || child.parentContentID != VMDKDescriptor.noContentID && found.contentID != nil
        // A child of a parent that has no identity says so by the content identifier 0.
        let hasNone = found.uuid == nil && found.contentID == nil && child.parentContentID == 0
        guard isVerified || hasNone else {
            throw DiskError(
                .brokenLink, "records nothing by which \(name) could be recognised as its parent")
        }
    }

    private func hexadecimal(_ value: UInt32) -> String {
        let digits = String(value, radix: 16)
        return String(repeating: "0", count: 8 - digits.count) + digits
    }

    // MARK: - Properties

    var properties: [ImageProperty] {
        let text = descriptor.withLock { $0.text }
        var list = [
            ImageProperty("create-type", "create type", text.createTypeName),
            ImageProperty("content-id", "content ID", hexadecimal(text.contentID)),
        ]
        func add(_ key: String, _ title: String, _ value: String?) {
            if let value, !value.isEmpty { list.append(ImageProperty(key, title, value)) }
        }
        if text.parentContentID != VMDKDescriptor.noContentID {
            add("parent-content-id", "parent content ID", hexadecimal(text.parentContentID))
        }
        add("parent-name", "parent file name", text.parentFileNameHint)
        add("uuid", "UUID", text.uuid?.description)
        add("modification-uuid", "modification UUID", text.modificationUUID?.description)
        add("parent-uuid", "parent UUID", text.parentUUID?.description)
        add("parent-modification-uuid", "parent modification UUID", text.parentModificationUUID?.description)
        add("comment", "comment", text.comment)
        add("adapter-type", "adapter type", text.diskDatabase("adapterType"))
        for (key, title) in [("geometry", "geometry (CHS)"), ("geometry.bios", "BIOS geometry (CHS)")] {
            let prefix = key == "geometry" ? "geometry." : "geometry.bios"
            let names = key == "geometry" ? ["cylinders", "heads", "sectors"] : ["Cylinders", "Heads", "Sectors"]
            let values = names.compactMap { text.diskDatabase(prefix + $0) }
            if values.count == 3 { add(key.replacing(".", with: "-"), title, values.joined(separator: "/")) }
        }
        add("encoding", "encoding", text.encoding.name)
        list.append(ImageProperty("extents", "extents", String(extents.count)))
        if extents.contains(where: { $0.wasUnclean }) {
            list.append(ImageProperty("unclean", "unclean", "yes: not closed by its last writer"))
        }
        for (index, extent) in extents.enumerated() {
            guard let damage = extent.damage else { continue }
            list.append(ImageProperty("damage", "damage", "extent \(index + 1): \(damage)"))
            break
        }
        return list
    }
}

internal import DiskImage
internal import DiskStorage

/// Changes of a fixed VHD: of its one footer, which is a sector, and where that lies.
///
/// The file ends with a footer at every moment. A larger disk gets one behind its new end first, which still says the
/// old size; then the old one becomes zeros; then the new one says the new size.
extension VHDFixedImage: EditableBackend {
    var settableFields: ImageMetadata.Fields { [.uuid, .physicalGeometry] }

    var metadata: ImageMetadata {
        var metadata = ImageMetadata()
        metadata.uuid = structure.identity.uuid
        metadata.physicalGeometry = structure.footer.geometry
        return metadata
    }

    private var storage: any Storage { storages[0].storage }

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) {
        throw DiskError(.unsupported, "a fixed VHD cannot have a parent")
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        try changes.check(settable: settableFields, of: "fixed VHD")
        if case .image(let parent) = changes.parent { try checkParent(parent) }
        guard !changes.metadata.fields.isEmpty else { return }
        var footer = structure.footer
        if let uuid = changes.metadata.uuid { footer.uuid = uuid }
        if let geometry = changes.metadata.physicalGeometry {
            try footer.setGeometry(geometry, keeping: virtualSize, askedRule)
        }
        let place = try alignFooter()
        try write(footer.encode(over: structure.footerBytes), at: place)
        try adoptFile()
    }

    /// (There is no parent that could be hidden.)
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        try checkResizable(storage)
        var footer = structure.footer
        try footer.setSize(size, askedRule)
        guard size != virtualSize else { return }
        let place = try alignFooter()
        let bytes = footer.encode(over: structure.footerBytes)
        let count = UInt64(VHDFooter.byteCount)
        if size > virtualSize {
            let length = try storage.length()
            let isPreallocated = try storage.allocatedBytes() >= length - length / 8
            let newPlace = max(size, place)
            if newPlace > place {
                try write(structure.footerBytes, at: newPlace)
                do throws(DiskError) {
                    if isPreallocated { try storage.allocate(newPlace + count) }
                } catch {
                    try storage.setLength(place + count)
                    throw error
                }
            }
            // What lies behind the disk's end is seen now.
            let rest = virtualSize..<min(place + count, newPlace)
            if !rest.isEmpty { try storage.discard(rest, mustZero: true, for: .guestData) }
            try storage.flush()
            try write(bytes, at: newPlace)
        } else {
            try write(bytes, at: place)
            try write(bytes, at: size)
            try storage.setLength(size + count)
            try storage.flush()
        }
        try adoptFile()
    }

    private func write(_ footer: [UInt8], at place: UInt64) throws(DiskError) {
        try storage.write(footer, at: place, for: .footer)
        try storage.flush()
    }

    /// Makes the footer a whole sector; answers where it lies.
    private func alignFooter() throws(DiskError) -> UInt64 {
        try flush()
        try beginWriting()
        let present = structure.endFooterOffset ?? structure.fileLength
        guard present % 512 != 0 || structure.hasShortFooter else { return present }
        guard let place = (present + UInt64(VHDFooter.byteCount)).alignedUp(to: 512) else { return present }
        try write(structure.footerBytes, at: place)
        return place
    }
}

internal import DiskImage
internal import DiskStorage

extension VDIImage: EditableBackend {
    var settableFields: ImageMetadata.Fields { stored.withLock { $0.settableFields } }
    var metadata: ImageMetadata { stored.withLock { $0.metadata } }

    /// The header is one sector, and written at once.
    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) {
        var changed = stored.withLock { $0 }
        do throws(DiskError) { try changed.setParent(.image(parent)) } catch { throw error.about(files[0]) }
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        guard isWritable else { throw DiskError(.readOnly, "was opened read-only", image: files[0]) }
        try flush()
        let storage = storages[0].storage
        let bytes = try storage.bytes(at: 0, count: header.sectorLength, for: .header, "the header")
        var padded = bytes
        padded.append(contentsOf: repeatElement(0, count: VDIHeader.byteCount - bytes.count))
        var changed = try VDIHeader(parsing: padded)
        do throws(DiskError) {
            if let parent = changes.parent { try changed.setParent(parent) }
            try changed.set(changes.metadata)
        } catch {
            throw error.about(files[0])
        }
        let new = FieldReader(changed.encode(over: padded))
        let old = FieldReader(padded)
        // By way of the table, which may hold the sector, and would write it as it was.
        for offset in stride(from: 64, to: bytes.count, by: 4) {
            let word: UInt32 = try new.littleEndian(at: offset)
            guard try word != old.littleEndian(at: offset, as: UInt32.self) else { continue }
            while try !table.store32(word, at: UInt64(offset), .header) { try tables.flush {} }
        }
        try tables.flush {}
        stored.withLock { $0 = changed }
    }

    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        guard isWritable else { throw DiskError(.readOnly, "was opened read-only", image: files[0]) }
        try flush()
        if space.hasChanges, try space.settleCount() { try flush() }
        // From here on the file is not what the tables in memory are of.
        isResized.withLock { $0 = true }
        var resizer = try VDIResizer(storages[0].storage)
        do throws(DiskError) {
            try resizer.resize(to: size, hidingUpTo: parentEnd)
        } catch {
            throw error.about(files[0])
        }
        stored.withLock { $0 = resizer.header }
    }
}

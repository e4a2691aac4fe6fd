internal import DiskImage
internal import DiskStorage

extension VMDKImage: EditableBackend {
    /// All of them stand in the descriptor; what is said of a parent, only where there is one.
    var settableFields: ImageMetadata.Fields {
        descriptor.withLock { file in
            guard !file.isMissing else { return [] }
            var fields: ImageMetadata.Fields = [
                .comment, .uuid, .modificationUUID, .physicalGeometry, .logicalGeometry,
            ]
            if file.text.hasParent { fields.formUnion([.parentUUID, .parentModificationUUID]) }
            return fields
        }
    }

    var metadata: ImageMetadata {
        let text = descriptor.withLock { $0.text }
        var metadata = ImageMetadata()
        metadata.comment = text.comment.flatMap { $0.isEmpty ? nil : $0 }
        metadata.uuid = text.uuid
        metadata.modificationUUID = text.modificationUUID
        metadata.parentUUID = text.parentUUID
        metadata.parentModificationUUID = text.parentModificationUUID
        metadata.physicalGeometry = text.geometry
        metadata.logicalGeometry = text.biosGeometry
        return metadata
    }

    func checkParent(_ parent: CreateRequest.ParentDescription) throws(DiskError) {
        var text = descriptor.withLock { $0.text }
        try setParent(.image(parent), in: &text)
    }

    func apply(_ changes: ImageChanges) throws(DiskError) {
        guard isWritable else { throw DiskError(.readOnly, "was opened read-only", image: files.first) }
        try flush()
        try descriptor.withLock { (file) throws(DiskError) in
            var text = file.text
            if let parent = changes.parent { try setParent(parent, in: &text) }
            try set(changes.metadata, in: &text)
            if let number = changes.contentID { text.contentID = number }
            if changes.parent != nil, file.text.hasParent, !file.isMissing { try clearOldParentNames() }
            try file.replaceAtomically(with: text)
        }
    }

    private func setParent(_ parent: ImageChanges.ParentChange, in text: inout VMDKDescriptor) throws(DiskError) {
        switch parent {
        case .none:
            text.parentContentID = VMDKDescriptor.noContentID
            text.parentFileNameHint = nil
            text.setParentUUID(nil)
            text.setParentModificationUUID(nil)
        case .image(let description):
            guard extents.contains(where: { $0.map.grains != nil }) else {
                throw DiskError(
                    .unsupported,
                    "a VMDK of type \(text.createTypeName) holds all of its disk itself, and can have "
                        + "no parent", image: files.first)
            }
            text.parentContentID = try VMDKDescriptor.parentContentID(of: description)
            text.parentFileNameHint = description.path
            text.setParentUUID(description.identity.uuid)
            text.setParentModificationUUID(description.identity.modificationUUID)
        }
    }

    private func set(_ metadata: ImageMetadata, in text: inout VMDKDescriptor) throws(DiskError) {
        if let comment = metadata.comment { text.comment = comment.isEmpty ? nil : comment }
        if let uuid = metadata.uuid { text.uuid = uuid }
        if let uuid = metadata.modificationUUID { text.modificationUUID = uuid }
        if metadata.parentUUID != nil || metadata.parentModificationUUID != nil {
            guard text.hasParent else {
                throw DiskError(.unsupported, "has no parent, of which it could record a UUID", image: files.first)
            }
        }
        if let uuid = metadata.parentUUID {
            guard !uuid.isNull || text.parentContentID != VMDKDescriptor.noContentID else {
                throw DiskError(
                    .unsupported, "its parent's UUID is all that says that it has one, and cannot be removed",
                    image: files.first)
            }
            text.setParentUUID(uuid)
        }
        if let uuid = metadata.parentModificationUUID { text.setParentModificationUUID(uuid) }
        if let geometry = metadata.physicalGeometry { text.geometry = geometry }
        if let geometry = metadata.logicalGeometry { text.biosGeometry = geometry }
    }

    /// Old ESX children have the parent's name in the extent's header too, where a base has its geometry.
    private func clearOldParentNames() throws(DiskError) {
        for extent in extents where extent.writer?.layout == .cowd {
            let storage = storages[Int(extent.map.storage)].storage
            let bytes = try storage.bytes(
                at: 0, count: COWDHeader.byteCount, for: .header, "the ESX sparse header")
            guard try COWDHeader(parsing: bytes).parentFileName != nil else { continue }
            try storage.write([UInt8](repeating: 0, count: 1024), at: 32, for: .header)
            try storage.flush()
        }
    }
}

extension VMDKDescriptor {
    /// ``parentUUID``; nothing is added to say that there is none.
    fileprivate mutating func setParentUUID(_ uuid: DiskUUID?) {
        if uuid.map(\.isNull) ?? true, diskDatabase("uuid.parent") == nil { return }
        parentUUID = uuid
    }

    /// ``parentModificationUUID``, likewise.
    fileprivate mutating func setParentModificationUUID(_ uuid: DiskUUID?) {
        if uuid.map(\.isNull) ?? true, diskDatabase("uuid.parentmodification") == nil { return }
        parentModificationUUID = uuid
    }

    /// What stands for a parent. One of another format has no content identifier: 0 then, so that other programs see
    /// that there is a parent (and QEMU refuses a parent that is not VMDK) instead of reading a base.
    static func parentContentID(of parent: CreateRequest.ParentDescription) throws(DiskError) -> UInt32 {
        guard parent.format == "vmdk" else { return 0 }
        guard let number = parent.identity.contentID, number != noContentID else {
            throw DiskError(
                .invalidArgument, "the parent has no content identifier that a child could record", image: parent.path)
        }
        return number
    }
}

internal import DiskStorage

/// Where the descriptor of an open image is kept, and what it says.
struct VMDKDescriptorFile: Sendable {
    /// What it says.
    var text: VMDKDescriptor
    /// The file that holds it.
    let storage: any Storage
    /// Where in that file, in bytes.
    let offset: UInt64
    /// How many bytes are set aside for it; nil: it is alone in its file.
    let room: Int?

    /// The most bytes of a descriptor that are read (`formats/vmdk`: VMware reads 20 sectors of an embedded one).
    static let limit = 2 << 20

    /// Writes a changed descriptor, durably. Only sectors that differ are written, so that a change of a few digits,
    /// which is all that opening for writing makes, is one write of one sector.
    mutating func replace(with text: VMDKDescriptor) throws(DiskError) {
        let old = try self.text.encoded()
        var new = try text.encoded()
        if let room {
            guard new.count <= room else {
                throw DiskError(
                    .unsupported, "the descriptor needs \(new.count) bytes, and only \(room) are set aside for it",
                    image: storage.name)
            }
            new.append(contentsOf: repeatElement(0, count: max(0, min(old.count, room) - new.count)))
        }
        if new.count > old.count, room == nil { try storage.setLength(offset + UInt64(new.count)) }
        for start in stride(from: 0, to: new.count, by: 512) {
            let part = start..<min(start + 512, new.count)
            if part.upperBound <= old.count, old[part] == new[part] { continue }
            try storage.write(Array(new[part]), at: offset + UInt64(start), for: .descriptor)
        }
        if new.count < old.count, room == nil { try storage.setLength(offset + UInt64(new.count)) }
        try storage.flush()
        self.text = text
    }
}

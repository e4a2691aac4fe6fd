internal import DiskStorage

/// Where the descriptor of an open image is kept, and what it says.
struct VMDKDescriptorFile: Sendable {
    /// What it says.
    var text: VMDKDescriptor
    /// The file that holds it.
    let storage: any Storage
    /// Where in that file, in bytes.
    var offset: UInt64
    /// How many bytes are set aside for it; nil: it is alone in its file.
    var room: Int?
    /// Whether there is none: an extent that can be a disk was opened by itself.
    var isMissing = false

    /// The most bytes of a descriptor that are read (`formats/vmdk`: VMware reads 20 sectors of an embedded one).
    static let limit = 2 << 20

    /// Writes a changed descriptor, durably. Only sectors that differ are written, so that a change of a few digits,
    /// which is all that opening for writing makes, is one write of one sector.
    mutating func replace(with text: VMDKDescriptor) throws(DiskError) {
        let old = try self.text.encoded()
        var new = try text.encoded()
        if let room {
            guard new.count <= room else { throw noRoom(new.count, room) }
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

    /// Writes a changed descriptor, durably and in one step: after a crash there is the old text or the new one.
    ///
    /// A change inside one sector is written where it is. A file of its own is replaced by a new one; for an embedded
    /// text see ``replaceEmbedded(_:)``. ``DiskError/Kind/unsupported`` if it cannot be written, or has no room.
    mutating func replaceAtomically(with text: VMDKDescriptor) throws(DiskError) {
        guard !isMissing else {
            throw DiskError(
                .unsupported, "is an extent of a disk, without its descriptor: name the descriptor file that lists it")
        }
        let old = try self.text.encoded()
        let new = try encoded(text)
        if old == new {
            self.text = text
        } else if isOneSector(old, new) {
            try replace(with: text)
        } else if room == nil {
            try storage.replaceContents(with: new, for: .descriptor)
            self.text = text
        } else {
            try replaceEmbedded(new)
            self.text = text
        }
    }

    /// The text's bytes; what cannot be written is what the format cannot store.
    private func encoded(_ text: VMDKDescriptor) throws(DiskError) -> [UInt8] {
        do throws(DiskError) {
            return try text.encoded()
        } catch {
            throw DiskError(.unsupported, error.message, image: storage.name)
        }
    }

    /// Whether both texts fill the same sectors, and differ in one of them at most.
    private func isOneSector(_ old: [UInt8], _ new: [UInt8]) -> Bool {
        guard room == nil ? old.count == new.count : (old.count + 511) / 512 == (new.count + 511) / 512 else {
            return false
        }
        if let room, new.count > room { return false }
        let longest = max(old.count, new.count)
        let changed = stride(from: 0, to: longest, by: 512).count { start in
            !old[min(start, old.count)..<min(start + 512, old.count)].elementsEqual(
                new[min(start, new.count)..<min(start + 512, new.count)])
        }
        return changed <= 1
    }

    func noRoom(_ needed: Int, _ room: Int) -> DiskError {
        DiskError(
            .unsupported,
            "the descriptor needs \(needed) bytes, and only \(room) are set aside for it in the file: a shorter text "
                + "fits", image: storage.name)
    }
}

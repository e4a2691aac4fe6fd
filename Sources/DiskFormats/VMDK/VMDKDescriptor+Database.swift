internal import DiskImage
internal import DiskStorage

/// What the disk database and the header say together: identity, parent, geometry, comment.
extension VMDKDescriptor {
    /// VirtualBox's UUID of the image (`ddb.uuid.image`). All zeros stand for none.
    var uuid: DiskUUID? {
        get { databaseUUID("uuid.image") }
        set { setDatabaseUUID("uuid.image", newValue) }
    }

    /// VirtualBox's UUID of the content: a new one at the first write after an open.
    var modificationUUID: DiskUUID? {
        get { databaseUUID("uuid.modification") }
        set { setDatabaseUUID("uuid.modification", newValue) }
    }

    /// The parent's ``uuid``.
    var parentUUID: DiskUUID? {
        get { databaseUUID("uuid.parent") }
        set { setDatabaseUUID("uuid.parent", newValue) }
    }

    /// The parent's ``modificationUUID`` when the child was made.
    var parentModificationUUID: DiskUUID? {
        get { databaseUUID("uuid.parentmodification") }
        set { setDatabaseUUID("uuid.parentmodification", newValue) }
    }

    private func databaseUUID(_ key: String) -> DiskUUID? {
        guard let uuid = diskDatabase(key).flatMap({ DiskUUID($0) }), !uuid.isNull else { return nil }
        return uuid
    }

    private mutating func setDatabaseUUID(_ key: String, _ uuid: DiskUUID?) {
        setDiskDatabase(key, (uuid ?? .null).description)
    }

    /// Whether the disk is a child. VMware says so by `parentCID`, VirtualBox by the parent's UUID alone; a
    /// `parentFileNameHint` without either is a leftover.
    var hasParent: Bool { parentContentID != Self.noContentID || parentUUID != nil }

    /// What names the content: the CID or, where that says so, the long one; in lower case.
    var effectiveContentID: String {
        let number = contentID
        guard number == Self.longContentIDMark, let long = diskDatabase("longContentID"), !long.isEmpty else {
            return Self.hexadecimal(number)
        }
        return long.lowercased()
    }

    /// What children record of this image.
    var identity: ImageIdentity {
        ImageIdentity(uuid: uuid, modificationUUID: modificationUUID, contentID: contentID)
    }

    /// Gives the content a new name, as every program does before its first write: a new CID and, where they are in
    /// use, a new long content identifier (whose last digits are the CID) and a new modification UUID.
    mutating func renewContentIdentity() {
        let number = Self.randomContentID(except: contentID)
        contentID = number
        if diskDatabase("longContentID") != nil {
            let random = DiskUUID.random().description.filter { $0 != "-" }
            setDiskDatabase("longContentID", random.prefix(24) + Self.hexadecimal(number))
        }
        if diskDatabase("uuid.image") != nil || diskDatabase("uuid.modification") != nil {
            modificationUUID = .random()
        }
    }

    /// A content identifier that has no special meaning.
    static func randomContentID(except current: UInt32 = 0) -> UInt32 {
        while true {
            let number = UInt32.random(in: 1..<longContentIDMark)
            if number != current { return number }
        }
    }

    /// A remark of the user's (`ddb.comment`). VirtualBox writes line ends and backslashes as `\n`, `\r`, `\\`.
    var comment: String? {
        get { diskDatabase("comment").map(Self.unescaped) }
        set { setDiskDatabase("comment", newValue.map(Self.escaped)) }
    }

    private static func escaped(_ text: String) -> String {
        var result = ""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\\": result += "\\\\"
            case "\n": result += "\\n"
            case "\r": result += "\\r"
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }

    private static func unescaped(_ text: String) -> String {
        var result = ""
        var scalars = text.unicodeScalars[...]
        while let scalar = scalars.popFirst() {
            let replacement: Unicode.Scalar? =
                switch (scalar, scalars.first) {
                case ("\\", "\\"): "\\"
                case ("\\", "n"): "\n"
                case ("\\", "r"): "\r"
                default: nil
                }
            if replacement != nil { scalars.removeFirst() }
            result.unicodeScalars.append(replacement ?? scalar)
        }
        return result
    }

    /// The disk's geometry.
    var geometry: DiskGeometry? {
        get { geometry("geometry.cylinders", "geometry.heads", "geometry.sectors") }
        set { setGeometry(newValue, "geometry.cylinders", "geometry.heads", "geometry.sectors") }
    }

    /// The geometry that the BIOS shall show.
    var biosGeometry: DiskGeometry? {
        get { geometry("geometry.biosCylinders", "geometry.biosHeads", "geometry.biosSectors") }
        set { setGeometry(newValue, "geometry.biosCylinders", "geometry.biosHeads", "geometry.biosSectors") }
    }

    private func geometry(_ cylinders: String, _ heads: String, _ sectors: String) -> DiskGeometry? {
        guard let cylinders = diskDatabase(cylinders).flatMap({ UInt64($0) }),
            let heads = diskDatabase(heads).flatMap({ UInt64($0) }),
            let sectors = diskDatabase(sectors).flatMap({ UInt64($0) })
        else { return nil }
        return DiskGeometry(cylinders: cylinders, heads: heads, sectors: sectors)
    }

    private mutating func setGeometry(_ value: DiskGeometry?, _ cylinders: String, _ heads: String, _ sectors: String) {
        setDiskDatabase(cylinders, value.map { String($0.cylinders) })
        setDiskDatabase(heads, value.map { String($0.heads) })
        setDiskDatabase(sectors, value.map { String($0.sectors) })
    }

    /// The kind of disk controller (`ide`, `buslogic`, `lsilogic`, `legacyESX`).
    var adapterType: String? {
        get { diskDatabase("adapterType") }
        set { setDiskDatabase("adapterType", newValue) }
    }
}

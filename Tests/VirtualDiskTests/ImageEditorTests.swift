import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// What an image says of itself can be changed, and nothing else changes with it: in every format that stores
/// anything, in bases and in children.
struct ImageEditorTests {
    private static let pool = RandomPool(seed: 17)
    private static let size = (3 << 20) + 512

    static let cases = FormatMatrixTests.cases.filter { $0.row.isWritable && $0.row.format != "overlay" }

    private static let values: ImageMetadata = {
        var values = ImageMetadata()
        values.comment = "Grüße: \\ \"quoted\"\nsecond line"
        values.uuid = .random()
        values.modificationUUID = .random()
        values.parentUUID = .random()
        values.parentModificationUUID = .random()
        values.physicalGeometry = DiskGeometry(cylinders: 77, heads: 16, sectors: 63)
        values.logicalGeometry = DiskGeometry(cylinders: 9, heads: 128, sectors: 62)
        return values
    }()

    private func information(_ path: String, _ row: FormatRow) throws -> ImageInformation {
        try #require(try ImageInformation.read(path, options: row.options(isWritable: false)).first)
    }

    /// The values for some of the fields.
    private func changes(_ fields: ImageMetadata.Fields) -> ImageChanges {
        var changes = ImageChanges()
        let values = Self.values
        if fields.contains(.comment) { changes.metadata.comment = values.comment }
        if fields.contains(.uuid) { changes.metadata.uuid = values.uuid }
        if fields.contains(.modificationUUID) { changes.metadata.modificationUUID = values.modificationUUID }
        if fields.contains(.parentUUID) { changes.metadata.parentUUID = values.parentUUID }
        if fields.contains(.parentModificationUUID) {
            changes.metadata.parentModificationUUID = values.parentModificationUUID
        }
        if fields.contains(.physicalGeometry) { changes.metadata.physicalGeometry = values.physicalGeometry }
        if fields.contains(.logicalGeometry) { changes.metadata.logicalGeometry = values.logicalGeometry }
        return changes
    }

    private static let allFields: [ImageMetadata.Fields] = (0..<7).map { .init(rawValue: 1 << $0) }

    @Test(arguments: cases) func everyFieldAloneAndAllTogether(_ test: FormatMatrixTests.Case) throws {
        let folder = try TemporaryFolder()
        var image = try MatrixImage(test, in: folder, size: Self.size, pool: Self.pool)
        try image.weWrite("before")
        try change(image, in: folder, "\(test), base")
        guard image.row.child != nil else { return }
        try image.makeSnapshot(image.row)
        try image.weWrite("in the child")
        try change(image, in: folder, "\(test), child")
    }

    private func change(_ image: MatrixImage, in folder: TemporaryFolder, _ context: String) throws {
        let options = image.row.options(isWritable: false)
        let old = try information(image.path, image.row)
        for field in Self.allFields where !old.settableFields.contains(field) {
            let before = try folder.snapshotOfAll()
            let error = #expect(throws: DiskError.self, "\(context): \(field.names)") {
                try ImageEditor.apply(changes(field), to: image.path, options: options)
            }
            let message = error.map(String.init(describing:)) ?? ""
            #expect(message.contains(image.row.format), "\(context): \(message)")
            #expect(try folder.snapshotOfAll() == before, "\(context): a refusal changed something")
        }
        // The parent's are left out here: with others, the chain does not open.
        var own = old.settableFields.subtracting([.parentUUID, .parentModificationUUID])
        // A VHD's geometry is its size for some programs.
        if image.row.format == "vhd" { own.remove(.physicalGeometry) }
        for field in Self.allFields.filter({ own.contains($0) }) + [own] where !own.isEmpty {
            let changes = changes(field)
            try ImageEditor.apply(changes, to: image.path, options: options)
            let new = try information(image.path, image.row)
            let found = new.metadata
            let isSame = changes.metadata.isContained(in: found)
            #expect(isSame, "\(context), \(field.names): \(found)")
            #expect(new.identity.contentID == old.identity.contentID, "\(context): the content is as it was")
            try image.weRead("after \(field.names)")
        }
        try image.expectSound("after all changes")
        var removal = ImageChanges()
        if own.contains(.comment) { removal.metadata.comment = "" }
        if !removal.isEmpty {
            try ImageEditor.apply(removal, to: image.path, options: options)
            #expect(try information(image.path, image.row).metadata.comment == nil, "\(context)")
        }
        let parents = old.settableFields.intersection([.parentUUID, .parentModificationUUID])
        guard !parents.isEmpty, let parentUUID = old.metadata.parentUUID else { return }
        try ImageEditor.apply(changes(parents), to: image.path, options: options)
        #expect(throws: DiskError.self, "\(context): it names another parent") {
            try Disk.open(image.path, options: options)
        }
        var back = ImageChanges()
        back.metadata.parentUUID = parentUUID
        if parents.contains(.parentModificationUUID) {
            back.metadata.parentModificationUUID = old.metadata.parentModificationUUID ?? .null
        }
        try ImageEditor.apply(back, to: image.path, options: options)
        try image.weRead("over its own parent again")
        try image.expectSound("over its own parent again")
    }

    /// One that is open is left alone, and so is one with a property that does not fit.
    @Test func refusals() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.vdi"))
        new.size = 1 << 20
        try new.create()
        var changes = ImageChanges()
        changes.metadata.comment = "one"
        for isWritable in [true, false] {
            let disk = try Disk.open(new.path, options: DiskOptions(isWritable: isWritable))
            let error = #expect(throws: DiskError.self) { try ImageEditor.apply(changes, to: new.path) }
            #expect(error?.kind == .locked)
            try disk.close()
        }
        let before = try folder.snapshotOfAll()
        changes.metadata.comment = String(repeating: "x", count: 256)
        changes.metadata.uuid = .random()
        #expect(throws: DiskError.self) { try ImageEditor.apply(changes, to: new.path) }
        #expect(try folder.snapshotOfAll() == before)
    }

    /// A separate descriptor keeps its mode when another file takes its place, and the image is locked all the time.
    @Test func replacedDescriptor() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.vmdk"))
        (new.size, new.variant) = (1 << 20, "fixed")
        try new.create()
        try Peer.run("chmod", "640", new.path)
        try Peer.run("python3", "-c", "import os, sys; os.setxattr(sys.argv[1], 'user.test', b'yes')", new.path)
        var changes = ImageChanges()
        changes.metadata.comment = String(repeating: "long ", count: 300)
        let backend = try ImageEditor.open(new.path, options: DiskOptions(), for: changes)
        try backend.apply(changes)
        #expect(throws: DiskError.self, "still locked") { try Disk.open(new.path) }
        try backend.apply(changes)
        try backend.close()
        #expect(try Peer.run("stat", "-c", "%a", new.path) == "640\n")
        let script = "import os, sys; print(os.getxattr(sys.argv[1], 'user.test').decode())"
        #expect(try Peer.run("python3", "-c", script, new.path) == "yes\n")
        #expect(try folder.snapshotOfAll().keys.sorted() == ["disk-flat.vmdk", "disk.vmdk"])
    }

    /// What the header says of an embedded descriptor's place and room is kept, and its text is where QEMU looks.
    @Test func embeddedDescriptorGrowsAndShrinks() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("disk.vmdk"))
        new.size = 1 << 20
        try new.create()
        let old = try folder.read("disk.vmdk")
        for length in [1, 600, 3000, 8000, 9000, 4000, 0] {
            var changes = ImageChanges()
            changes.metadata.comment = String(repeating: "c", count: length)
            try ImageEditor.apply(changes, to: new.path)
            let found = try ImageInformation.read(new.path)[0].metadata.comment
            #expect(found?.count ?? 0 == length)
            let bytes = try folder.read("disk.vmdk")
            #expect(bytes[..<512] == old[..<512], "\(length)")
            #expect(Array(bytes[512..<533]) == Array("# Disk DescriptorFile".utf8), "\(length)")
            #expect(bytes.count == old.count, "\(length): nothing is left at the end")
            try Peer.run("qemu-img", "check", "-q", new.path)
        }
        #expect(try folder.read("disk.vmdk") == old)
        var changes = ImageChanges()
        changes.metadata.comment = String(repeating: "c", count: 30_000)
        let error = #expect(throws: DiskError.self) { try ImageEditor.apply(changes, to: new.path) }
        #expect(error?.kind == .unsupported)
        #expect(try folder.read("disk.vmdk") == old)
    }

    /// A compressed stream cannot be written, but what stands in its descriptor can be changed.
    @Test func stream() throws {
        let folder = try TemporaryFolder()
        var model = DiskModel(size: 1 << 20)
        model.write(Self.pool.prefix(300_000), at: 5000)
        let source = try folder.write(model.bytes, to: "source.raw")
        let path = folder.file("stream.vmdk")
        try Peer.run(
            "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", source, path)
        var changes = ImageChanges()
        changes.metadata.comment = String(repeating: "a stream ", count: 100)
        changes.metadata.uuid = .random()
        try ImageEditor.apply(changes, to: path)
        let found = try ImageInformation.read(path)[0].metadata
        #expect(found.comment == changes.metadata.comment && found.uuid == changes.metadata.uuid)
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vmdk", source, path)
        #expect(throws: DiskError.self) { try Disk.open(path, options: DiskOptions(isWritable: true)) }
    }
}

extension ImageMetadata {
    /// Whether the fields that are there are the same in another.
    func isContained(in other: ImageMetadata) -> Bool {
        (comment == nil || comment == other.comment) && (uuid == nil || uuid == other.uuid)
            && (modificationUUID == nil || modificationUUID == other.modificationUUID)
            && (parentUUID == nil || parentUUID == other.parentUUID)
            && (parentModificationUUID == nil || parentModificationUUID == other.parentModificationUUID)
            && (physicalGeometry == nil || physicalGeometry == other.physicalGeometry)
            && (logicalGeometry == nil || logicalGeometry == other.logicalGeometry)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

private let mebibyte: UInt64 = 1 << 20

/// Creates an image in a folder and answers its path.
@discardableResult
private func create(
    _ folder: TemporaryFolder, _ name: String = "disk.vmdk", size: UInt64, _ variant: String? = nil,
    blockSize: UInt64? = nil, parent: CreateRequest.ParentDescription? = nil, comment: String? = nil,
    uuid: DiskUUID? = nil, _ options: [String: String] = [:]
) throws(DiskError) -> String {
    let request = CreateRequest(
        path: folder.file(name), virtualSize: size, variant: variant, blockSize: blockSize, parent: parent,
        comment: comment, uuid: uuid, options: options)
    try createVMDK(request, companions: FolderCompanions())
    return folder.file(name)
}

/// The descriptor of an image, from its own file or inside the sparse extent.
private func descriptor(_ folder: TemporaryFolder, _ name: String = "disk.vmdk") throws -> VMDKDescriptor {
    let bytes = try folder.read(name)
    guard VMDKSparseHeader.hasMagic(bytes) else { return try VMDKDescriptor(parsing: bytes) }
    let header = try VMDKSparseHeader(parsing: bytes)
    let start = Int(header.descriptorSector) * 512
    return try VMDKDescriptor(parsing: Array(bytes[start..<start + Int(header.descriptorSectorCount) * 512]))
}

private func length(_ folder: TemporaryFolder, _ name: String) throws -> UInt64 {
    try FileStorage(path: folder.file(name), isWritable: false).length()
}

private func allocated(_ folder: TemporaryFolder, _ name: String) throws -> UInt64 {
    try FileStorage(path: folder.file(name), isWritable: false).allocatedBytes()
}

@Suite struct VMDKCreateTests {
    /// What qemu-img says of the size, and whether it finds the tables in order and the disk empty.
    private func checkEmpty(_ folder: TemporaryFolder, _ path: String, size: UInt64, tables: Bool) throws {
        let info = try qemuImage("info", "--output=json", path)
        #expect(info.contains("\"virtual-size\": \(size),"), "\(info)")
        #expect(info.contains("\"format\": \"vmdk\""))
        if tables { #expect(try qemuImage("check", path).contains("No errors were found")) }
        let zeros = folder.file("zeros.raw")
        try qemuImage("create", "-f", "raw", zeros, "\(size)")
        try qemuImage("compare", "-f", "vmdk", "-F", "raw", path, zeros)
        let result = try Subprocess.run(["rm", zeros])
        #expect(result.status == 0)
    }

    @Test(
        arguments: [
            ("dynamic", true), ("fixed", false), ("split", true), ("split-fixed", false), ("stream", true),
            ("esx", false),
            ("esx-sparse", true),
        ], [512, 64 << 10, 20 * mebibyte, 100 * mebibyte + 512])
    func variants(_ variant: (String, Bool), _ size: UInt64) throws {
        let folder = try TemporaryFolder()
        let path = try create(folder, size: size, variant.0)
        try checkEmpty(folder, path, size: size, tables: variant.1)
        let text = try descriptor(folder)
        #expect(text.sectorCount == size / 512)
        #expect(text.uuid != nil && text.modificationUUID != nil && text.parentUUID == nil && !text.hasParent)
        #expect(text.contentID != 0 && text.version == 1)
    }

    @Test func layoutIsThatOfPeers() throws {
        let folder = try TemporaryFolder()
        for (size, zeroedGrain) in [(20 * mebibyte, "off"), (5000 * mebibyte, "on")] {
            let name = "ours-\(zeroedGrain).vmdk"
            try create(folder, name, size: size, "dynamic", ["zeroed-grain": zeroedGrain])
            let other = "theirs-\(zeroedGrain).vmdk"
            try qemuImage(
                "create", "-f", "vmdk", "-o", "zeroed_grain=\(zeroedGrain)", folder.file(other), "\(size)")
            let ours = try folder.read(name)
            let theirs = try folder.read(other)
            #expect(ours.count == theirs.count)
            let a = try VMDKSparseHeader(parsing: ours)
            let b = try VMDKSparseHeader(parsing: theirs)
            #expect(a == b)
            #expect(a.hasZeroGrains == (zeroedGrain == "on"))
            let tables = Int(a.redundantDirectorySector * 512)..<Int(a.overheadSectors * 512)
            #expect(ours[tables] == theirs[tables])
        }
    }

    @Test func tablesTakeNoSpace() throws {
        let folder = try TemporaryFolder()
        try create(folder, size: 1 << 40)
        #expect(try length(folder, "disk.vmdk") > 128 * mebibyte)
        #expect(try allocated(folder, "disk.vmdk") < mebibyte)
        try qemuImage("info", folder.file("disk.vmdk"))
    }

    @Test(
        arguments: [
            ("dynamic", 4 << 10), ("dynamic", 2 << 20), ("split", 1 << 20), ("stream", 4 << 10), ("stream", 2 << 20),
            ("esx-sparse", 512), ("esx-sparse", 1 << 20),
        ] as [(String, UInt64)])
    func grainSizes(_ variant: String, _ grain: UInt64) throws {
        let folder = try TemporaryFolder()
        let path = try create(folder, size: 40 * mebibyte, variant, blockSize: grain)
        try checkEmpty(folder, path, size: 40 * mebibyte, tables: true)
    }

    /// What QEMU writes into our empty images is what QEMU reads from them, and the tables stay in order.
    @Test(arguments: ["dynamic", "fixed", "split", "split-fixed", "esx", "esx-sparse"])
    func peersWrite(_ variant: String) throws {
        let folder = try TemporaryFolder()
        let path = try create(folder, size: 70 * mebibyte, variant, ["split-size": "32M"])
        let commands = ["write -P 17 0 1M", "write -P 18 40M 200k", "write -P 19 71679k 1k", "write -P 20 31M 2M"]
        let raw = folder.file("disk.raw")
        try qemuImage("create", "-f", "raw", raw, "70M")
        for (format, file) in [("vmdk", path), ("raw", raw)] {
            let result = try Subprocess.run(["qemu-io", "-f", format] + commands.flatMap { ["-c", $0] } + [file])
            #expect(result.status == 0, "\(result.errorText)\(result.outputText)")
        }
        try qemuImage("compare", path, raw)
        if !variant.hasSuffix("fixed"), variant != "esx" { try qemuImage("check", path) }
    }

    /// libvmdk's program opens what QEMU has written into ours, and shows the same bytes. Debian 12's version of it
    /// opens nobody's monolithicFlat ("Unsupported disk type").
    @Test(arguments: ["dynamic", "split", "split-fixed", "esx", "esx-sparse"])
    func vmdkmountReads(_ variant: String) throws {
        let folder = try TemporaryFolder()
        let size = 34 * mebibyte
        let path = try create(folder, size: size, variant, ["split-size": "32M"])
        let write = try Subprocess.run(["qemu-io", "-f", "vmdk", "-c", "write -P 17 31M 2M", path])
        #expect(write.status == 0, "\(write.errorText)\(write.outputText)")
        let point = folder.file("mnt")
        #expect(try Subprocess.run(["mkdir", point]).status == 0)
        let mount = try Subprocess.run(["vmdkmount", path, point])
        try #require(
            mount.status == 0, "vmdkmount, /dev/fuse and root are needed: \(mount.outputText)\(mount.errorText)")
        defer { withExtendedLifetime(folder) { _ = try? Subprocess.run(["umount", point]) } }
        let expected =
            [UInt8](repeating: 0, count: 31 << 20) + [UInt8](repeating: 17, count: 2 << 20)
            + [UInt8](repeating: 0, count: 1 << 20)
        #expect(try folder.read("mnt/vmdk1") == expected)
    }

    @Test func splitFiles() throws {
        let folder = try TemporaryFolder()
        let path = try create(folder, size: 5 << 30, "split")
        #expect(try descriptor(folder).extents.map(\.fileName) == (1...3).map { "disk-s00\($0).vmdk" })
        #expect(try descriptor(folder).extents.map(\.sectorCount) == [2 << 21, 2 << 21, 1 << 21])
        #expect(try qemuImage("info", path).contains("twoGbMaxExtentSparse"))
        try create(folder, "flat.vmdk", size: 300 << 10, "split-fixed", ["split-size": "131072"])
        #expect(
            try descriptor(folder, "flat.vmdk").extents.map(\.line) == [
                "RW 256 FLAT \"flat-f001.vmdk\" 0", "RW 256 FLAT \"flat-f002.vmdk\" 0",
                "RW 88 FLAT \"flat-f003.vmdk\" 0",
            ])
        #expect(try length(folder, "flat-f003.vmdk") == 44 << 10)
    }

    @Test func spaceOfFlatFiles() throws {
        let folder = try TemporaryFolder()
        try create(folder, size: mebibyte, "fixed")
        #expect(try allocated(folder, "disk-flat.vmdk") >= mebibyte)
        try create(folder, "thin.vmdk", size: 4 << 40, "fixed", ["preallocation": "off"])
        #expect(try allocated(folder, "thin-flat.vmdk") == 0)
        #expect(try length(folder, "thin-flat.vmdk") == 4 << 40)
        try create(folder, "esx.vmdk", size: mebibyte, "esx", ["preallocation": "off"])
        #expect(try descriptor(folder, "esx.vmdk").diskDatabase("thinProvisioned") == "1")
        #expect(try descriptor(folder, "esx.vmdk").adapterType == "lsilogic")
    }

    @Test func namesWithSpacesAndLetters() throws {
        let folder = try TemporaryFolder()
        for name in ["my disk.VMDK", "disk.img", "платте ü.vmdk"] {
            let path = try create(folder, name, size: mebibyte, "fixed", ["preallocation": "off"])
            try qemuImage("compare", "-f", "vmdk", path, path)
        }
        #expect(try length(folder, "my disk-flat.vmdk") == mebibyte)
        #expect(try length(folder, "disk.img-flat.vmdk") == mebibyte)
    }

    @Test func whatIsRecorded() throws {
        let folder = try TemporaryFolder()
        let uuid = DiskUUID.random()
        let comment = String(repeating: "a long \"comment\"\n", count: 2000)
        let path = try create(
            folder, size: 3 << 30, comment: comment, uuid: uuid,
            ["adapter-type": "LSILOGIC", "hardware-version": "18"])
        let text = try descriptor(folder)
        #expect(text.uuid == uuid)
        #expect(text.comment == comment)
        #expect(text.adapterType == "lsilogic")
        #expect(text.diskDatabase("virtualHWVersion") == "18")
        #expect(text.geometry == DiskGeometry(cylinders: 391, heads: 255, sectors: 63))
        #expect(text.extents.first?.fileName == "disk.vmdk")
        try qemuImage("check", path)
    }

    @Test func geometries() {
        let ide = { DiskGeometry.vmdk(sectorCount: $0, adapterType: "ide") }
        #expect(ide(1) == DiskGeometry(cylinders: 1, heads: 16, sectors: 63))
        #expect(ide(2 << 20) == DiskGeometry(cylinders: 2080, heads: 16, sectors: 63))
        #expect(ide(1 << 40) == DiskGeometry(cylinders: 16_383, heads: 16, sectors: 63))
        let scsi = { DiskGeometry.vmdk(sectorCount: $0, adapterType: "lsilogic") }
        #expect(scsi(4096) == DiskGeometry(cylinders: 2, heads: 64, sectors: 32))
        #expect(scsi(1 << 21) == DiskGeometry(cylinders: 512, heads: 128, sectors: 32))
        #expect(scsi(536_870_912) == DiskGeometry(cylinders: 33_418, heads: 255, sectors: 63))
    }
}

@Suite struct VMDKCreateErrorTests {
    @Test(
        arguments: [
            (0, nil, nil, [:]), (1000, nil, nil, [:]), (mebibyte, "thick", nil, [:]), (mebibyte, nil, 1000, [:]),
            (mebibyte, nil, 2048, [:]), (mebibyte, nil, 4 << 20, [:]), (mebibyte, nil, nil, ["adapter-type": "nvme"]),
            (mebibyte, nil, nil, ["hardware-version": "0"]), (mebibyte, nil, nil, ["zeroed-grain": "maybe"]),
            (mebibyte, nil, nil, ["colour": "red"]), (mebibyte, "split", nil, ["split-size": "0"]),
            (mebibyte, "split", nil, ["split-size": "1000"]), (mebibyte, "split", nil, ["split-size": "99999999T"]),
            (mebibyte, "split", 1 << 20, ["split-size": "64K"]), (1 << 50, "split", nil, ["split-size": "1G"]),
            (2 << 40, "dynamic", nil, [:]), (5 << 40, "dynamic", nil, [:]), (1 << 62, "dynamic", nil, [:]),
            (2 << 40, "esx-sparse", nil, [:]), (1 << 42, "esx-sparse", nil, [:]), (1 << 63, nil, nil, [:]),
            (mebibyte, "full-device", nil, [:]), (mebibyte, nil, nil, ["device": "/dev/null"]),
            (0, "full-device", nil, ["device": "/dev/null"]), (0, "full-device", nil, ["device": "/nowhere/at/all"]),
            (0, "partitioned-device", nil, ["device": "/dev/null"]), (mebibyte, nil, nil, ["partitions": "1"]),
            (0, "partitioned-device", nil, ["device": "x", "partitions": "0"]),
            (0, "partitioned-device", nil, ["device": "x", "partitions": "1,1"]),
            (0, "partitioned-device", nil, ["device": "x", "partitions": "a"]),
        ] as [(UInt64, String?, UInt64?, [String: String])])
    func refused(_ size: UInt64, _ variant: String?, _ blockSize: UInt64?, _ options: [String: String]) throws {
        let folder = try TemporaryFolder()
        #expect(throws: DiskError.self) {
            try create(folder, size: size, variant, blockSize: blockSize, options)
        }
    }

    @Test func tooLargeForOneFileIsSplit() throws {
        let folder = try TemporaryFolder()
        let path = try create(folder, size: 2 << 40)
        #expect(try descriptor(folder).createType == .twoGbMaxExtentSparse)
        #expect(try descriptor(folder).extents.map(\.sectorCount) == [1 << 31, 1 << 31])
        #expect(try qemuImage("info", "--output=json", path).contains("\"virtual-size\": \(2 << 40 as UInt64),"))
        #expect { try create(folder, "other.vmdk", size: 2 << 40, "dynamic") } throws: { "\($0)".contains("'split'") }
    }

    @Test func existingFilesAreNotTouched() throws {
        for (variant, name) in [
            ("dynamic", "disk.vmdk"), ("fixed", "disk.vmdk"), ("fixed", "disk-flat.vmdk"), ("split", "disk-s001.vmdk"),
            ("esx-sparse", "disk-delta.vmdk"),
        ] {
            let folder = try TemporaryFolder()
            try folder.write([1, 2, 3], to: name)
            #expect(throws: DiskError.self) { try create(folder, size: mebibyte, variant) }
            #expect(try folder.read(name) == [1, 2, 3])
        }
    }

    @Test func strangeNames() throws {
        let folder = try TemporaryFolder()
        for name in ["a\"b.vmdk", "a\nb.vmdk", ""] {
            #expect(throws: DiskError.self) { try create(folder, name, size: mebibyte, "fixed") }
        }
    }
}

@Suite struct VMDKCreateChildTests {
    private func description(_ folder: TemporaryFolder, _ name: String) throws -> CreateRequest.ParentDescription {
        CreateRequest.ParentDescription(path: name, format: "vmdk", identity: try descriptor(folder, name).identity)
    }

    @Test(arguments: [nil, "dynamic", "split", "esx-sparse"] as [String?])
    func peersFollowTheLink(_ variant: String?) throws {
        let folder = try TemporaryFolder()
        let base = try create(folder, "base.vmdk", size: 33 * mebibyte)
        let write = try Subprocess.run(["qemu-io", "-f", "vmdk", "-c", "write -P 9 1M 1M", base])
        #expect(write.status == 0)
        let parent = try description(folder, "base.vmdk")
        let child = try create(folder, "child.vmdk", size: 33 * mebibyte, variant, parent: parent)
        let text = try descriptor(folder, "child.vmdk")
        #expect(text.hasParent && text.parentContentID == parent.identity.contentID)
        #expect(text.parentFileNameHint == "base.vmdk")
        #expect(text.parentUUID == parent.identity.uuid && text.parentUUID != nil)
        #expect(text.parentModificationUUID == parent.identity.modificationUUID)
        try qemuImage("compare", child, base)
        let over = try Subprocess.run([
            "qemu-io", "-f", "vmdk", "-c", "write -P 8 1M 4k", "-c", "read -P 9 1028k 4k", child,
        ])
        #expect(over.status == 0, "\(over.errorText)\(over.outputText)")
        #expect(!over.outputText.contains("verification failed"))
        try qemuImage("check", child)
    }

    @Test func parentOfAnotherFormat() throws {
        let folder = try TemporaryFolder()
        let uuid = DiskUUID.random()
        let parent = CreateRequest.ParentDescription(
            path: "base.vdi", format: "vdi", identity: ImageIdentity(uuid: uuid))
        try create(folder, size: mebibyte, parent: parent)
        let text = try descriptor(folder)
        #expect(text.parentContentID == 0 && text.parentUUID == uuid && text.hasParent)
        let raw = CreateRequest.ParentDescription(path: "base.raw", format: "raw", identity: ImageIdentity())
        try create(folder, "b.vmdk", size: mebibyte, parent: raw)
        #expect(try descriptor(folder, "b.vmdk").hasParent)
    }

    @Test func refused() throws {
        let folder = try TemporaryFolder()
        let parent = CreateRequest.ParentDescription(
            path: "base.vmdk", format: "vmdk", identity: ImageIdentity(contentID: 5))
        for variant in ["fixed", "split-fixed", "stream", "esx"] {
            #expect(throws: DiskError.self) { try create(folder, size: mebibyte, variant, parent: parent) }
        }
        for number in [nil, VMDKDescriptor.noContentID] {
            let none = CreateRequest.ParentDescription(
                path: "base.vmdk", format: "vmdk", identity: ImageIdentity(contentID: number))
            #expect(throws: DiskError.self) { try create(folder, size: mebibyte, parent: none) }
        }
        let strange = CreateRequest.ParentDescription(
            path: "a\nb.vmdk", format: "vmdk", identity: ImageIdentity(contentID: 5))
        #expect(throws: DiskError.self) { try create(folder, size: mebibyte, parent: strange) }
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// What the tests of VHD have in common.
enum VHD {
    /// Makes an image of `size` bytes, or over a parent.
    @discardableResult
    static func create(
        _ folder: TemporaryFolder, _ name: String = "disk.vhd", size: Int? = nil, blockSize: UInt64? = nil,
        variant: String? = nil, parent: String? = nil, _ options: [String: String] = [:]
    ) throws -> String {
        var new = NewImage(path: folder.file(name))
        new.size = size.map { UInt64($0) }
        new.blockSize = blockSize
        new.variant = variant
        new.parent = parent.map { folder.file($0) }
        new.parentFormat = parent?.hasSuffix(".raw") == true ? "raw" : nil
        new.options = options
        try new.create()
        return new.path
    }

    /// Opens, writes and closes.
    static func write(_ path: String, _ pieces: [(value: UInt8, offset: UInt64, count: Int)]) throws {
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        for piece in pieces {
            try disk.write([UInt8](repeating: piece.value, count: piece.count), at: piece.offset)
        }
        try disk.close()
    }

    /// What a property of an image says.
    static func property(_ key: String, of path: String) throws -> String? {
        try ImageInformation.read(path)[0].properties.first { $0.key == key }?.value
    }

    /// Changes bytes of a file in place.
    static func poke(_ path: String, _ bytes: [UInt8], at offset: UInt64) throws {
        try FileStorage(path: path, isWritable: true).write(bytes, at: offset, for: .header)
    }

    static func length(_ path: String) throws -> UInt64 { try FileStorage(path: path, isWritable: false).length() }

    // MARK: - The second reader

    /// The reader of these tests that shares nothing with the library finds the images sound.
    static func expectSound(_ paths: [String], isClosed: Bool = true, _ context: String = "") throws {
        try SecondReader.vhd.expectSound(paths, isClosed: isClosed, context)
    }

    /// It reads in a chain what `model` holds. `base` stands for a base that is no VHD.
    static func expectAgreement(
        _ path: String, _ model: DiskModel, base: String? = nil, _ context: String = ""
    ) throws {
        try SecondReader.vhd.expectAgreement(path, model, base: base, context)
    }

    /// libyal's vhdimount shows what `model` holds. It needs /dev/fuse and root.
    static func expectAgreementOfVhdimount(
        _ path: String, _ model: DiskModel, _ folder: TemporaryFolder, depth: Int, _ context: String = ""
    ) throws {
        let point = folder.file("vhdi")
        try Peer.run("mkdir", "-p", point)
        let mount = try Subprocess.run(["vhdimount", path, point])
        try #require(mount.status == 0, "vhdimount, /dev/fuse and root are needed: \(mount.errorText)")
        defer { withExtendedLifetime(folder) { _ = try? Subprocess.run(["umount", point]) } }
        // Each image of the chain is a file there, the newest one last.
        let bytes = try folder.read("vhdi/vhdi\(depth)")
        #expect(bytes.count == model.size, "\(context)")
        if bytes.count == model.size, let mistake = model.mistake(in: bytes, at: 0) {
            Issue.record("\(context): vhdimount: \(mistake)")
        }
    }
}

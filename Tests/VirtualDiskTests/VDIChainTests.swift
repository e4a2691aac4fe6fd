import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// A VDI names its parent by UUID alone: it is looked for in the folders where it may be, and is the right one only if
/// nothing was written to it since.
struct VDIChainTests {
    private static let size = 1 << 20

    /// A base with sevens in its first 300,000 bytes, in `folder`.
    private func makeBase(_ path: String) throws {
        var base = NewImage(path: path)
        base.size = UInt64(Self.size)
        base.blockSize = 64 << 10
        try base.create()
        try write([UInt8](repeating: 7, count: 300_000), at: 0, to: path)
    }

    private func makeChild(_ path: String, of parent: String) throws {
        var child = NewImage(path: path)
        child.parent = parent
        child.blockSize = 16 << 10
        try child.create()
    }

    private func write(
        _ bytes: [UInt8], at offset: UInt64, to path: String, allowing folders: [String] = []
    ) throws {
        var options = DiskOptions(isWritable: true, allowedFolders: folders)
        options.lazyFlushInterval = 0
        let disk = try Disk.open(path, options: options)
        try disk.write(bytes, at: offset)
        try disk.close()
    }

    private func expectReads(_ path: String, allowing folders: [String] = []) throws {
        let disk = try Disk.open(path, options: DiskOptions(allowedFolders: folders))
        #expect(
            try disk.read(at: 0, count: 300_001) == [UInt8](repeating: 7, count: 299_999) + [9, 0])
        try disk.close()
    }

    /// A base, and a child that differs from it in one byte.
    private func makeChain(_ base: String, _ child: String) throws {
        try makeBase(base)
        try makeChild(child, of: base)
        try write([9], at: 299_999, to: child)
    }

    private func fails(_ path: String, _ kind: DiskError.Kind, _ words: String..., allowing folders: [String] = []) {
        #expect {
            try Disk.open(path, options: DiskOptions(allowedFolders: folders))
        } throws: { error in
            guard let error = error as? DiskError, error.kind == kind else { return false }
            return words.allSatisfy { "\(error)".contains($0) }
        }
    }

    @Test func parentIsFoundWhereverItMayBe() throws {
        let folder = try TemporaryFolder()
        try makeChain(folder.file("base.vdi"), folder.file("child.vdi"))
        try expectReads(folder.file("child.vdi"))
        // Beside it, under another name, among files that are something else.
        try Peer.run("mv", folder.file("base.vdi"), folder.file("{5f0c}"))
        try folder.write([UInt8](repeating: 0, count: 5), to: "a")
        try folder.write(Array("<<< no image >>>".utf8), to: "b.vdi")
        try makeBase(folder.file("another.vdi"))
        try Peer.run("mkfifo", folder.file("c.vdi"))
        try expectReads(folder.file("child.vdi"))
        // Above a folder with VirtualBox's name for it, and no other.
        try Peer.run("mkdir", folder.file("Snapshots"), folder.file("Others"))
        try Peer.run("mv", folder.file("child.vdi"), folder.file("Snapshots"))
        try expectReads(folder.file("Snapshots/child.vdi"))
        try Peer.run("mv", folder.file("Snapshots/child.vdi"), folder.file("Others"))
        let uuid = try #require(try ImageInformation.read(folder.file("{5f0c}")).first?.identity.uuid)
        fails(folder.file("Others/child.vdi"), .notFound, uuid.description, "--allow-dir")
        // Where the user says.
        try expectReads(folder.file("Others/child.vdi"), allowing: [folder.path])
    }

    @Test func deepChainInTwoFolders() throws {
        let folder = try TemporaryFolder()
        try Peer.run("mkdir", folder.file("Snapshots"))
        try makeChain(folder.file("base.vdi"), folder.file("Snapshots/1.vdi"))
        for number in 2...12 {
            try makeChild(folder.file("Snapshots/\(number).vdi"), of: folder.file("Snapshots/\(number - 1).vdi"))
        }
        try expectReads(folder.file("Snapshots/12.vdi"))
        let chain = try ImageInformation.read(folder.file("Snapshots/12.vdi"), wholeChain: true)
        #expect(chain.count == 13)
        var model = DiskModel(size: Self.size)
        model.write([UInt8](repeating: 7, count: 299_999) + [9], at: 0)
        #expect(try VDIReader.flatten(folder.file("Snapshots/12.vdi"), in: folder) == model.bytes)
    }

    /// Copies have the same UUID; what was written since tells them apart.
    @Test func theCopyThatFitsIsTaken() throws {
        let folder = try TemporaryFolder()
        try makeChain(folder.file("m.vdi"), folder.file("child.vdi"))
        for copy in ["a.vdi", "z.vdi"] {
            try Peer.run("cp", folder.file("m.vdi"), folder.file(copy))
            try write([UInt8](repeating: 1, count: 100_000), at: 0, to: folder.file(copy))
        }
        try expectReads(folder.file("child.vdi"))
        #expect(
            try ImageInformation.read(folder.file("child.vdi"), wholeChain: true)[1].path.hasSuffix("/m.vdi"))
        // Without it, the others are not it.
        try Peer.run("rm", folder.file("m.vdi"))
        fails(folder.file("child.vdi"), .brokenLink, "child.vdi", "a.vdi", "changed after this snapshot")
    }

    @Test func onlyWritesChangeTheParent() throws {
        let folder = try TemporaryFolder()
        let base = folder.file("base.vdi")
        try makeChain(base, folder.file("child.vdi"))
        let before = try folder.read("base.vdi")
        // Opened, read, flushed and closed, with and without permission to write: not a byte changes.
        for isWritable in [false, true] {
            let disk = try Disk.open(base, options: DiskOptions(isWritable: isWritable))
            _ = try disk.read(at: 0, count: 4096)
            try disk.flush()
            try disk.close()
            #expect(try folder.read("base.vdi") == before)
        }
        try expectReads(folder.file("child.vdi"))
        _ = try ImageCheck.run(base, repair: true)
        #expect(try folder.read("base.vdi") == before)
        let uuid = try ImageInformation.read(base)[0].identity.modificationUUID
        try write([7], at: 0, to: base)
        let after = try ImageInformation.read(base)[0].identity
        #expect(after.modificationUUID != uuid && after.uuid != nil)
        fails(
            folder.file("child.vdi"), .brokenLink, "base.vdi", uuid?.description ?? "",
            after.modificationUUID?.description ?? "")
        // Once a session.
        let disk = try Disk.open(base, options: DiskOptions(isWritable: true))
        try disk.write([1], at: 0)
        let first = try disk.images()[0].identity
        try disk.write([2], at: 5000)
        try disk.flush()
        try disk.write([3], at: 500_000)
        #expect(try disk.images()[0].identity == first)
        try disk.close()
        #expect(try ImageInformation.read(base)[0].identity == first)
        #expect(try VDIReader.fields(base)["modification"] == first.modificationUUID?.description)
    }

    /// The new UUID is on stable storage before the first byte of the guest's is written.
    @Test func modificationIsNotedFirst() throws {
        let folder = try TemporaryFolder()
        try makeBase(folder.file("base.vdi"))
        let events = Locked<[String]>([])
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { noting($0, events) }
        let disk = try Disk.open(folder.file("base.vdi"), options: options)
        #expect(events.withLock { $0.filter { !$0.hasPrefix("read") } } == [])
        try disk.write([1], at: 0)
        let first = events.withLock { $0.filter { !$0.hasPrefix("read") }.prefix(3) }
        #expect(first.count == 3 && first[0] == "write table 0" && first[1] == "flush")
        #expect(first.last?.hasPrefix("write guestData") == true, "\(first)")
        try disk.close()
    }

    /// Among the neighbours only beginnings and ends are looked at.
    @Test func searchReadsHeadersAlone() throws {
        let folder = try TemporaryFolder()
        try makeChain(folder.file("zbase.vdi"), folder.file("child.vdi"))
        for name in ["a.vdi", "b.vdi"] { try makeBase(folder.file(name)) }
        try folder.write([UInt8](repeating: 1, count: 1 << 20), to: "c.iso")
        let events = Locked<[String]>([])
        var options = DiskOptions()
        options.wrapStorage = { storage in
            let isOther = ["a.vdi", "b.vdi", "c.iso"].contains { storage.name.hasSuffix($0) }
            return isOther ? noting(storage, events) : storage
        }
        let disk = try Disk.open(folder.file("child.vdi"), options: options)
        _ = try disk.read(at: 0, count: Self.size)
        try disk.close()
        let found = events.withLock { $0 }
        #expect(!found.isEmpty && found.allSatisfy { $0.hasPrefix("read header") || $0.hasPrefix("read footer") })
    }

    @Test func circlesAndMissingNamesAreFound() throws {
        let folder = try TemporaryFolder()
        try makeChain(folder.file("base.vdi"), folder.file("child.vdi"))
        // The base becomes a child of its child.
        let child = try ImageInformation.read(folder.file("child.vdi"))[0].identity
        let file = try FileStorage(path: folder.file("base.vdi"), isWritable: true)
        try file.write([4], at: 76, for: .header)
        fails(folder.file("base.vdi"), .invalidImage, "names no parent")
        #expect(try ImageInformation.read(folder.file("base.vdi"))[0].properties.contains { $0.key == "damage" })
        try file.write((child.uuid ?? .null).mixedEndian, at: 424, for: .header)
        fails(folder.file("child.vdi"), .brokenLink, "circle")
        try file.write(
            (try ImageInformation.read(folder.file("base.vdi"))[0].identity.uuid ?? .null).mixedEndian, at: 424,
            for: .header)
        // Its own UUID: nobody else has it.
        fails(folder.file("base.vdi"), .notFound, "--allow-dir")
    }

    /// Over any format whose images have a UUID, and under any that records one.
    @Test func otherFormatsBelow() throws {
        let folder = try TemporaryFolder()
        var base = NewImage(path: folder.file("base.vmdk"))
        base.size = UInt64(Self.size)
        try base.create()
        try write([UInt8](repeating: 7, count: 300_000), at: 0, to: base.path)
        try makeChild(folder.file("child.vdi"), of: base.path)
        try write([9], at: 299_999, to: folder.file("child.vdi"))
        try expectReads(folder.file("child.vdi"))
        try write([1], at: 0, to: base.path)
        fails(folder.file("child.vdi"), .brokenLink, "changed after this snapshot")
        // Without a UUID there is nothing to name.
        try folder.write([UInt8](repeating: 0, count: 1 << 20), to: "disk.raw")
        try Peer.run("qemu-img", "create", "-q", "-f", "vmdk", folder.file("peer.vmdk"), "1M")
        for (parent, format) in [("disk.raw", "raw"), ("peer.vmdk", "vmdk")] {
            var child = NewImage(path: folder.file("none.vdi"))
            child.parent = folder.file(parent)
            child.parentFormat = format
            #expect { try child.create() } throws: { "\($0)".contains("UUID alone") }
            #expect(throws: DiskError.self) { try folder.read("none.vdi") }
        }
    }
}

/// Notes what is done to a storage.
private func noting(_ storage: any Storage, _ events: Locked<[String]>) -> any Storage {
    ObservedStorage(storage) { (access) throws(DiskError) in
        let event: String
        switch access {
        case .read(let offset, _, let purpose): event = "read \(purpose) \(offset)"
        case .write(let offset, _, let purpose): event = "write \(purpose) \(offset)"
        case .discard(let range): event = "discard \(range.lowerBound)"
        case .setLength(let length): event = "set length \(length)"
        default: event = access.description
        }
        events.withLock { $0.append(event) }
    }
}

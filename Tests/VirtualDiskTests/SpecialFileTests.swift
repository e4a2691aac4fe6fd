import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Images that name what is no file: refused, at once, with words that say which file, named where, and what it is.
struct SpecialFileTests {
    /// What to make, and what it is called.
    private static let kinds = [
        "fifo": "named pipe", "folder": "folder", "socket": "socket", "device": "character device",
    ]

    private static func make(_ kind: String, _ path: String) throws {
        switch kind {
        case "fifo": try Peer.run("mkfifo", path)
        case "folder": try Peer.run("mkdir", path)
        case "socket":
            try Peer.run("python3", "-c", "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])", path)
        default: try Peer.run("mknod", path, "c", "1", "5")
        }
    }

    @Test(arguments: ["fifo", "folder", "socket", "device"]) func areRefusedByName(_ kind: String) throws {
        if kind == "device", geteuid() != 0 { return }
        let folder = try TemporaryFolder()
        let special = folder.file("special.vmdk")
        try Self.make(kind, special)
        let words = try #require(Self.kinds[kind])
        let images = [
            ("flat.vmdk", HostileDescriptorTests.descriptor("RW 2048 FLAT \"special.vmdk\" 0"), "extent 1"),
            ("sparse.vmdk", HostileDescriptorTests.descriptor("RW 2048 SPARSE \"special.vmdk\""), "extent 1"),
            ("child.vmdk", HostileDescriptorTests.descriptor("RW 2048 ZERO", parent: "special.vmdk"), "the parent"),
            ("far.vmdk", HostileDescriptorTests.descriptor("RW 2048 ZERO", parent: "/far/special.vmdk"), "the parent"),
        ]
        for (name, text, role) in images {
            let path = try folder.write(Array(text.utf8), to: name)
            for isWritable in [false, true] {
                #expect { try Disk.open(path, options: DiskOptions(isWritable: isWritable)) } throws: { error in
                    let message = "\(error)"
                    #expect(message.contains(special) && message.contains(name), "\(message)")
                    #expect(message.contains(role) && message.contains(words), "\(message)")
                    return (error as? DiskError)?.kind == .refused
                }
            }
        }
        #expect { try Disk.open(special) } throws: { error in
            (error as? DiskError)?.kind == .refused && "\(error)".contains(words) && "\(error)".contains(special)
        }
    }

    /// What is in the way under one name is no reason not to find the file under the next.
    @Test func nextCandidateIsTried() throws {
        let folder = try TemporaryFolder()
        try Peer.run("mkdir", "-p", folder.file("old/disk-flat.vmdk"))
        try folder.write([UInt8](repeating: 6, count: 1 << 20), to: "disk-flat.vmdk")
        let text = HostileDescriptorTests.descriptor("RW 2048 FLAT \"old/disk-flat.vmdk\" 0")
        let disk = try Disk.open(try folder.write(Array(text.utf8), to: "disk.vmdk"))
        #expect(try disk.read(at: 0, count: 512) == [UInt8](repeating: 6, count: 512))
        try disk.close()
    }
}

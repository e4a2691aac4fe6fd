import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// QCOW version 1, made by qemu-img: read, never written.
struct QCOWTests {
    private static let size = (3 << 20) + 512

    private static func content() -> DiskModel {
        var model = DiskModel(size: size)
        var generator = SeededGenerator(seed: 12)
        for start in [0, 70_000, 1 << 20, size - 5000] {
            model.write(QCOW2PeerTests.pool.bytes(4000, using: &generator), at: start)
            model.write(QCOW2PeerTests.pattern(7, 900), at: start + 4000)
        }
        return model
    }

    private static func expect(_ model: DiskModel, _ path: String) throws {
        let disk = try QCOW2PeerTests.open(path, isWritable: false)
        #expect(disk.size == UInt64(model.size))
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
        let report = try ImageCheck.run(path)
        #expect(report.findings.isEmpty && report.allocatedBlocks > 0)
    }

    @Test func imageIsRead() throws {
        let folder = try TemporaryFolder()
        let model = Self.content()
        let source = try folder.write(model.bytes, to: "source.raw")
        let path = folder.file("disk.qcow")
        try Peer.run("qemu-img", "convert", "-f", "raw", "-O", "qcow", source, path)
        #expect(try ImageInformation.read(path)[0].format == "qcow")
        try Self.expect(model, path)
    }

    /// QEMU reads compressed clusters of version 1 and no longer writes them; this writes every second cluster so.
    static let writer = """
        import struct, sys, zlib
        data = open(sys.argv[1], 'rb').read()
        bits, l2bits = 12, 9
        size, count = 1 << bits, -(-len(data) >> bits)
        l1 = -(-count >> l2bits)
        start = 48 + l1 * 8 + 511 & ~511
        place, entries, body = start + l1 * 4096, [], b''
        for n in range(count):
            cluster = data[n * size:(n + 1) * size].ljust(size, b'\\0')
            packer = zlib.compressobj(9, zlib.DEFLATED, -12)
            packed = packer.compress(cluster) + packer.flush()
            if not cluster.strip(b'\\0'):
                entries.append(0)
            elif n % 2 and len(packed) < size:
                entries.append(1 << 63 | len(packed) << 63 - bits | place + len(body))
                body += packed
            else:
                body += bytes(-(place + len(body)) % size)
                entries.append(place + len(body))
                body += cluster
        entries += [0] * (l1 * 512 - count)
        header = struct.pack('>4sIQIIQBBHIQ', b'QFI\\xfb', 1, 0, 0, 0, len(data), bits, l2bits, 0, 0, 48)
        tables = struct.pack('>%dQ' % l1, *(start + n * 4096 for n in range(l1)))
        image = (header + tables).ljust(start, b'\\0') + struct.pack('>%dQ' % len(entries), *entries) + body
        open(sys.argv[2], 'wb').write(image)
        """

    @Test func compressedClustersAreRead() throws {
        let folder = try TemporaryFolder()
        let model = Self.content()
        let source = try folder.write(model.bytes, to: "source.raw")
        let path = folder.file("disk.qcow")
        try Peer.run("python3", "-c", Self.writer, source, path)
        try Peer.run("qemu-img", "compare", "-f", "raw", "-F", "qcow", source, path)
        try Self.expect(model, path)
        let disk = try QCOW2PeerTests.open(path, isWritable: false)
        var encoded = 0
        try disk.forEachExtent(offset: 0, length: disk.size) { (extent) throws(DiskError) in
            if case .encoded = extent.source { encoded += 1 }
            return true
        }
        #expect(encoded > 3)
        try disk.close()
    }

    @Test func backingFileIsRead() throws {
        let folder = try TemporaryFolder()
        var model = Self.content()
        try folder.write(model.bytes, to: "base.raw")
        let path = folder.file("disk.qcow")
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow", "-b", "base.raw", "-F", "raw", path)
        try QCOW2PeerTests.io(path, format: "qcow", "write -P 9 100k 30k")
        model.write(QCOW2PeerTests.pattern(9, 30 << 10), at: 100 << 10)
        try Self.expect(model, path)
        // And a child of ours over it, which QEMU reads too.
        var child = NewImage(path: folder.file("child.qcow2"))
        child.parent = path
        try child.create()
        let disk = try QCOW2PeerTests.open(child.path)
        try disk.write([1, 2, 3], at: 120_000)
        model.write([1, 2, 3], at: 120_000)
        try disk.close()
        try Peer.expectAgreement(
            DiskKind("", DiskKind.Image(file: "child.qcow2", size: Self.size)), child.path, model, "child over QCOW")
    }

    @Test func writingAndEncryptionAreRefused() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow")
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow", path, "1M")
        #expect { try QCOW2PeerTests.open(path) } throws: { ($0 as? DiskError)?.kind == .unsupported }
        try FileStorage(path: path, isWritable: true).write([0, 0, 0, 1], at: 36, for: .header)
        #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: { "\($0)".contains("AES") }
        var new = NewImage(path: folder.file("new.qcow"))
        new.size = 1 << 20
        #expect(throws: DiskError.self) { try new.create() }
    }

    /// QEMU's own cases for its driver (iotest 092): fields that cannot be.
    @Test(
        arguments: [
            (32, [8]), (32, [17]), (32, [64]), (33, [5]), (33, [14]), (33, [64]), (16, [0, 0, 4, 1]),
            (24, [0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), (24, [0xff, 0, 0, 0, 0, 0, 0, 0]),
            (24, [0, 0, 0, 0, 0, 0, 0, 0]), (40, [0, 0, 1, 0, 0, 0, 0, 0]), (40, [0, 0, 0, 0, 0, 0, 0, 0]),
        ] as [(UInt64, [UInt8])])
    func absurdFieldIsRefused(_ offset: UInt64, _ bytes: [UInt8]) throws {
        let folder = try TemporaryFolder()
        try folder.write([0], to: "base.raw")
        let path = folder.file("disk.qcow")
        try Peer.run("qemu-img", "create", "-q", "-f", "qcow", "-b", "base.raw", "-F", "raw", path, "1M")
        try FileStorage(path: path, isWritable: true).write(bytes, at: offset, for: .header)
        #expect { try QCOW2PeerTests.open(path, isWritable: false) } throws: {
            ($0 as? DiskError)?.kind == .invalidImage
        }
    }
}

extension Subprocess {
    /// Runs a command that must succeed.
    static func expectSuccess(_ command: [String]) throws {
        let result = try run(command)
        guard result.status == 0 else { throw DiskError(.system, "\(command): \(result.errorText)") }
    }
}

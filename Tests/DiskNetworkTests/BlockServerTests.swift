import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import DiskNetwork

/// A disk of noise that a server shows, and the file behind it.
private struct Exported {
    let folder: TemporaryFolder
    let content: [UInt8]
    var file: String { folder.file("disk") }

    init(_ count: Int = 8 << 20) throws {
        folder = try TemporaryFolder()
        content = noise(count)
        _ = try folder.write(content, to: "disk")
    }
}

/// Random writes, zeros and reads from several threads, each in its own part, compared with a model; then the file
/// behind the server is compared with it.
private func exercise(_ storage: any Storage, _ exported: Exported) throws {
    let size = exported.content.count
    let threads = 6
    let part = size / threads / 4096 * 4096 + 100  // parts meet inside sectors
    let models = Locked([Int: [UInt8]]())
    let failures = Locked([String]())
    onThreads(threads) { thread in
        let start = thread * part
        var model = Array(exported.content[start..<min(size, start + part)])
        var generator = SeededGenerator(seed: UInt64(thread))
        do throws(DiskError) {
            for round in 0..<60 {
                let count = Int.random(in: 1...(round % 3 == 0 ? 300_000 : 3000), using: &generator)
                let offset = Int.random(in: 0...model.count - count, using: &generator)
                let range = offset..<offset + count
                let place = UInt64(start + offset)
                switch Int.random(in: 0...4, using: &generator) {
                case 0...1:
                    let bytes = noise(count, seed: generator.next())
                    try storage.write(bytes, at: place, for: .guestData)
                    model.replaceSubrange(range, with: bytes)
                case 2:
                    try storage.discard(place..<place + UInt64(count), mustZero: true, for: .guestData)
                    model.replaceSubrange(range, with: repeatElement(0, count: count))
                case 3: try storage.flush()
                default:
                    let bytes = try storage.availableBytes(at: place, count: count, for: .guestData)
                    if bytes != Array(model[range]) { failures.withLock { $0.append("\(thread): \(range)") } }
                }
            }
        } catch { failures.withLock { $0.append("\(error)") } }
        let end = model
        models.withLock { $0[thread] = end }
    }
    try storage.flush()
    #expect(failures.withLock { $0 } == [])
    let expected = models.withLock { models in (0..<threads).flatMap { models[$0] ?? [] } }
    #expect(try exported.folder.read("disk").prefix(expected.count) == expected[...])
    #expect(try storage.all(700_000).prefix(expected.count) == expected[...])
}

@Suite(.serialized) struct NBDTests {
    @Test func readsWhole() throws {
        let exported = try Exported()
        let server = try TestServer.nbd(exported.file, ["-x", "a name", "--read-only"])
        let place = "nbd://127.0.0.1:\(server.port)/a%20name"
        let storage = try NBDStorage(place, isWritable: false)
        #expect(try storage.all(1_000_001) == exported.content)
        #expect(throws: DiskError.self) { try storage.write([1], at: 0, for: .guestData) }
        #expect { try NBDStorage(place, isWritable: true) } throws: { ($0 as? DiskError)?.kind == .readOnly }
        #expect { try NBDStorage("nbd://127.0.0.1:\(server.port)/other", isWritable: false) } throws: {
            "\($0)".contains("127.0.0.1")
        }
    }

    @Test func writesFromManyThreads() throws {
        let exported = try Exported()
        let server = try TestServer.nbd(exported.file)
        let storage = try NBDStorage("nbd://127.0.0.1:\(server.port)", isWritable: true)
        try exercise(storage, exported)
        #expect(throws: DiskError.self) { try storage.write([1, 2], at: storage.length() - 1, for: .guestData) }
    }

    @Test func unixSocketAndHoles() throws {
        let folder = try TemporaryFolder()
        _ = try Subprocess.run(["truncate", "-s", "64M", folder.file("disk")])
        let file = try FileStorage(path: folder.file("disk"), isWritable: true)
        try file.write(noise(100_000), at: 32 << 20, for: .guestData)
        let socket = folder.file("socket")
        let process = try Subprocess.start(["qemu-nbd", "--persistent", "-f", "raw", "-k", socket, folder.file("disk")])
        defer {
            process.send(signal: SIGKILL)
            _ = try? process.wait()
        }
        for _ in 0..<500 where unsafe access(socket, F_OK) != 0 { usleep(10_000) }
        let storage = try NBDStorage("nbd+unix:///?socket=\(socket)", isWritable: true)
        let data = try #require(try storage.nextData(from: 5))
        #expect(data.lowerBound <= 32 << 20 && data.lowerBound >= (32 << 20) - (64 << 10))
        #expect(data.upperBound >= 32 << 20 + 100_000 && data.upperBound <= 33 << 20)
        #expect(try storage.nextData(from: data.upperBound) == nil)
        try storage.discard(32 << 20..<33 << 20, mustZero: true, for: .guestData)
        try storage.flush()
        #expect(try storage.nextData(from: 0) == nil)
        #expect(try file.nextData(from: 0) == nil)
    }

    /// A server of blocks of 4096 bytes, which refuses what lies otherwise.
    @Test func largeBlocks() throws {
        let exported = try Exported(4 << 20)
        let port = TestServer.freePort()
        let server = try TestServer(
            [
                "nbdkit", "-f", "-i", "127.0.0.1", "-p", "\(port)", "--filter=blocksize-policy", "file", exported.file,
                "blocksize-minimum=4096", "blocksize-error-policy=error",
            ], port: port)
        let storage = try NBDStorage("nbd://127.0.0.1:\(server.port)", isWritable: true)
        try exercise(storage, exported)
    }

    /// A reader goes on when the server comes back; a writer only if nothing can have been lost.
    @Test func brokenConnections() throws {
        let exported = try Exported(2 << 20)
        var server = try TestServer.nbd(exported.file)
        let port = server.port
        func restart() throws {
            server.stop()
            server = try TestServer(
                [
                    "qemu-nbd", "--persistent", "--shared=8", "-f", "raw", "-b", "127.0.0.1", "-p", "\(port)",
                    exported.file,
                ],
                port: port)
        }
        let place = "nbd://127.0.0.1:\(port)"
        let reader = try NBDStorage(place, isWritable: false, settings: hasty())
        let clean = try NBDStorage(place, isWritable: true, settings: hasty())
        let dirty = try NBDStorage(place, isWritable: true, settings: hasty())
        try clean.write([1, 2, 3], at: 5, for: .guestData)
        try clean.flush()
        try dirty.write([4], at: 100, for: .guestData)
        try restart()
        #expect(try reader.availableBytes(at: 4, count: 5, for: .guestData)[1...3] == [1, 2, 3])
        try clean.write([9], at: 6, for: .guestData)
        try clean.flush()
        #expect(try reader.availableBytes(at: 5, count: 3, for: .guestData) == [1, 9, 3])
        #expect { try dirty.flush() } throws: { "\($0)".contains("not flushed") }
        #expect(throws: DiskError.self) { try dirty.availableBytes(at: 0, count: 1, for: .guestData) }
        server.stop()
        #expect(throws: DiskError.self) { try reader.availableBytes(at: 0, count: 1, for: .guestData) }
    }

    /// A server that accepts and says nothing keeps nobody for longer than the timeout.
    @Test func silentServer() throws {
        let port = TestServer.freePort()
        let listener = """
            import socket, time
            s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", \(port))); s.listen(9)
            c = [s.accept() for _ in range(9)]
            """
        let server = try TestServer(["python3", "-c", listener], port: port)
        for place in ["nbd://127.0.0.1:\(server.port)", "iscsi://127.0.0.1:\(server.port)/iqn.2001-04.org.example:x/1"]
        {
            #expect(throws: DiskError.self) {
                try NetworkStorages(options: ["timeout=1", "retries=0"]).open(place, isWritable: false)
            }
        }
    }

    @Test func certificatesAreChecked() throws {
        let exported = try Exported(1 << 20)
        try Certificates.make(in: exported.folder)
        let folder = exported.folder.path
        let server = try TestServer.nbd(
            exported.file,
            ["--object", "tls-creds-x509,id=tls,endpoint=server,dir=\(folder),verify-peer=no", "--tls-creds", "tls"])
        let place = "nbds://127.0.0.1:\(server.port)"
        #expect(throws: DiskError.self) { try NBDStorage(place, isWritable: false, settings: hasty()) }
        let trusting = try StorageSettings(["tls-certificates=\(folder)"])
        // Of another name, by no authority, and without a name.
        let other = "nbds://localhost:\(server.port)"
        #expect(throws: DiskError.self) { try NBDStorage(other, isWritable: false, settings: trusting) }
        let empty = try StorageSettings(["tls-certificates=/var/empty"])
        #expect(throws: DiskError.self) { try NBDStorage(place, isWritable: false, settings: empty) }
        #expect(throws: DiskError.self) {
            try NBDStorage("nbds+unix:///?socket=/nowhere", isWritable: false, settings: trusting)
        }
        #expect(try NBDStorage(other, isWritable: false, settings: StorageSettings(["insecure=yes"])).length() > 0)
        let storage = try NBDStorage(place, isWritable: true, settings: trusting)
        #expect(try storage.all() == exported.content)
        try storage.write([1], at: 3, for: .guestData)
        try storage.flush()
        // What is to be secret is not sent in the open.
        #expect(throws: DiskError.self) { try NBDStorage("nbd://127.0.0.1:\(server.port)", isWritable: false) }
    }
}

@Suite(.serialized) struct ISCSITests {
    private func address(_ target: TestTarget, user: String = "") -> String {
        "iscsi://\(user)127.0.0.1:\(target.port)/\(TestTarget.name)/1"
    }

    @Test func readsAndWritesFromManyThreads() throws {
        let exported = try Exported()
        let target = try TestTarget(exported.file)
        let storage = try ISCSIStorage(address(target), isWritable: true)
        #expect(storage.length() == UInt64(exported.content.count))
        #expect(try storage.all(1_000_001) == exported.content)
        try exercise(storage, exported)
        #expect(throws: DiskError.self) { try storage.write([1, 2], at: storage.length() - 1, for: .guestData) }
        #expect(throws: DiskError.self) {
            try ISCSIStorage("iscsi://127.0.0.1:\(target.port)/\(TestTarget.name)/7", isWritable: false)
        }
    }

    @Test func thinUnits() throws {
        let exported = try Exported(4 << 20)
        let target = try TestTarget(exported.file, options: "thin_provisioning=1")
        let storage = try ISCSIStorage(address(target), isWritable: true)
        try exercise(storage, exported)
        try storage.discard(0..<1 << 20, mustZero: false, for: .guestData)
        try storage.flush()
    }

    @Test func passwords() throws {
        let exported = try Exported(1 << 20)
        let target = try TestTarget(exported.file, user: "me", password: "twelve-chars")
        #expect(throws: DiskError.self) { try ISCSIStorage(address(target), isWritable: false, settings: hasty()) }
        let wrong = address(target, user: "me%twelve-wrong@")
        #expect { try ISCSIStorage(wrong, isWritable: false, settings: hasty()) } throws: { !"\($0)".contains("wrong") }
        let right = try ISCSIStorage(address(target, user: "me%twelve-chars@"), isWritable: false)
        #expect(try right.all() == exported.content)
        #expect(!right.name.contains("twelve"))
        _ = try exported.folder.write(Array("twelve-chars\n".utf8), to: "password")
        let settings = try StorageSettings(["password-file=\(exported.folder.file("password"))"])
        let named = try ISCSIStorage(address(target, user: "me@"), isWritable: false, settings: settings)
        #expect(try named.availableBytes(at: 511, count: 2, for: .header) == Array(exported.content[511...512]))
    }

    @Test func targetThatGoesAway() throws {
        let exported = try Exported(1 << 20)
        let target = try TestTarget(exported.file)
        let storage = try ISCSIStorage(address(target), isWritable: false, settings: hasty(retries: 1))
        #expect(try storage.availableBytes(at: 0, count: 5, for: .header) == Array(exported.content[0..<5]))
        target.stop()
        #expect(throws: DiskError.self) { try storage.availableBytes(at: 0, count: 5, for: .header) }
    }
}

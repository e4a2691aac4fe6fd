import DiskStorage
import DiskTesting
import Testing

/// Every storage holds what was written, zeros where nothing was, and ends where it ends.
struct StorageTests {
    enum Kind: CaseIterable { case file, memory }

    private func make(_ kind: Kind, _ folder: TemporaryFolder) throws -> any Storage {
        switch kind {
        case .file: try FileStorage(creating: folder.path + "/storage")
        case .memory: MemoryStorage()
        }
    }

    @Test(arguments: Kind.allCases) func readsWritesAndHoles(_ kind: Kind) throws {
        let folder = try TemporaryFolder()
        let storage = try make(kind, folder)
        #expect(try storage.length() == 0)
        try storage.write([1, 2, 3], at: 10_000, for: .guestData)
        #expect(try storage.length() == 10_003)
        #expect(try storage.availableBytes(at: 9_998, count: 100, for: .guestData) == [0, 0, 1, 2, 3])
        #expect(try storage.availableBytes(at: 20_000, count: 4, for: .guestData) == [])
        #expect(throws: DiskError.self) { try storage.bytes(at: 10_000, count: 4, for: .header, "the thing") }
        try storage.write([UInt8](repeating: 9, count: 20_000), at: 0, for: .guestData)
        try storage.discard(4_096..<12_288, mustZero: true, for: .guestData)
        let bytes = try storage.bytes(at: 0, count: 20_000, for: .guestData, "all")
        #expect(bytes[..<4096].allSatisfy { $0 == 9 } && bytes[4096..<12_288].allSatisfy { $0 == 0 })
        #expect(bytes[12_288...].allSatisfy { $0 == 9 })
        try storage.setLength(5)
        #expect(try storage.length() == 5)
        try storage.setLength(50)
        #expect(try storage.bytes(at: 0, count: 50, for: .guestData, "all").suffix(45).allSatisfy { $0 == 0 })
        try storage.flush()
        #expect(throws: DiskError.self) { try storage.write([1], at: .max - 1, for: .guestData) }
    }

    @Test func holesOfAFileAreKnown() throws {
        let folder = try TemporaryFolder()
        let file = try FileStorage(creating: folder.path + "/sparse")
        try file.setLength(10 << 20)
        #expect(try file.nextData(from: 0) == nil)
        try file.write([UInt8](repeating: 1, count: 4096), at: 5 << 20, for: .guestData)
        let data = try #require(try file.nextData(from: 0))
        #expect(data.lowerBound <= 5 << 20 && data.upperBound >= (5 << 20) + 4096 && data.upperBound < 10 << 20)
        #expect(try file.nextData(from: data.upperBound) == nil)
        let before = try file.allocatedBytes()
        try file.discard(0..<10 << 20, mustZero: true, for: .guestData)
        #expect(try file.allocatedBytes() < before)
    }

    @Test func whatIsNoFileIsRefused() throws {
        for path in ["/dev/null", "/", "/proc/self/fd"] {
            #expect(throws: DiskError.self) { try FileStorage(path: path, isWritable: false) }
        }
        let folder = try TemporaryFolder()
        try folder.write([1], to: "there")
        #expect(throws: DiskError.self) { try FileStorage(creating: folder.path + "/there") }
    }

    /// QEMU's tools and ours see each other's locks, whoever comes first.
    @Test func locksAreThoseOfQEMU() throws {
        let folder = try TemporaryFolder()
        let path = folder.path + "/disk.raw"
        try FileStorage(creating: path).setLength(1 << 20)
        func qemuCanWrite() throws -> Bool {
            try Subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", path]).status == 0
        }
        func qemuCanRead() throws -> Bool {
            try Subprocess.run(["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", path]).status == 0
        }
        do {
            let reader = try FileStorage(path: path, isWritable: false)
            try reader.lockImage()
            #expect(try qemuCanRead() && !qemuCanWrite())
            let another = try FileStorage(path: path, isWritable: false)
            try another.lockImage()
            let writer = try FileStorage(path: path, isWritable: true)
            #expect(throws: DiskError.self) { try writer.lockImage() }
            withExtendedLifetime((reader, another)) {}
        }
        do {
            let writer = try FileStorage(path: path, isWritable: true)
            try writer.lockImage()
            #expect(try !qemuCanWrite())
            let reader = try FileStorage(path: path, isWritable: false)
            #expect(throws: DiskError.self) { try reader.lockImage() }
            withExtendedLifetime(writer) {}
        }
        #expect(try qemuCanWrite())
    }

    /// Whoever reads the message wants to know which file it was.
    @Test func failuresNameTheFile() throws {
        let folder = try TemporaryFolder()
        let path = folder.path + "/disk.raw"
        try FileStorage(creating: path).setLength(4096)
        let file = try FileStorage(path: path, isWritable: false)
        let handle = StorageHandle(file)
        let bytes = [UInt8](repeating: 1, count: 512)
        func expectNamed(_ body: () throws(DiskError) -> Void) {
            do throws(DiskError) {
                try body()
                Issue.record("a file that was opened to be read was written")
            } catch {
                #expect(error.image == path && error.errno != 0, "\(error)")
            }
        }
        expectNamed { () throws(DiskError) in try file.write(bytes, at: 0, for: .guestData) }
        expectNamed { () throws(DiskError) in
            try bytes.withIOBytes { (bytes) throws(DiskError) in try handle.write(bytes, at: 0, for: .guestData) }
        }
    }
}

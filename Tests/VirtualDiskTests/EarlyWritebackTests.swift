import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// What is filled by large writes is on its way to the disk before anybody asks for a flush; in any format that
/// allocates.
struct EarlyWritebackTests {
    static let cases = FormatMatrixTests.cases.filter { test in
        test.row.isWritable && test.making != nil && test.row.format != "raw"
            && !["fixed", "split-fixed", "esx", "metadata"].contains(test.making?.variant ?? "")
    }

    @Test(arguments: cases) func largeWritesIntoNewSpaceStart(_ test: FormatMatrixTests.Case) throws {
        let (started, disk) = try open(test)
        for offset in stride(from: 0, to: 32 << 20, by: 1 << 20) {
            try disk.write([UInt8](repeating: 7, count: 1 << 20), at: UInt64(offset))
        }
        try disk.close()
        #expect(started.withLock { $0 } > 0)
    }

    @Test func smallAndRepeatedWritesDoNot() throws {
        let vmdk = try #require(Self.cases.first)
        let (started, disk) = try open(vmdk)
        for offset in stride(from: 0, to: 32 << 20, by: 64 << 10) {
            try disk.write([UInt8](repeating: 7, count: 4096), at: UInt64(offset))
        }
        for offset in stride(from: 0, to: 32 << 20, by: 1 << 20) {
            try disk.write([UInt8](repeating: 8, count: 1 << 20), at: UInt64(offset))
        }
        try disk.close()
        #expect(started.withLock { $0 } == 0)
    }

    /// A new image, and how often its storages were asked to start.
    private func open(_ test: FormatMatrixTests.Case) throws -> (started: Locked<Int>, disk: Disk) {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file(test.row.file("disk")))
        image.size = 32 << 20
        let making = try #require(test.making)
        (image.variant, image.blockSize, image.options) = (making.variant, making.blockSize, making.options)
        try image.create()
        let started = Locked(0)
        var options = test.row.options(isWritable: true)
        options.wrapStorage = { storage in
            ObservedStorage(storage, traits: storage.traits) { (access) throws(DiskError) in
                if case .startWriteback = access { started.withLock { $0 += 1 } }
            }
        }
        return (started, try Disk.open(image.path, options: options))
    }
}

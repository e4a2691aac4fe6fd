import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// Images that are not files: in memory, and by a provider of storages.
struct StorageOpeningTests {
    private let folder: TemporaryFolder
    private let content: [UInt8]

    /// A base and a child of each format that has children, made by files.
    init() throws {
        folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 3)
        content = (0..<1 << 20).map { _ in UInt8(truncatingIfNeeded: generator.next()) }
    }

    private func makeChain(_ format: String) throws -> (base: MemoryStorage, child: MemoryStorage) {
        var base = NewImage(path: folder.file("base.\(format)"))
        base.size = 8 << 20
        try base.create()
        let lower = try Disk.open(base.path, options: DiskOptions(isWritable: true))
        try lower.write(content, at: 100_000)
        try lower.close()
        var child = NewImage(path: folder.file("child.\(format)"))
        child.parent = base.path
        try child.create()
        let disk = try Disk.open(child.path, options: DiskOptions(isWritable: true))
        try disk.write([1, 2, 3], at: 100_001)
        try disk.close()
        return (
            MemoryStorage(try folder.read("base.\(format)"), name: "base.\(format)"),
            MemoryStorage(try folder.read("child.\(format)"), name: "child.\(format)")
        )
    }

    @Test(arguments: ["vmdk", "vdi", "vhd", "vhdx", "qcow2", "qed"]) func chainInMemory(_ format: String) throws {
        let (base, child) = try makeChain(format)
        let before = base.bytes
        var expected = content
        expected.replaceSubrange(1...3, with: [1, 2, 3])
        let disk = try Disk.open(storage: child, parents: [base], options: DiskOptions(isWritable: true))
        #expect(try disk.read(at: 100_000, count: expected.count) == expected)
        try disk.write([9], at: 7 << 20)
        try disk.close()
        #expect(base.bytes == before)
        let again = try Disk.open(storage: child, parents: [base])
        #expect(try again.read(at: 7 << 20, count: 2) == [9, 0])
        #expect(again.layers.map(\.format).count == 2)
        // What the chain lacks, or has too much, or has of another chain, is an error that names the image.
        #expect { try Disk.open(storage: child) } throws: { "\($0)".contains("no storage is given") }
        #expect { try Disk.open(storage: child, parents: [base, base]) } throws: { "\($0)".contains("has no parent") }
        let alone = try Disk.open(storage: base)
        #expect(try alone.read(at: 100_000, count: content.count) == content)
    }

    @Test func severalFilesAreRefused() throws {
        var flat = NewImage(path: folder.file("flat.vmdk"))
        flat.size = 1 << 20
        flat.variant = "fixed"
        try flat.create()
        let storage = MemoryStorage(try folder.read("flat.vmdk"), name: "flat.vmdk")
        #expect { try Disk.open(storage: storage) } throws: { "\($0)".contains("a file of its own") }
    }

    @Test func rawAndOverlay() throws {
        let storage = MemoryStorage(content, name: "disk.raw")
        #expect(throws: DiskError.self) { try Disk.open(storage: storage, options: DiskOptions(isWritable: true)) }
        let raw = try Disk.open(storage: storage, options: DiskOptions(isWritable: true, format: "raw"))
        try raw.write([5, 6], at: 10)
        try raw.close()
        #expect(storage.bytes[9...12] == [content[9], 5, 6, content[12]])
        var options = DiskOptions(isWritable: true)
        options.overlay = .temporary(folder: folder.path)
        let over = try Disk.open(storage: storage, options: options)
        try over.write([7], at: 10)
        #expect(try over.read(at: 10, count: 2) == [7, 6])
        try over.close()
        #expect(storage.bytes[10] == 5)
    }

    // MARK: - A provider

    private final class Provider: StorageProvider {
        let storages: [String: MemoryStorage]
        let permitted: Set<String>
        let opened = Locked<[String]>([])

        init(_ storages: [String: MemoryStorage], permitted: Set<String>) {
            self.storages = storages
            self.permitted = permitted
        }

        func recognizes(_ name: String) -> Bool { name.hasPrefix("mem://") }
        func shownName(_ address: String) -> String { address.replacing("secret@", with: "") }

        func address(of name: String, namedBy base: String) -> String? {
            if recognizes(name) { return name }
            return recognizes(base) ? "mem://" + (name.split { $0 == "/" || $0 == "\\" }.last ?? "") : nil
        }

        func permits(_ address: String) -> Bool { permitted.contains(address) }

        func open(_ address: String, isWritable: Bool) throws(DiskError) -> ProvidedStorage {
            opened.withLock { $0.append(address) }
            guard let storage = storages[shownName(address)] else { throw DiskError(.notFound, "is not there") }
            return ProvidedStorage(storage, version: "1")
        }
    }

    @Test(arguments: ["vmdk", "vdi", "vhd", "qcow2"]) func chainOfAProvider(_ format: String) throws {
        let (base, child) = try makeChain(format)
        let storages = ["mem://child.\(format)": child, "mem://base.\(format)": base]
        var options = DiskOptions()
        options.locksImages = true
        let name = "mem://secret@child.\(format)"
        // Unless the user says so, what an image names is not opened.
        let strict = Provider(storages, permitted: [])
        options.storageProvider = strict
        let error = #expect(throws: DiskError.self) { try Disk.open(name, options: options) }
        #expect("\(error as Any)".contains("--allow"))
        #expect(!"\(error as Any)".contains("secret"))
        #expect(strict.opened.withLock { $0 } == [name])
        guard format != "vdi" else { return }  // it names its parent by UUID alone
        let kind = Provider(storages, permitted: ["mem://base.\(format)"])
        options.storageProvider = kind
        let disk = try Disk.open(name, options: options)
        #expect(try disk.read(at: 100_001, count: 4) == [1, 2, 3, content[4]])
        #expect(disk.layers.map(\.path) == ["mem://child.\(format)", "mem://base.\(format)"])
        #expect(try ImageInformation.read(name, options: options, wholeChain: true).count == 2)
        #expect(try ImageCheck.run(name, options: options).findings.isEmpty)
    }

    /// A file whose parent is at an address: not connected to unless that is permitted, and a file beside it that has
    /// the name is not the same.
    @Test func addressInAFile() throws {
        var base = NewImage(path: folder.file("base.qcow2"))
        base.size = 1 << 20
        try base.create()
        let command = [
            "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "mem://host/base.qcow2", "-F", "qcow2",
            folder.file("child.qcow2"), "1M",
        ]
        try #require(try Subprocess.run(command).status == 0)
        let provider = Provider([:], permitted: [])
        var options = DiskOptions()
        options.storageProvider = provider
        let child = folder.file("child.qcow2")
        #expect { try Disk.open(child, options: options) } throws: { "\($0)".contains("--allow-url") }
        #expect(provider.opened.withLock { $0 } == [])
        options.storageProvider = nil
        #expect { try Disk.open(child, options: options) } throws: { "\($0)".contains("protocol") }
        let address = "mem://host/base.qcow2"
        let storage = MemoryStorage(try folder.read("base.qcow2"), name: "base")
        options.storageProvider = Provider([address: storage], permitted: [address])
        #expect(try Disk.open(child, options: options).layers.map(\.path).last == address)
    }

    /// The cache of another state of what a server has is not used.
    @Test func cacheOverAProvider() throws {
        let storage = MemoryStorage(content, name: "disk")
        var options = DiskOptions(format: "raw")
        options.storageProvider = Provider(["mem://disk": storage], permitted: [])
        options.cache = CacheOptions(path: folder.file("cache"), size: 4 << 20) { _ in }
        for _ in 0..<2 {
            let disk = try Disk.open("mem://disk", options: options)
            #expect(try disk.read(at: 0, count: content.count) == content)
            try disk.close()
        }
        let second = try Disk.open("mem://disk", options: options)
        _ = try second.read(at: 0, count: content.count)
        #expect((second.blockCacheUse?.hitBytes ?? 0) > 0)
        try second.close()
    }
}

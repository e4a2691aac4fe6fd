import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Tables that are well formed one by one and absurd together.
struct HostileTableTests {
    /// A hosted sparse file: header, descriptor, and what is put after them from sector 32 on.
    private static func hosted(
        capacity: UInt64, grain: UInt64 = 8, directory: UInt64 = 32, redundant: UInt64? = nil, isUnclean: Bool = false,
        body: [UInt8] = []
    ) -> [UInt8] {
        var file = FieldWriter(count: 32 * 512)
        file.bytes("KDMV".utf8, at: 0)
        file.littleEndian(UInt32(1), at: 4)
        file.littleEndian(UInt32(redundant == nil ? 1 : 3), at: 8)
        for (offset, value) in [
            (12, capacity), (20, grain), (28, 1), (36, 20), (48, redundant ?? 0), (56, directory), (64, 24),
        ] { file.littleEndian(value, at: offset) }
        file.littleEndian(UInt32(512), at: 44)
        file.byte(isUnclean ? 1 : 0, at: 72)
        file.bytes([0x0a, 0x20, 0x0d, 0x0a], at: 73)
        let text = HostileDescriptorTests.descriptor("RW \(capacity) SPARSE \"disk.vmdk\"")
        file.bytes(text.utf8, at: 512)
        return file.bytes + body
    }

    /// `count` copies of a 32-bit number.
    private static func repeated(_ value: UInt32, _ count: Int) -> [UInt8] {
        var piece = FieldWriter(count: min(count * 4, 1 << 20))
        for offset in stride(from: 0, to: piece.bytes.count, by: 4) { piece.littleEndian(value, at: offset) }
        var bytes: [UInt8] = []
        while bytes.count < count * 4 {
            bytes += piece.bytes.prefixArray(min(piece.bytes.count, count * 4 - bytes.count))
        }
        return bytes
    }

    /// A name and a file.
    private static func images() -> [(String, [UInt8])] {
        let entries = 1 << 18
        let capacity = UInt64(entries) * 512 * 8
        // The directory takes sectors 32 to 8223; the table lies after it.
        let table = UInt32(32 + entries / 128)
        let manyOfOne = repeated(table, entries)
        return [
            ("many entries for one table", hosted(capacity: capacity, body: manyOfOne + repeated(24, 512))),
            (
                "many entries for one table, unclean",
                hosted(capacity: capacity, isUnclean: true, body: manyOfOne + repeated(24, 512))
            ),
            (
                "many entries for one empty table, unclean",
                hosted(capacity: capacity, isUnclean: true, body: manyOfOne + repeated(0, 512))
            ),
            (
                "the same in both directories",
                hosted(capacity: capacity, redundant: 32, isUnclean: true, body: manyOfOne + repeated(24, 512))
            ),
            ("tables in the header", hosted(capacity: 1 << 16, isUnclean: true, body: repeated(1, 4096))),
            ("tables in the directory", hosted(capacity: 1 << 16, body: repeated(32, 4096))),
            ("both directories are one", hosted(capacity: 1 << 16, redundant: 32, body: repeated(0, 4096))),
            ("all grains are the header", hosted(capacity: 4096, body: repeated(33, 128) + repeated(24, 512))),
            (
                "the redundant directory is the descriptor",
                hosted(capacity: 4096, redundant: 1, body: repeated(33, 128) + repeated(0, 512))
            ),
            ("grains at the end of 2 TiB", hosted(capacity: 4096, body: repeated(33, 128) + repeated(.max, 512))),
        ]
    }

    @Test func absurdTables() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            alarm(300)
            let progress = try Progress(folder: path)
            let files = try TemporaryFolder()
            for (name, bytes) in HostileTableTests.images() {
                progress.note(name)
                let image = try HostileImage([("disk.vmdk", bytes)], folder: files)
                if let problem = image.exercise() { Issue.record("\(name): \(problem)") }
            }
        }
        HostileVMDKTests.explain(result, "", folder)
    }

    /// A table that two directory entries name was once walked for each: many of them took hours to check.
    @Test func tableInCommonIsFound() throws {
        let folder = try TemporaryFolder()
        let bytes = Self.hosted(capacity: 8192, body: Self.repeated(33, 128) + Self.repeated(0, 512))
        let path = try folder.write(bytes, to: "disk.vmdk")
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.loss) == 1)
        #expect(report.findings.contains { $0.message.contains("in common") })
    }

    /// Tables at the end of files that are longer than any file system makes them, but sparse.
    @Test func tablesFarAway() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            alarm(300)
            let progress = try Progress(folder: path)
            let files = try TemporaryFolder()
            for shift in [40, 43, 44, 45, 50, 53, 54] as [UInt64] {
                for redundant in [nil, (1 << shift) - 64] as [UInt64?] {
                    progress.note("tables at sector 2^\(shift), copy at \(redundant ?? 0)")
                    let directory: UInt64 = redundant == nil ? (1 << shift) - 64 : 32
                    let bytes = HostileTableTests.hosted(
                        capacity: 4096, directory: directory, redundant: redundant, isUnclean: true,
                        body: [UInt8](repeating: 0, count: 8192))
                    var image = try HostileImage([("disk.vmdk", bytes)], folder: files)
                    image.length = 1 << (shift + 9)
                    if let problem = image.exercise() { Issue.record("2^\(shift): \(problem)") }
                }
            }
        }
        HostileVMDKTests.explain(result, "", folder)
    }

    /// seSparse disks of 64 TiB in a small file.
    @Test func hugeSESparseExtents() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            alarm(300)
            let progress = try Progress(folder: path)
            let files = try TemporaryFolder()
            var builder = SESparseBuilder(sectorCount: 1 << 24)
            builder.grains[0] = .data([UInt8](repeating: 1, count: 4096))
            var bytes = builder.encode()
            for (name, entry) in [("absent", 0), ("of one table", 0x1000_0000 << 32)] as [(String, UInt64)] {
                progress.note("tables that are all \(name)")
                for index in 0..<512 {
                    bytes = bytes.setting(entry, at: builder.directory.sector * 512 + index * 8, width: 8)
                }
                let descriptor = Array(builder.descriptor(naming: "extent.vmdk").utf8)
                let image = try HostileImage([("disk.vmdk", descriptor), ("extent.vmdk", bytes)], folder: files)
                if let problem = image.exercise() { Issue.record("tables that are all \(name): \(problem)") }
            }
        }
        HostileVMDKTests.explain(result, "", folder)
    }
}

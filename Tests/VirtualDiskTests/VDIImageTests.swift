import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// VDIs that others made: by the Python program, which knows every kind, and by qemu-img. Each is read, written,
/// discarded in, and judged by its maker.
struct VDIImageTests {
    /// How the Python program makes an image.
    struct Made: Sendable, CustomTestStringConvertible {
        let name: String
        var arguments: [String]
        var block = 1 << 16
        var isChild = false
        var testDescription: String { name }
    }

    static let kinds = [
        Made(name: "version 0.0", arguments: ["--version", "0.0"]),
        Made(name: "version 0.1, fixed", arguments: ["--version", "0.1", "--type", "2"]),
        Made(name: "version 0.0, undo", arguments: ["--version", "0.0", "--type", "3"], isChild: true),
        Made(name: "version 0.0, differencing", arguments: ["--version", "0.0", "--type", "4"], isChild: true),
        Made(name: "header of 384 bytes", arguments: ["--header", "384"]),
        Made(name: "header of 400 bytes, 1 MiB", arguments: ["--align", "1048576"], block: 1 << 20),
        Made(name: "extra bytes", arguments: ["--extra", "512"], block: 4096),
        Made(name: "many extra bytes", arguments: ["--extra", "65536", "--type", "4"], block: 4096, isChild: true),
        Made(name: "fixed", arguments: ["--type", "2", "--map-offset", "4096"]),
        Made(name: "undo", arguments: ["--type", "3"], isChild: true),
        Made(
            name: "differencing, 384 bytes", arguments: ["--type", "4", "--header", "384"], block: 8192, isChild: true),
        Made(name: "called dynamic, with a parent", arguments: ["--type", "1"], isChild: true),
        Made(name: "blocks of 512 bytes", arguments: ["--align", "4"], block: 512),
    ]

    private static let parent = DiskUUID("5f0c6e8e-91a6-4a71-9e5d-0b1c2d3e4f50") ?? .null
    private static let modification = DiskUUID("6a1d7f9f-a2b7-4b82-8f6e-1c2d3e4f5061") ?? .null

    /// Makes the image, over a base if it is a child, and answers what it shows.
    private func make(_ kind: Made, _ folder: TemporaryFolder, _ generator: inout SeededGenerator) throws -> DiskModel {
        let size = 2_000_384
        let pool = ConformanceTests.pool
        var model = DiskModel(size: size)
        for _ in 0..<10 {
            let start = Int.random(in: 0..<size, using: &generator)
            model.write(pool.bytes(min(size - start, 90_000), using: &generator), at: start)
        }
        var arguments: [String] = []
        if kind.isChild {
            try folder.write(model.bytes, to: "below.raw")
            try VDIReader.run([
                "make", folder.file("below.raw"), folder.file("base.vdi"), "--uuid", Self.parent.description,
                "--modification", Self.modification.description, "--block", "16384",
            ])
            arguments = ["--over", folder.file("below.raw"), "--parent", Self.parent.description]
            if !kind.name.contains("version 0") {
                arguments += ["--parent-modification", Self.modification.description]
            }
            for _ in 0..<5 {
                let start = Int.random(in: 0..<size, using: &generator)
                let end = min(size, start + 150_000)
                if Bool.random(using: &generator) {
                    model.zero(start..<end)
                } else {
                    model.write(pool.bytes(end - start, using: &generator), at: start)
                }
            }
        }
        try folder.write(model.bytes, to: "content.raw")
        try VDIReader.run(
            ["make", folder.file("content.raw"), folder.file("top.vdi"), "--block", String(kind.block)] + arguments
                + kind.arguments)
        return model
    }

    @Test(arguments: kinds) func imageOfAnotherMakerIsReadAndWritten(_ kind: Made) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let context = "\(kind.name), seed \(seed)"
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        var model = try make(kind, folder, &generator)
        let path = folder.file("top.vdi")
        let before = try folder.read("top.vdi")
        try expect(path, model, context)
        #expect(try folder.read("top.vdi") == before, "\(context): reading changed the file")

        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        let disk = try Disk.open(path, options: options)
        for round in 0..<120 {
            let start = Int.random(in: 0..<model.size, using: &generator)
            let end = min(model.size, start + Int.random(in: 1...3 * min(kind.block, 65_536), using: &generator))
            if round % 3 == 0 {
                try disk.discard(offset: UInt64(start), length: UInt64(end - start))
                model.zero(start..<end)
            } else {
                let data = ConformanceTests.pool.bytes(end - start, using: &generator)
                try disk.write(data, at: UInt64(start))
                model.write(data, at: start)
            }
            if round % 20 == 19 { try disk.flush() }
        }
        try disk.close()
        try expect(path, model, context)
        try VDIReader.check(path)
        #expect(try VDIReader.flatten(path, in: folder) == model.bytes, "\(context): the maker reads something else")
        let report = try ImageCheck.run(path)
        #expect(report.findings.isEmpty, "\(context): \(report.findings)")
    }

    private func expect(_ path: String, _ model: DiskModel, _ context: String) throws {
        let disk = try Disk.open(path)
        #expect(disk.size == model.size, "\(context)")
        if let mistake = try model.mistake(of: disk, in: 0..<model.size) { Issue.record("\(context): \(mistake)") }
        try disk.close()
    }

    /// What is beyond the last whole sector is not shown, and said not to be.
    @Test func oddSizeIsRoundedDown() throws {
        let folder = try TemporaryFolder()
        let content = [UInt8](repeating: 7, count: 100_352)
        try folder.write(content, to: "content.raw")
        let path = folder.file("disk.vdi")
        try VDIReader.run(["make", folder.file("content.raw"), path, "--block", "65536", "--odd", "300"])
        let information = try #require(try ImageInformation.read(path).first)
        #expect(information.virtualSize == 100_352)
        #expect(information.properties.contains { $0.key == "odd-size" && $0.value.contains("100652") })
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        #expect(try disk.read(at: 0, count: 100_352) == content)
        #expect(throws: DiskError.self) { try disk.read(at: 100_352, count: 1) }
        try disk.write([8], at: 100_351)
        try disk.close()
        let report = try ImageCheck.run(path)
        #expect(report.findings.map(\.severity) == [.note])
    }

    @Test func propertiesAreAllThere() throws {
        let folder = try TemporaryFolder()
        try folder.write([UInt8](repeating: 7, count: 1 << 20), to: "content.raw")
        let path = folder.file("disk.vdi")
        let ids = (0..<4).map { _ in DiskUUID.random().description }
        try VDIReader.run([
            "make", folder.file("content.raw"), path, "--block", "65536", "--type", "4", "--flags", "256", "--uuid",
            ids[0], "--modification", ids[1], "--parent", ids[2], "--parent-modification", ids[3], "--comment",
            "eine Bemerkung", "--extra", "512",
        ])
        let information = try #require(try ImageInformation.read(path).first)
        let found = Dictionary(information.properties.map { ($0.key, $0.value) }) { first, _ in first }
        #expect(information.blockSize == 65_536 && information.format == "vdi")
        #expect(
            found == [
                "version": "1.1", "type": "differencing", "header-size": "400 bytes", "flags": "0x100 (zero-expand)",
                "uuid": ids[0], "modification-uuid": ids[1], "parent-uuid": ids[2], "parent-modification-uuid": ids[3],
                "comment": "eine Bemerkung", "geometry-bios": "5/6/7", "blocks": "16", "allocated-blocks": "16",
                "map-offset": "512", "data-offset": "1024", "block-extra": "512",
            ])
    }

    // MARK: - QEMU

    @Test(arguments: ["off", "on"]) func imageOfThePeerIsWrittenByBoth(_ isStatic: String) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vdi")
        try Peer.run("qemu-img", "create", "-q", "-f", "vdi", "-o", "static=\(isStatic)", path, "9M")
        var model = DiskModel(size: 9 << 20)
        func byPeer(_ value: UInt8, _ offset: Int, _ count: Int) throws {
            try Peer.run("qemu-io", "-f", "vdi", "-c", "write -P \(value) \(offset) \(count)", path)
            model.write([UInt8](repeating: value, count: count), at: offset)
        }
        func byUs(_ value: UInt8, _ offset: Int, _ count: Int) throws {
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            try disk.write([UInt8](repeating: value, count: count), at: UInt64(offset))
            try disk.close()
            model.write([UInt8](repeating: value, count: count), at: offset)
        }
        try byPeer(1, 3_000_000 / 512 * 512, 700_416)
        try byUs(2, 5_000_000, 1_300_001)
        try byPeer(3, 4096, 2 << 20)
        try byUs(4, (2 << 20) - 1, 3)
        try byPeer(5, 8 << 20, 512)
        try byUs(6, (9 << 20) - 1, 1)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.discard(offset: 1 << 20, length: 5 << 20)
        model.zero(1 << 20..<6 << 20)
        try disk.close()
        try byPeer(7, 5 << 20, 512)
        try byUs(8, 3 << 20, 100)
        let kind = DiskKind("of the peer", .init(file: "disk.vdi", size: 9 << 20))
        try Peer.expectAgreement(kind, path, model, "static=\(isStatic)")
        try expect(path, model, "static=\(isStatic)")
    }

    @Test func copiesAreTheSame() throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 3)
        var model = DiskModel(size: 7 << 20)
        for _ in 0..<8 {
            let start = Int.random(in: 0..<model.size, using: &generator)
            model.write(
                ConformanceTests.pool.bytes(min(model.size - start, 300_000), using: &generator), at: start)
        }
        let raw = try folder.write(model.bytes, to: "disk.raw")
        let path = folder.file("disk.vdi")
        try Peer.run("qemu-img", "convert", "-f", "raw", "-O", "vdi", raw, path)
        try expect(path, model, "made by qemu-img convert")
        try Peer.run("qemu-img", "convert", "-f", "raw", "-O", "vdi", "-o", "static=on", raw, path)
        try expect(path, model, "made by qemu-img convert, static")
    }
}

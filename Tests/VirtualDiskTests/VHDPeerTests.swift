import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Fixed and dynamic VHDs go from QEMU to us and back; QEMU's own cases for the format (iotests 088, 135, 146, 266).
struct VHDPeerTests {
    private static func io(_ path: String, _ commands: String...) throws {
        var words = ["qemu-io", "-f", "vpc"]
        for command in commands { words += ["-c", command] }
        let result = try Subprocess.run(words + [path])
        guard result.status == 0, !result.outputText.contains("failed") else {
            throw DiskError(.system, "\(words): \(result.outputText)\(result.errorText)")
        }
    }

    private static func size(_ path: String, _ options: String = "") throws -> String {
        let words = try Peer.run("qemu-img", "info", "--image-opts", "driver=vpc\(options),file.filename=\(path)")
        return String(words.split(separator: "\n").first { $0.hasPrefix("virtual size") } ?? "")
    }

    /// What qemu-img makes of content is read; what is written in it by us, in blocks that are there and others, is
    /// read by qemu-img; and what its qemu-io then writes, by us.
    @Test(arguments: ["dynamic", "fixed"], ["", ",force_size=on"])
    func imagesOfQEMU(_ subformat: String, _ force: String) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 17)
        var model = DiskModel(size: 301 * 4 * 17 * 512)
        let pool = RandomPool(seed: 4)
        for start in [0, 3 << 20, 7_340_000] { model.write(pool.bytes(300_001, using: &generator), at: start) }
        let source = try folder.write(model.bytes, to: "source.raw")
        let path = folder.file("disk.vhd")
        try Peer.run(
            "qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=\(subformat)\(force)", source, path)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        #expect(disk.size == UInt64(model.size))
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        for start in [100, (2 << 20) - 3, 5 << 20, model.size - 777] {
            let data = pool.bytes(777, using: &generator)
            try disk.write(data, at: UInt64(start))
            model.write(data, at: start)
        }
        try disk.discard(offset: 2 << 20, length: 2 << 20)
        model.zero(2 << 20..<4 << 20)
        try disk.close()
        try VHD.expectSound([path])
        let kind = DiskKind("of QEMU", .init(file: "disk.vhd", size: model.size))
        try Peer.expectAgreement(kind, path, model, subformat)
        try Self.io(path, "write -P 9 1M 2M", "write -P 8 9M 1k", "write -P 7 2047k 2k")
        model.write([UInt8](repeating: 9, count: 2 << 20), at: 1 << 20)
        model.write([UInt8](repeating: 8, count: 1024), at: 9 << 20)
        model.write([UInt8](repeating: 7, count: 2048), at: 2047 << 10)
        let again = try Disk.open(path, options: DiskOptions(isWritable: true))
        #expect(try model.mistake(of: again, in: 0..<model.size) == nil)
        try again.close()
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.loss) + report.remaining(.repairable) == 0, "\(report.findings)")
    }

    /// QEMU writes into ours, grows them, and both read the same; vhdimount too.
    @Test(arguments: ["dynamic", "fixed"], [(6 << 20) + 512, 301 * 4 * 17 * 512])
    func imagesOfOurs(_ variant: String, _ size: Int) throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: size, variant: variant)
        try VHD.write(path, [(5, 100, 5000), (6, 4 << 20, 100)])
        try Self.io(
            path, "write -P 7 2M 1M", "write -P 8 \(size - 1024) 1024", "read -P 6 4M 100", "read -P 5 100 5000")
        try VHD.write(path, [(9, 5 << 20, 3)])
        var model = DiskModel(size: size)
        for (value, start, count) in [
            (5, 100, 5000), (6, 4 << 20, 100), (7, 2 << 20, 1 << 20), (8, size - 1024, 1024), (9, 5 << 20, 3),
        ] as [(UInt8, Int, Int)] { model.write([UInt8](repeating: value, count: count), at: start) }
        let kind = DiskKind("ours", .init(file: "disk.vhd", size: size))
        try Peer.expectAgreement(kind, path, model, variant)
        try VHD.expectSound([path], isClosed: false)
        try VHD.expectAgreement(path, model)
        try VHD.expectAgreementOfVhdimount(path, model, folder, depth: 1)
        #expect(
            try Peer.run("qemu-img", "info", "-f", "vpc", path).contains("(\(size) bytes)"), "QEMU sees another size")
    }

    /// Sizes of all magnitudes: QEMU sees in ours what was asked for, whatever the geometry.
    @Test(arguments: [512, 34_816, 1 << 20, (127 << 30) + 512, 2040 << 30] as [Int])
    func sizesOfOurs(_ size: Int) throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: size)
        #expect(try Peer.run("qemu-img", "info", "-f", "vpc", path).contains("(\(size) bytes)"))
        let disk = try Disk.open(path)
        #expect(disk.size == UInt64(size))
        try disk.close()
        try VHD.expectSound([path])
    }

    @Test(arguments: [0, 513, (2040 << 30) + 512]) func sizesThatCannotBe(_ size: Int) throws {
        let folder = try TemporaryFolder()
        #expect { try VHD.create(folder, size: size) } throws: { ($0 as? DiskError)?.kind == .invalidArgument }
        #expect(try Peer.run("ls", folder.path).isEmpty)
    }

    // MARK: - 088 and 135: fields that cannot be

    /// A block size of 0, 0x80, or no power of two; a table of 2^31 entries.
    @Test(
        arguments: [
            (32, [0, 0, 0, 0]), (32, [0, 0, 0, 0x80]), (32, [0, 0x12, 0x34, 0x56]), (32, [0, 0, 2, 0]),
            (16, [0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), (28, [0, 0, 0, 1]), (28, [0, 0, 0, 0]), (0, [0x58]),
            (24, [0, 2, 0, 0]),
        ] as [(UInt64, [UInt8])])
    func headerFieldsThatCannotBe(_ offset: UInt64, _ bytes: [UInt8]) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vhd")
        try Peer.run("qemu-img", "create", "-q", "-f", "vpc", path, "5M")
        var header = try folder.read("disk.vhd").slice(512, 1024)
        for (index, byte) in bytes.enumerated() { header[Int(offset) + index] = byte }
        for index in 36..<40 { header[index] = 0 }
        let sum = ~header.reduce(UInt32(0)) { $0 &+ UInt32($1) }
        for index in 0..<4 { header[36 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(24 - 8 * index)) }
        try VHD.poke(path, header, at: 512)
        for isWritable in [false, true] {
            #expect { try Disk.open(path, options: DiskOptions(isWritable: isWritable)) } throws: {
                [.invalidImage, .unsupported].contains(($0 as? DiskError)?.kind)
            }
        }
    }

    // MARK: - 146 and 266: whose sizes

    /// The size by the creator, and by the rule that the user asks for, as QEMU's `force_size_calc`.
    @Test(arguments: [
        ("vpc ", true), ("qemu", true), ("win ", false), ("d2v ", false), ("qem2", false), ("tap\0", false),
    ])
    func sizeByCreator(_ creator: String, _ meansGeometry: Bool) throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vhd")
        try Peer.run("qemu-img", "create", "-q", "-f", "vpc", path, "7M")
        let geometry = try Disk.open(path).size
        // Another current size than the geometry's, which the table has room for.
        try Self.changeFooter(path, folder) { footer in
            for (index, byte) in creator.utf8.enumerated() { footer[28 + index] = byte }
            let current = geometry - 5 * 512
            for index in 0..<8 { footer[48 + index] = UInt8(truncatingIfNeeded: current >> UInt64(56 - 8 * index)) }
        }
        func size(_ rule: String?) throws -> UInt64 {
            var options = DiskOptions()
            if let rule { options.formatOptions["vhd-size"] = rule }
            let disk = try Disk.open(path, options: options)
            #expect(try ImageInformation.read(path, options: options)[0].virtualSize == disk.size)
            #expect(try ImageCheck.run(path, options: options).findings.isEmpty)
            return disk.size
        }
        #expect(try size(nil) == (meansGeometry ? geometry : geometry - 5 * 512))
        #expect(try size("chs") == geometry)
        #expect(try size("current") == geometry - 5 * 512)
        #expect { try size("largest") } throws: { ($0 as? DiskError)?.kind == .invalidArgument }
        #expect(try Self.size(path).contains("(\(meansGeometry ? geometry : geometry - 5 * 512) bytes)"))
        #expect(try Self.size(path, ",force_size_calc=chs").contains("(\(geometry) bytes)"))
        #expect(try Self.size(path, ",force_size_calc=current_size").contains("(\(geometry - 5 * 512) bytes)"))
    }

    /// A geometry for which there is no room is an error where it was asked for.
    @Test func geometryWithoutRoom() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 3 << 20)
        var options = DiskOptions()
        options.formatOptions["vhd-size"] = "chs"
        #expect { try Disk.open(path, options: options) } throws: { error in
            (error as? DiskError)?.kind == .invalidArgument && "\(error)".contains("vhd-size=current")
        }
    }

    /// Changes a dynamic image's footer and its copy, and puts the checksum right.
    private static func changeFooter(
        _ path: String, _ folder: TemporaryFolder, _ change: (inout [UInt8]) -> Void
    ) throws {
        var footer = try folder.read("disk.vhd").slice(0, 512)
        change(&footer)
        for index in 64..<68 { footer[index] = 0 }
        let sum = ~footer.reduce(UInt32(0)) { $0 &+ UInt32($1) }
        for index in 0..<4 { footer[64 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(24 - 8 * index)) }
        try VHD.poke(path, footer, at: 0)
        try VHD.poke(path, footer, at: try VHD.length(path) - 512)
    }
}

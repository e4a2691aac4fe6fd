import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// What is measured is what comes about.
struct ImageMeasurementTests {
    /// A format, how its image is made, and the size of its disk.
    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        let making: FormatRow.Making
        let size: Int
        var testDescription: String {
            FormatMatrixTests.Case(row: row, making: making, peerOptions: "").testDescription + ", \(size)"
        }
    }

    static let cases = FormatRow.all.flatMap { row in
        (row.ours + [row.dense]).filter { _ in row.isWritable && !row.ours.isEmpty }.flatMap { making in
            [(5 << 20) + 3 * 512, 40 << 20].map { Case(row: row, making: making, size: $0) }
        }
    }

    private static func new(_ test: Case, _ path: String) -> NewImage {
        var image = NewImage(path: path)
        image.format = test.row.format
        image.size = UInt64(test.size)
        (image.variant, image.blockSize, image.options) = (
            test.making.variant, test.making.blockSize, test.making.options
        )
        return image
    }

    /// The length of all files that an image has.
    private static func length(_ path: String, _ row: FormatRow) throws -> UInt64 {
        try #require(ImageInformation.read(path, options: row.options(isWritable: false)).first).fileLength
            + descriptorLength(path, row)
    }

    /// Of a VMDK whose descriptor is a file, that file is none of its storages.
    private static func descriptorLength(_ path: String, _ row: FormatRow) throws -> UInt64 {
        let file = try FileStorage(path: path, isWritable: false)
        let head = try file.availableBytes(at: 0, count: 21, for: .header)
        return row.format == "vmdk" && String(decoding: head, as: UTF8.self) == "# Disk DescriptorFile"
            ? try file.length() : 0
    }

    @Test(arguments: cases) func isWhatComesAbout(_ test: Case) throws {
        let folder = try TemporaryFolder()
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let source = try Self.makeSource(test.size, folder, &generator)
        let contents = try Disk.open(source, options: DiskOptions(format: "raw"))
        let new = Self.new(test, folder.file(test.row.file("new")))
        let measured = try ImageMeasurement.run(new, contents: contents, readsData: true)
        #expect(!measured.isUpperBound && measured.virtualSize == UInt64(test.size))
        #expect(try ImageMeasurement.run(new).required <= measured.required)
        try new.create()
        let options = test.row.options(isWritable: true)
        try Self.copy(contents, to: new.path, options, includingZeros: false)
        #expect(try Self.length(new.path, test.row) == measured.required, "\(test), seed \(seed)")
        try Self.copy(contents, to: new.path, options, includingZeros: true)
        // All of it at once, in order.
        let whole = Self.new(test, folder.file(test.row.file("whole")))
        if test.making.options["data-file"] == nil {
            try whole.create()
            try Self.copy(contents, to: whole.path, options, includingZeros: true)
            #expect(
                try Self.length(whole.path, test.row) == (try ImageMeasurement.run(whole).fullyAllocated),
                "\(test), seed \(seed)")
        }
        try contents.close()
    }

    /// A raw file with data, holes and written zeros.
    private static func makeSource(
        _ size: Int, _ folder: TemporaryFolder, _ generator: inout SeededGenerator
    ) throws -> String {
        let path = folder.file("source.raw")
        let file = try FileStorage(creating: path)
        try file.setLength(UInt64(size))
        for number in 0..<9 {
            let start = Int.random(in: 0..<size, using: &generator)
            let count = min(size - start, Int.random(in: 1...300_000, using: &generator))
            let value = UInt8(number % 3 == 2 ? 0 : number + 1)
            try file.write([UInt8](repeating: value, count: count), at: UInt64(start), for: .guestData)
        }
        return path
    }

    /// Writes what is no zeros, in order, or everything with bytes in place of zeros.
    private static func copy(
        _ source: Disk, to path: String, _ options: DiskOptions, includingZeros: Bool
    ) throws {
        let disk = try Disk.open(path, options: options)
        // (Steps that no block of zeros hides in.)
        let step = includingZeros ? 1 << 20 : 512
        var position: UInt64 = 0
        while position < disk.size {
            let count = Int(min(UInt64(step), disk.size - position))
            var bytes = try source.read(at: position, count: count)
            if includingZeros { bytes = bytes.map { $0 | 1 } }
            if bytes.contains(where: { $0 != 0 }) { try disk.write(bytes, at: position) }
            position += UInt64(count)
        }
        try disk.close()
    }

    /// A stream is never longer than was told.
    @Test func streamIsShorter() throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 9)
        let source = try Self.makeSource(9 << 20, folder, &generator)
        let file = try FileStorage(path: source, isWritable: true)
        // What cannot be compressed is the worst.
        try file.write(RandomPool(seed: 8).bytes(1 << 20, using: &generator), at: 3 << 20, for: .guestData)
        let contents = try Disk.open(source, options: DiskOptions(format: "raw"))
        var new = NewImage(path: folder.file("new.vmdk"))
        new.variant = "stream"
        let measured = try ImageMeasurement.run(new, contents: contents, readsData: true)
        #expect(measured.isUpperBound)
        var length: UInt64 = 0
        try contents.writeStream(format: "vmdk", name: "new.vmdk") { length += UInt64($0.count) }
        #expect(length <= measured.required && measured.required < measured.fullyAllocated)
        #expect(measured.required - length < 2 << 20)
    }

    @Test(arguments: ["raw", "qcow2"], [1 << 20, 20 << 30, 3 << 40])
    func agreesWithPeer(_ format: String, _ size: Int) throws {
        var new = NewImage(path: "new.\(format)")
        new.size = UInt64(size)
        let measured = try ImageMeasurement.run(new)
        let text = try Peer.run("qemu-img", "measure", "-O", format, "--size", "\(size)")
        #expect(text.contains("fully allocated size: \(measured.fullyAllocated)\n"), "\(text)")
    }

    /// Numbers that no image can have are errors, not traps.
    @Test func hugeDisks() throws {
        for format in ["vmdk", "vdi", "vhd", "vhdx", "qed", "qcow2", "raw"] {
            for shift in 40...63 {
                var new = NewImage(path: "new.\(format)")
                new.size = 1 << UInt64(shift)
                _ = try? ImageMeasurement.run(new)
                new.size = 1 << UInt64(shift) - 512
                _ = try? ImageMeasurement.run(new)
            }
        }
    }

    @Test func overlaysAreNotMeasured() throws {
        var new = NewImage(path: "new.qcow")
        (new.size, new.format) = (1 << 20, "qcow")
        #expect(throws: DiskError.self) { try ImageMeasurement.run(new) }
    }
}

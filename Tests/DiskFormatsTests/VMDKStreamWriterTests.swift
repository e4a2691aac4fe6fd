import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// A disk of random and zero pieces, as bytes.
private func sampleDisk(_ count: Int, seed: UInt64) -> [UInt8] {
    var random = SeededGenerator(seed: seed)
    let noise = (0..<64 << 10).map { _ in UInt8(truncatingIfNeeded: random.next()) }
    var bytes: [UInt8] = []
    while bytes.count < count {
        let piece = 32 << 10
        switch Int.random(in: 0..<4, using: &random) {
        case 0:
            let start = Int.random(in: 0..<piece, using: &random)
            bytes += noise[start..<start + piece]
        case 1: bytes += [UInt8](repeating: UInt8.random(in: 0...255, using: &random), count: piece)
        default: bytes += [UInt8](repeating: 0, count: piece)
        }
    }
    return Array(bytes[..<count])
}

/// A stream of such a disk.
private func stream(_ disk: [UInt8], grainSectors: UInt64 = 128, isCompressedElsewhere: Bool = false) throws -> [UInt8]
{
    let extent = VMDKExtentDescription(sectorCount: UInt64(disk.count / 512), type: .sparse, fileName: "disk.vmdk")
    let descriptor = VMDKDescriptor(createType: .streamOptimized, extents: [extent])
    var image: [UInt8] = []
    let writer = try VMDKStreamWriter(descriptor: descriptor, grainSectors: grainSectors) { (bytes) throws(DiskError) in
        image += bytes.array
    }
    let compressor = try Deflate.Compressor(level: 1)
    for (index, start) in stride(from: 0, to: disk.count, by: writer.grainByteCount).enumerated() {
        let grain = Array(disk[start..<min(disk.count, start + writer.grainByteCount)])
        try grain.withIOBytes { (bytes) throws(DiskError) in
            if isCompressedElsewhere, !bytes.isZero, bytes.count == writer.grainByteCount {
                var memory = [UInt8](repeating: 0, count: compressor.zlibBound(bytes.count))
                let count = try memory.withIOBuffer { (memory) throws(DiskError) in
                    compressor.deflateZlib(bytes, into: memory)
                }
                try Array(memory[..<(count ?? 0)]).withIOBytes { (stream) throws(DiskError) in
                    try writer.writeCompressedGrain(UInt64(index), stream)
                }
            } else {
                try writer.writeGrain(UInt64(index), bytes)
            }
        }
    }
    try writer.finish()
    return image
}

@Suite struct VMDKStreamWriterTests {
    @Test(
        arguments: [
            (34 << 20, 128, false), ((17 << 20) + 512, 128, true), (512, 128, false), (5 << 20, 8, false),
            ((9 << 20) + 1024, 4096, false),
        ] as [(Int, UInt64, Bool)])
    func peersReadIt(_ size: Int, _ grainSectors: UInt64, _ elsewhere: Bool) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        print("VMDKStreamWriterTests.peersReadIt: seed \(seed)")
        let disk = sampleDisk(size, seed: seed)
        let folder = try TemporaryFolder()
        let image = try folder.write(
            try stream(disk, grainSectors: grainSectors, isCompressedElsewhere: elsewhere), to: "disk.vmdk")
        try folder.write(disk, to: "disk.raw")
        #expect(try qemuImage("info", image).contains("streamOptimized"))
        try qemuImage("check", image)
        try qemuImage("compare", "-f", "vmdk", "-F", "raw", image, folder.file("disk.raw"))
        try qemuImage("convert", "-O", "raw", image, folder.file("copy.raw"))
        #expect(try folder.read("copy.raw") == disk)
    }

    /// libvmdk's program shows the same bytes.
    @Test func vmdkmountReadsIt() throws {
        for (size, seed) in [(34 << 20, 1 as UInt64), (3 << 20, 2)] {
            let folder = try TemporaryFolder()
            let disk = sampleDisk(size, seed: seed)
            try folder.write(try stream(disk), to: "disk.vmdk")
            let point = folder.file("mnt")
            #expect(try Subprocess.run(["mkdir", point]).status == 0)
            let mount = try Subprocess.run(["vmdkmount", folder.file("disk.vmdk"), point])
            try #require(
                mount.status == 0, "vmdkmount, /dev/fuse and root are needed: \(mount.outputText)\(mount.errorText)")
            defer { withExtendedLifetime(folder) { _ = try? Subprocess.run(["umount", point]) } }
            #expect(try folder.read("mnt/vmdk1") == disk)
        }
    }

    @Test func structure() throws {
        var disk = [UInt8](repeating: 0, count: 100 << 20)
        disk[70 << 20] = 1
        let image = try stream(disk)
        let header = try VMDKSparseHeader(parsing: image)
        #expect(header.version == 3 && header.directoryIsAtEnd && header.isCompressed && header.hasMarkers)
        #expect(!header.usesRedundantDirectory)
        let footer = try VMDKSparseHeader(parsing: Array(image[(image.count - 1024)..<(image.count - 512)]))
        #expect(VMDKStreamMarker(parsing: FieldReader(Array(image.suffix(512)))) == .endOfStream)
        #expect(VMDKStreamMarker(parsing: FieldReader(Array(image.suffix(1536).prefix(512)))) == .footer(sectors: 1))
        let fields = FieldReader(image)
        let directory = Int(footer.directorySector) * 512
        let entries = try (0..<4).map { try fields.littleEndian(at: directory + 4 * $0, as: UInt32.self) }
        #expect(entries[0] == 0 && entries[1] == 0 && entries[3] == 0, "tables without grains are left out")
        // The only grain comes first, then its table.
        let start = Int(header.overheadSectors) * 512
        guard
            case .grain(let sector, let size) = VMDKStreamMarker(
                parsing: FieldReader(Array(image[start..<start + 512])))
        else { throw DiskError(.invalidImage, "no grain marker") }
        #expect(sector == 70 << 11)
        let table = start + (12 + Int(size) + 511) / 512 * 512
        #expect(VMDKStreamMarker(parsing: FieldReader(Array(image[table..<table + 512]))) == .grainTable(sectors: 4))
        #expect(Int(entries[2]) * 512 == table + 512)
        let place = Int(70 * 16 % 512) * 4
        #expect(try fields.littleEndian(at: table + 512 + place, as: UInt32.self) == UInt32(start / 512))
    }

    @Test func aSinkThatFails() throws {
        let extent = VMDKExtentDescription(sectorCount: 1 << 20, type: .sparse, fileName: "disk.vmdk")
        let descriptor = VMDKDescriptor(createType: .streamOptimized, extents: [extent])
        #expect(throws: DiskError.self) {
            _ = try VMDKStreamWriter(descriptor: descriptor) { (_) throws(DiskError) in throw .system(28, "write") }
        }
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Chains of VHDs and VHDXs after sessions of any writes and discards, judged by readers that share nothing with the
/// library: those in Python that are part of these tests, and libyal's vhdimount. (QEMU shows a differencing VHD as if
/// it had no parent, and refuses differencing VHDXs.)
struct SecondReaderTests {
    static let chains = (DiskKind.vhd + DiskKind.vhdx).filter { [".vhd", ".vhdx"].contains(suffix(of: $0)) }
    static let rounds = 120

    private static func suffix(of kind: DiskKind) -> String { "." + (kind.top.file.split(separator: ".").last ?? "") }

    @Test(arguments: chains) func othersReadWhatWasWritten(_ kind: DiskKind) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let context = "\(kind.name), seed \(seed)"
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        var (path, model) = try kind.make(in: folder, pool: ConformanceTests.pool, using: &generator)
        for session in 0..<3 {
            let disk = try Disk.open(path, options: kind.options(isWritable: true))
            for _ in 0..<Self.rounds / 3 {
                let start = Int.random(in: 0..<model.size, using: &generator)
                let length = Int.random(in: 1...(Bool.random(using: &generator) ? 3000 : 400_000), using: &generator)
                let range = start..<min(model.size, start + length)
                switch Int.random(in: 0..<10, using: &generator) {
                case 0..<6:
                    let data = ConformanceTests.pool.bytes(range.count, using: &generator)
                    try disk.write(data, at: UInt64(range.lowerBound))
                    model.write(data, at: range.lowerBound)
                case 6..<9:
                    try disk.discard(offset: UInt64(range.lowerBound), length: UInt64(range.count))
                    model.zero(range)
                default: try disk.flush()
                }
            }
            try disk.close()
            try judge(kind, path, model, folder, "\(context), session \(session)")
        }
        // With everything discarded a base has no blocks any more.
        let disk = try Disk.open(path, options: kind.options(isWritable: true))
        try disk.discard(offset: 0, length: disk.size)
        model.zero(0..<model.size)
        try disk.close()
        try judge(kind, path, model, folder, "\(context), all discarded")
        guard kind.images.count == 1, kind.top.variant != "fixed" else { return }
        #expect(try ImageCheck.run(path).allocatedBlocks == 0)
        let shortest: UInt64 = path.hasSuffix(".vhd") ? 20_000 : 4 << 20
        #expect(try VHD.length(path) <= shortest, "\(context): the file was not cut off")
    }

    private func judge(
        _ kind: DiskKind, _ path: String, _ model: DiskModel, _ folder: TemporaryFolder, _ context: String
    ) throws {
        let images = kind.images.map(\.file)
        let suffix = Self.suffix(of: kind)
        let reader = suffix == ".vhd" ? SecondReader.vhd : .vhdx
        try reader.expectSound(images.filter { $0.hasSuffix(suffix) }.map { folder.file($0) }, context)
        if images.first?.hasSuffix(suffix) == true { return try reader.expectAgreement(path, model, context) }
        // What the base shows, as a raw disk.
        let base = try Disk.open(
            folder.file(images[0]), options: DiskOptions(format: images[0].hasSuffix(".raw") ? "raw" : nil))
        let raw = folder.file("base-for-reader")
        try Peer.run("rm", "-f", raw)
        try folder.write(base.read(at: 0, count: Int(base.size)), to: "base-for-reader")
        try base.close()
        try reader.expectAgreement(path, model, base: raw, context)
    }

    /// libyal's program follows a chain of three. Debian 12's version of it lets a run of sectors that are here end at
    /// a whole byte of the bitmap only, so that all that is written here has 4 KiB; and of small blocks (16 KiB) it
    /// looks at the first one's bitmap alone.
    @Test(
        arguments: [
            ("vhd", 512 << 10, 2 << 20), ("vhd", 2 << 20, 2 << 20), ("vhd", 1 << 20, 512 << 10),
            ("vhdx", 1 << 20, 2 << 20), ("vhdx", 4 << 20, 1 << 20),
        ] as [(String, UInt64, UInt64)])
    func vhdimountReadsChains(_ format: String, _ middleBlocks: UInt64, _ topBlocks: UInt64) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        var model = DiskModel(size: 5 << 20)
        for (number, blockSize) in [2 << 20, middleBlocks, topBlocks].enumerated() {
            let parent = number > 0 ? "\(number - 1).\(format)" : nil
            let path = try VHD.create(
                folder, "\(number).\(format)", size: model.size, blockSize: blockSize, parent: parent)
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            for round in 0..<40 {
                let start = Int.random(in: 0..<model.size / 4096, using: &generator) * 4096
                let count = min(model.size - start, Int.random(in: 1...40, using: &generator) * 4096)
                if round % 4 == 3 {
                    try disk.discard(offset: UInt64(start), length: UInt64(count))
                    model.zero(start..<start + count)
                } else {
                    let data = ConformanceTests.pool.bytes(count, using: &generator)
                    try disk.write(data, at: UInt64(start))
                    model.write(data, at: start)
                }
            }
            try disk.close()
            let context = "seed \(seed), image \(number)"
            try (format == "vhd" ? SecondReader.vhd : .vhdx).expectAgreement(path, model, context)
            try VHD.expectAgreementOfVhdimount(path, model, folder, depth: number + 1, context)
        }
    }

    /// The judge itself: harm of each kind is found.
    @Test(arguments: ["footer", "copy", "header", "entry", "overlap", "bitmap", "end"])
    func judgeFindsMistakes(_ what: String) throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 6 << 20)
        try VHD.write(path, [(1, 0, 512), (2, 4 << 20, 512)])
        try VHD.expectSound([path])
        let length = try VHD.length(path)
        let first = try folder.read("disk.vhd").slice(1536, 4)
        switch what {
        case "footer": try VHD.poke(path, [1], at: length - 100)
        case "copy": try VHD.poke(path, [1], at: 100)
        case "header": try VHD.poke(path, [1], at: 512 + 800)
        case "entry": try VHD.poke(path, [0, 1, 0, 0], at: 1536 + 4)
        case "overlap": try VHD.poke(path, first, at: 1536 + 4)
        case "bitmap":
            let place = UInt64(first[2]) << 17 | UInt64(first[3]) << 9
            try VHD.poke(path, [0xfe], at: place + 100)
        default:
            try FileStorage(path: path, isWritable: true).write(
                folder.read("disk.vhd").slice(0, 512), at: length + 4096, for: .footer)
        }
        #expect(try SecondReader.vhd.mistakes(in: [path]) != nil)
    }
}

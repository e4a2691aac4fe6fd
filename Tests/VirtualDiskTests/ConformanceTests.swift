import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// What every disk does, whatever it is made of: it holds what was written, and zeros where something was discarded, at
/// every offset and length; after it is closed, the programs of others agree.
struct ConformanceTests {
    static let rounds = unsafe getenv("VDMOUNT_TORTURE") != nil ? 3000 : 150
    static let pool = RandomPool(seed: 1)

    @Test(arguments: DiskKind.all) func randomRequestsAtBlockEdges(_ kind: DiskKind) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let context = "\(kind.name), seed \(seed)"
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        var (path, model) = try kind.make(in: folder, pool: Self.pool, using: &generator)
        var disk = try Disk.open(path, options: kind.options(isWritable: true))
        try #require(disk.size == UInt64(model.size))
        for round in 0..<Self.rounds {
            let range = Self.range(kind, model.size, &generator)
            switch Int.random(in: 0..<100, using: &generator) {
            case 0..<55:
                let data = Self.pool.bytes(range.count, using: &generator)
                try disk.write(data, at: UInt64(range.lowerBound))
                model.write(data, at: range.lowerBound)
            case 55..<60:
                try disk.write([UInt8](repeating: 0, count: range.count), at: UInt64(range.lowerBound))
                model.zero(range)
            case 60..<80:
                try disk.discard(offset: UInt64(range.lowerBound), length: UInt64(range.count))
                model.zero(range)
            case 80..<90: break
            case 90..<96: try disk.flush()
            default:
                try disk.close()
                disk = try Disk.open(path, options: kind.options(isWritable: true))
            }
            let place = Bool.random(using: &generator) ? range : Self.range(kind, model.size, &generator)
            if let mistake = try model.mistake(of: disk, in: place) {
                Issue.record("\(context), round \(round): \(mistake)")
                return
            }
        }
        if let mistake = try model.mistake(of: disk, in: 0..<model.size) { Issue.record("\(context): \(mistake)") }
        try Self.expectHonestExtents(disk, model, context)
        try disk.close()
        try Self.expectSoundClosed(kind, path, model, context)
    }

    /// A range of the disk: its ends lie at, before or after the edge of a block or a sector, or anywhere.
    private static func range(_ kind: DiskKind, _ size: Int, _ generator: inout SeededGenerator) -> Range<Int> {
        func place() -> Int {
            let unit = [kind.blockSize, kind.blockSize, 512, 4096, 1].randomElement(using: &generator) ?? 1
            let near = Int.random(in: 0...size / unit, using: &generator) * unit
            return max(0, min(size, near + Int.random(in: -1...1, using: &generator)))
        }
        let a = place()
        let isShort = Bool.random(using: &generator)
        let b = isShort ? min(size, a + Int.random(in: 0...3 * 512, using: &generator)) : place()
        return min(a, b)..<min(max(a, b), min(a, b) + 300_000)
    }

    /// What is said to be no data is zeros, and the extents cover the disk without gaps.
    static func expectHonestExtents(_ disk: Disk, _ model: DiskModel, _ context: String) throws {
        let zeros = DiskModel(size: model.size)
        var position: UInt64 = 0
        try disk.forEachExtent(offset: 0, length: disk.size) { (extent) throws(DiskError) in
            #expect(extent.offset == position && extent.length > 0, "\(context): extents have a gap at \(position)")
            position = extent.offset + extent.length
            guard !extent.isAllocated else { return true }
            let range = model.bytes.slice(Int(extent.offset), Int(extent.length))
            let mistake = zeros.mistake(in: range, at: 0)
            #expect(mistake == nil, "\(context): the extent at \(extent.offset) is said to be zeros")
            return true
        }
        #expect(position == disk.size, "\(context): extents end at \(position)")
        var hole = try disk.nextHole(from: 0)
        while hole < disk.size {
            let data = try disk.nextData(from: hole) ?? disk.size
            let range = model.bytes.slice(Int(hole), Int(data - hole))
            #expect(
                data > hole && zeros.mistake(in: range, at: 0) == nil,
                "\(context): there is data in the hole at \(hole)")
            guard data > hole else { return }
            hole = try disk.nextHole(from: data)
        }
    }

    /// The closed image opens again, our checker and the peer's find nothing, and all read the same.
    static func expectSoundClosed(_ kind: DiskKind, _ path: String, _ model: DiskModel, _ context: String) throws {
        let disk = try Disk.open(path, options: kind.options(isWritable: false))
        let mistake = try model.mistake(of: disk, in: 0..<model.size)
        #expect(mistake == nil, "\(context): after closing: \(mistake ?? "")")
        try disk.close()
        let report = try ImageCheck.run(path, options: kind.options(isWritable: false))
        for finding in report.findings where finding.severity == .repairable || finding.severity == .loss {
            Issue.record("\(context): \(finding.file): \(finding.message)")
        }
        try Peer.expectAgreement(kind, path, model, context)
    }

    /// Every length at every block edge of a small disk, with the bytes round it unharmed.
    @Test(arguments: DiskKind.all) func everyOffsetAndLengthAtAnEdge(_ kind: DiskKind) throws {
        var generator = SeededGenerator(seed: 7)
        let folder = try TemporaryFolder()
        var (path, model) = try kind.make(in: folder, pool: Self.pool, using: &generator)
        let disk = try Disk.open(path, options: kind.options(isWritable: true))
        let block = min(kind.blockSize, 64 << 10)
        let edges = [0, block, 3 * block, model.size / block * block, model.size].filter { $0 <= model.size }
        for edge in edges {
            for start in edge - 1...edge + 1 {
                for length in [0, 1, 2, 511, 512, 513, block - 1, block, block + 1] {
                    guard start >= 0, start + length <= model.size else { continue }
                    let data = Self.pool.bytes(length, using: &generator)
                    try disk.write(data, at: UInt64(start))
                    model.write(data, at: start)
                    let seen = max(0, start - 700)..<min(model.size, start + length + 700)
                    if let mistake = try model.mistake(of: disk, in: seen) {
                        Issue.record("\(kind.name): \(length) bytes written at \(start): \(mistake)")
                        return
                    }
                }
            }
        }
        let size = UInt64(model.size)
        for (offset, count) in [(size, 1), (size - 1, 2), (UInt64.max, 1), (UInt64.max - 511, 512)] {
            #expect(throws: DiskError.self) { try disk.read(at: offset, count: count) }
            #expect(throws: DiskError.self) { try disk.write([UInt8](repeating: 1, count: count), at: offset) }
            #expect(throws: DiskError.self) { try disk.discard(offset: offset, length: UInt64(count)) }
        }
        #expect(try disk.read(at: size, count: 0).isEmpty)
        try disk.close()
        try Self.expectSoundClosed(kind, path, model, kind.name)
    }
}

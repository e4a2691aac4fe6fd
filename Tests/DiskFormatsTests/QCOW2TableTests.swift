import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

struct QCOW2TableTests {
    // MARK: - Entries

    /// The example of the specification: with clusters of 64 KiB, 54 bits say where, and 8 how many sectors more.
    @Test func compressedClusterDescriptor() {
        let entry: UInt64 = 1 << 62 | 3 << 54 | 0x12_3456
        let cluster = QCOW2CompressedCluster(entry, clusterBits: 16)
        #expect(cluster.offset == 0x12_3456)
        #expect(cluster.count == 4 * 512 - 0x56)
        #expect(cluster.hostClusters(16) == 0x12...0x12)
        let wide = QCOW2CompressedCluster(1 << 62 | 7 << 61 - 1 << 61 | 0xff00, clusterBits: 9)
        #expect(wide.offset == 0xff00 && wide.hostClusters(9).lowerBound == 0x7f)
        for bits in 9...21 as ClosedRange<UInt64> {
            let most = QCOW2CompressedCluster(.max >> 1, clusterBits: bits)
            #expect(most.count <= 2 << bits && most.hostClusters(bits).count <= 3)
        }
    }

    @Test func subclusterRuns() {
        var generator = SeededGenerator(seed: 1)
        for _ in 0..<2000 {
            let allocated = UInt32(truncatingIfNeeded: generator.next() & generator.next())
            let zero = UInt32(truncatingIfNeeded: generator.next() & generator.next()) & ~allocated
            let bitmap = QCOW2SubclusterBitmap(allocated: allocated, zero: zero)
            let first = UInt64.random(in: 0..<32, using: &generator)
            var end = first
            while end < 32, bitmap.state(end) == bitmap.state(first) { end += 1 }
            #expect(bitmap.runLength(first) == end - first)
        }
        #expect(QCOW2SubclusterBitmap.allAllocated.runLength(0) == 32)
        #expect(QCOW2SubclusterBitmap.none.allocating(0..<32) == .allAllocated)
        #expect(QCOW2SubclusterBitmap.allZero.allocating(1..<3) == .init(allocated: 6, zero: ~6))
        #expect(QCOW2SubclusterBitmap(rawValue: 1 << 33 | 2).isInvalid)
    }

    // MARK: - Refcounts

    /// Refcounts of every width, one by one and beside each other, as bytes: the specification says in which order.
    @Test(arguments: 0...6 as ClosedRange<UInt32>) func refcountsOfEveryWidth(_ order: UInt32) {
        let layout = QCOW2RefcountLayout(order: order)
        var generator = SeededGenerator(seed: UInt64(order))
        let count = UInt64(1) << layout.perWordBits
        #expect(count * layout.bits == 64)
        var values = [UInt64](repeating: 0, count: Int(count))
        var word: UInt64 = 0
        for _ in 0..<200 {
            let index = UInt64.random(in: 0..<count, using: &generator)
            values[Int(index)] = generator.next() & layout.maximum
            word = layout.set(word, index, values[Int(index)])
            for other in 0..<count { #expect(layout.get(word, other) == values[Int(other)]) }
        }
        var bytes: [UInt8] = []
        for shift in stride(from: 0, to: 64, by: 8) { bytes.append(UInt8(truncatingIfNeeded: word >> UInt64(shift))) }
        if layout.bits >= 8 {
            let width = Int(layout.bits / 8)
            let first = bytes[..<width].reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
            #expect(first == values[0], "most significant byte first")
        } else {
            #expect(UInt64(bytes[0]) & layout.maximum == values[0], "from the least significant bit on")
        }
    }

    @Test func countsInAWindowThatShrinks() {
        var generator = SeededGenerator(seed: 6)
        var expected: [UInt64: UInt32] = [:]
        var references: [UInt64] = []
        for _ in 0..<3000 {
            let cluster = UInt64.random(in: 0..<40, using: &generator) << 14 | generator.next() & 7
            references.append(cluster)
            expected[cluster, default: 0] += 1
        }
        var first: UInt64 = 0
        var found: [UInt64: UInt32] = [:]
        var passes = 0
        while first < .max {
            var counts = QCOW2ReferenceCounts(from: first, pageLimit: 3)
            for cluster in references { counts.add(cluster) }
            #expect(counts.occupiedPages.count <= 3)
            for cluster in expected.keys where counts.window.contains(cluster) { found[cluster] = counts[cluster] }
            first = counts.window.upperBound
            passes += 1
        }
        #expect(found == expected)
        #expect(passes >= 13)
    }

    // MARK: - A check in turns

    private func open(_ path: String, _ mode: OpenMode) throws -> QCOW2Image {
        try QCOW2Opener.open(
            OpenRequest(
                storage: FileStorage(path: path, isWritable: mode == .readWrite), path: path, mode: mode,
                cache: TableCache(capacity: 1 << 20), companions: FolderCompanions(), skipsConsistencyChecks: true))
    }

    /// Counted a few pages at a time, a check finds the same, and a repair puts the same right.
    @Test func checkInTurnsFindsTheSame() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.qcow2")
        try qemuImage(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,preallocation=metadata", path, "12M")
        let file = try FileStorage(path: path, isWritable: true)
        // Refcounts far from each other, each in a block of its own: block 1, 20, 90.
        let table = try FieldReader(file.bytes(at: 48, count: 8, for: .header, "")).bigEndian(at: 0, as: UInt64.self)
        for (index, value) in [(1, 0), (20, 3), (90, 0)] as [(UInt64, UInt8)] {
            let entry = try FieldReader(file.bytes(at: table + index * 8, count: 8, for: .table, "")).bigEndian(
                at: 0, as: UInt64.self)
            try file.write([0, value], at: entry + 100, for: .table)
        }
        let whole = try QCOW2Repair(open(path, .readOnly), file: path).run(.nothing)
        #expect(whole.counts[.repairable] == 5 && whole.counts[.leak] == 1, "\(whole.findings)")
        let turns = try QCOW2Repair(open(path, .readOnly), file: path, pageLimit: 1).run(.nothing)
        #expect(turns.counts == whole.counts && turns.allocatedBlocks == whole.allocatedBlocks)
        let repaired = try QCOW2Repair(open(path, .readWrite), file: path, pageLimit: 2).run(.everything)
        #expect(repaired.remaining(.repairable) + repaired.remaining(.leak) == 0)
        #expect(try QCOW2Repair(open(path, .readOnly), file: path).run(.nothing).findings.isEmpty)
        try qemuImage("check", "-q", path)
    }

    // MARK: - Compression

    @Test func zstandardFrames() throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 3)
        let data = RandomPool(size: 10_000, seed: 1).bytes(7000, using: &generator) + [UInt8](repeating: 5, count: 3000)
        let source = try folder.write(data, to: "data")
        let result = try Subprocess.run(["zstd", "-q", "-c", source])
        #expect(result.status == 0)
        let frame = result.output
        func decompress(_ input: [UInt8], _ count: Int) throws -> [UInt8] {
            var output = [UInt8](repeating: 0, count: count)
            try output.withIOBuffer { (buffer) throws(DiskError) in
                try input.withIOBytes { (bytes) throws(DiskError) in try Zstandard.decompress(bytes, into: buffer) }
            }
            return output
        }
        #expect(try decompress(frame + [1, 2, 3], 10_000) == data)
        #expect(try decompress(frame + frame, 20_000) == data + data)
        #expect(throws: DiskError.self) { try decompress(frame, 20_000) }
        #expect(throws: DiskError.self) { try decompress(frame, 9999) }
        for count in [0, 3, 20, frame.count - 1] {
            #expect(throws: DiskError.self) { try decompress(Array(frame[..<count]), 10_000) }
        }
    }
}

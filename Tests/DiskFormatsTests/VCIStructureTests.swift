import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// The structures of a block cache, byte by byte, and trees of all sizes.
struct VCIStructureTests {
    private static let layout = VCILayout(size: 4096)

    @Test func headerBytes() throws {
        let layout = try #require(Self.layout)
        var header = VCIHeader(layout, type: .fixed)
        header.isUnclean = true
        header.imageUUID = try #require(DiskUUID("00112233-4455-6677-8899-aabbccddeeff"))
        header.modificationUUID = try #require(DiskUUID("ffeeddcc-bbaa-9988-7766-554433221100"))
        let bytes = header.encode()
        #expect(bytes.count == 1024)
        let expected: [UInt8] =
            [0x56, 0x43, 0x49, 0, 1, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0]
            + [4, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]
            + (0..<16).map { UInt8($0) * 0x11 } + (0..<16).reversed().map { UInt8($0) * 0x11 }
        #expect(Array(bytes[..<73]) == expected)
        #expect(bytes[73...].allSatisfy { $0 == 0 })
        #expect(try VCIHeader(parsing: bytes) == header)
        for (offset, value) in [(0, 0x57), (4, 2), (17, 0), (17, 3)] as [(Int, UInt8)] {
            var changed = bytes
            changed[offset] = value
            #expect(throws: DiskError.self) { try VCIHeader(parsing: changed) }
        }
        #expect(throws: DiskError.self) { try VCIHeader(parsing: Array(bytes[..<72])) }
    }

    @Test func mapBytes() throws {
        let map = VCIBlockMap(managed: 0x3000, metadata: 0x102, data: 0x201)
        let bytes = map.encode()
        let expected: [UInt8] =
            [0x56, 0x42, 0x4c, 0x4b, 1, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0]
            + [0xfd, 0x2c, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
        #expect(bytes.count == 512 && Array(bytes[..<40]) == expected && bytes[40...].allSatisfy { $0 == 0 })
        #expect(try VCIBlockMap(parsing: bytes) == map)
        // Any sum that is wrong, or does not fit.
        for (offset, value) in [(8, 1), (16, 0), (31, 0xff), (39, 0xff)] as [(Int, UInt8)] {
            var changed = bytes
            changed[offset] = value
            #expect(throws: DiskError.self) { try VCIBlockMap(parsing: changed) }
        }
    }

    @Test func bitsAreLeastSignificantFirst() {
        var bits = VCIMapBits([0..<3, 9..<10, 30..<66])
        #expect(bits.next(from: 0, count: 4) == [0x07, 0x02, 0, 0xc0])
        #expect(bits.next(from: 32, count: 4) == [0xff, 0xff, 0xff, 0xff])
        #expect(bits.next(from: 64, count: 1) == [0x03])
        #expect(bits.next(from: 72, count: 8) == nil)
    }

    @Test func nodeBytes() throws {
        var extent = VCIExtent(first: 0x1122_3344_5566_7788, blocks: 0x99aa_bbcc, address: 0x0102_0304_0506_0708)
        (extent.previous, extent.next) = (0x1011_1213_1415_1617, 0x2021_2223_2425_2627)
        let leaf = VCINode.extents([extent]).encode()
        let expected: [UInt8] =
            [2, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x10, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21, 0x20, 0, 0]
            + [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xcc, 0xbb, 0xaa, 0x99, 8, 7, 6, 5, 4, 3, 2, 1]
        #expect(leaf.count == 4096 && Array(leaf[..<39]) == expected && leaf[39...].allSatisfy { $0 == 0 })
        #expect(try VCINode(parsing: leaf) == .extents([extent]))
        let branch = VCIBranch(first: 0x0102_0304_0506_0708, blocks: 0x1112_1314, child: 0x2122_2324_2526_2728)
        let inner = VCINode.branches([branch]).encode()
        #expect(
            Array(inner[..<21])
                == [1, 8, 7, 6, 5, 4, 3, 2, 1, 0x14, 0x13, 0x12, 0x11, 0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21])
        #expect(try VCINode(parsing: inner) == .branches([branch]))
        #expect(VCINode.extentLimit == 107 && VCINode.branchLimit == 204)
        for (offset, value) in [(0, 0), (0, 3), (17, 1), (4095, 1), (60, 1)] as [(Int, UInt8)] {
            var changed = leaf
            changed[offset] = value
            #expect(throws: DiskError.self, "byte \(offset)") { try VCINode(parsing: changed) }
        }
    }

    @Test func layouts() throws {
        // Header, block map, root: in that order, one behind the other.
        for size in [4096, 8192, 131_072, 20 << 20, 1 << 27, 1 << 28, 1 << 30] as [UInt64] {
            let layout = try #require(VCILayout(size: size))
            #expect(layout.rootAddress == 2 + 1 + size / 4096 && UInt64(layout.mapBlocks) == 1 + size / 4096)
            #expect(layout.slotCount > 0 && layout.slotCount <= 1 << 18)
            #expect(layout.address(ofSlot: layout.slotCount) <= size)
            #expect(VCITreeShape(extentCount: Int(layout.slotCount), layout).nodeCount <= layout.nodeCount)
            // Little goes to waste.
            #expect(layout.slotCount * layout.chunkBlocks * 100 >= size * 95)
            #expect(layout.slot(at: layout.firstSlot - 1) == nil && layout.slot(at: layout.firstSlot + 1) == nil)
            #expect(layout.slot(at: layout.address(ofSlot: layout.slotCount - 1)) == layout.slotCount - 1)
            #expect(layout.slot(at: layout.address(ofSlot: layout.slotCount)) == nil)
        }
        #expect(VCILayout(size: 0) == nil && VCILayout(size: 4095) == nil && VCILayout(size: 1 << 31) == nil)
        var before: UInt64 = 0
        for count in 0...30_000 as ClosedRange<UInt64> {
            let nodes = VCITreeShape.nodeCount(forExtents: count)
            #expect(nodes >= before)
            before = nodes
        }
    }

    /// Extents anywhere in the disk, in any slots, used in any order.
    @Test(arguments: [0, 1, 2, 3, 107, 108, 5000, 107 * 204, 107 * 204 + 1])
    func treesAndOrdersComeBack(_ count: Int) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let layout = try #require(VCILayout(size: count > 5000 ? 1 << 23 : 1 << 20))
        let storage = PagedStorage()
        try VCIFile.makeEmpty(storage, layout, type: .dynamic)
        var extents: [VCIExtent] = []
        var first: UInt64 = 0
        for slot in (0..<layout.slotCount).shuffled(using: &generator).prefix(count) {
            // Gaps that a child's entry can say, and now and then one that it cannot.
            first +=
                UInt64.random(in: 0...3, using: &generator)
                << (UInt64.random(in: 0...20, using: &generator) == 0 ? 33 : 7)
            let blocks = UInt32.random(in: 1...128, using: &generator)
            extents.append(VCIExtent(first: first, blocks: blocks, address: layout.address(ofSlot: slot)))
            first += UInt64(blocks)
        }
        let order = (0..<UInt32(count)).shuffled(using: &generator)
        let shape = VCITreeShape(extentCount: count, layout)
        VCIUseOrder.link(&extents, order, shape)
        try VCIFile.save(extents, to: storage, layout)
        try storage.setLength(layout.size * 512)
        let header = try VCIHeader(parsing: storage.bytes(at: 0, count: 1024, for: .header, "the header"))
        let found = try VCIContents(storage, header)
        #expect(found.extents == extents, "seed \(seed)")
        #expect(UInt64(found.nodeCount) == shape.nodeCount, "seed \(seed)")
        // The leaves come in the order of use, and of most extents it is the very one.
        let leaves = { (order: [UInt32]) in order.map { shape.leafAddress(of: Int($0)) } }
        #expect(leaves(found.order) == leaves(order), "seed \(seed)")
        let same = zip(found.order, order).filter { $0 == $1 }.count
        #expect(same * 3 >= count, "seed \(seed): \(same) of \(count)")
    }
}

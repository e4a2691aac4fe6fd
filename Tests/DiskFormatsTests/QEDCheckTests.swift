import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// The walk through all tables: what it finds, what it clears, and that the size of its windows changes nothing.
struct QEDCheckTests {
    /// Two L2 tables in clusters 2 and 3, data in 4 to 7, and whatever `change` makes of it.
    private func image(_ change: (inout QEDBuilder) -> Void = { _ in }) -> QEDBuilder {
        var builder = QEDBuilder(imageSize: 4 << 20, clusterCount: 8)
        builder.l1 = [0: 2, 1: 3]
        builder.l2 = [2: [0: 4 * 4096, 7: 5 * 4096, 8: 1], 3: [0: 6 * 4096, 511: 7 * 4096]]
        for cluster in 4..<8 as Range<UInt64> { builder.data[cluster] = UInt8(cluster) }
        change(&builder)
        return builder
    }

    private func check(
        _ builder: QEDBuilder, _ storage: any Storage, repair: Bool = false, window: UInt64 = QEDCheck.windowLimit
    ) throws -> QEDCheck {
        let header = try QEDHeader(parsing: storage.bytes(at: 0, count: 64, for: .header, "the header"))
        var check = QEDCheck(
            header, storage, file: "image", length: try storage.length(), isRepairing: repair, windowLimit: window)
        try check.run()
        return check
    }

    @Test(arguments: [1, 2, 3, 5, 64, QEDCheck.windowLimit]) func soundImageHasNoFindings(_ window: UInt64) throws {
        let report = try check(image(), MemoryStorage(image().encode()), window: window).report
        #expect(report.counts.isEmpty)
        #expect(report.allocatedBlocks == 4)
        #expect(report.totalBlocks == 1024)
    }

    /// A change, and what is found then: losses, leaks, unfinished writes (in an image that needs a check).
    struct Damage: Sendable, CustomTestStringConvertible {
        let name: String
        let losses: Int
        let leaks: Bool
        var unfinished = 0
        let change: @Sendable (inout QEDBuilder) -> Void
        var testDescription: String { name }
    }

    static let damages = [
        Damage(name: "nothing leads to a cluster", losses: 0, leaks: true) { $0.l2[2]?[0] = 0 },
        Damage(name: "a cluster outside the file", losses: 1, leaks: true) { $0.l2[2]?[0] = 8 * 4096 },
        Damage(name: "a cluster far outside", losses: 1, leaks: true) { $0.l2[2]?[0] = .max & ~4095 },
        Damage(name: "a cluster that is not aligned", losses: 1, leaks: true) { $0.l2[2]?[0] = 4 * 4096 + 512 },
        Damage(name: "a cluster in the header", losses: 0, leaks: true, unfinished: 1) {
            $0.features = 2
            $0.l2[2]?[0] = 2
        },
        Damage(name: "an unfinished write", losses: 0, leaks: true, unfinished: 1) {
            $0.features = 2
            $0.l2[2]?[0] = 9 * 4096
        },
        Damage(name: "data twice", losses: 1, leaks: true) { $0.l2[3]?[0] = 4 * 4096 },
        Damage(name: "data twice, in one that needs a check", losses: 1, leaks: true) {
            $0.features = 2
            $0.l2[3]?[0] = 4 * 4096
        },
        Damage(name: "data in the L1 table", losses: 1, leaks: true) { $0.l2[3]?[0] = 4096 },
        Damage(name: "data in an L2 table", losses: 1, leaks: true) { $0.l2[2]?[0] = 3 * 4096 },
        Damage(name: "an L2 table twice", losses: 1, leaks: true) { $0.l1[1] = 2 },
        Damage(name: "an L2 table outside the file", losses: 1, leaks: true) { $0.l1[1] = 8 },
        Damage(name: "the L1 table as an L2 table", losses: 1, leaks: true) { $0.l1[1] = 1 },
        Damage(name: "a thousand times the same", losses: 500, leaks: true) { builder in
            builder.l2[2] = Dictionary(uniqueKeysWithValues: (0..<501).map { ($0, 4 * 4096) })
        },
    ]

    @Test(arguments: damages, [1, 2, QEDCheck.windowLimit])
    func damageIsFoundAndRepaired(_ damage: Damage, _ window: UInt64) throws {
        let builder = image(damage.change)
        let storage = MemoryStorage(builder.encode())
        let before = storage.bytes
        let found = try check(builder, storage, window: window).report
        #expect(found.remaining(.loss) == damage.losses)
        #expect(found.remaining(.repairable) == damage.unfinished)
        #expect((found.counts[.leak] != nil) == damage.leaks)
        #expect(storage.bytes == before, "a check changed the file")

        let repaired = try check(builder, storage, repair: true, window: window).report
        #expect(repaired.remaining(.loss) == 0 && repaired.remaining(.repairable) == 0)
        #expect(repaired.counts[.loss] ?? 0 == damage.losses)
        let after = try check(builder, storage).report
        #expect(after.remaining(.loss) == 0 && after.remaining(.repairable) == 0)
        // Nothing but entries was cleared, eight bytes each.
        let changed = zip(before, storage.bytes).enumerated().filter { $0.element.0 != $0.element.1 }
        #expect(changed.allSatisfy { $0.element.1 == 0 && (4096..<4 * 4096).contains($0.offset) })
    }

    /// Of two tables that overlap, the first stays, wherever a window ends between them.
    @Test(arguments: [1, 2, 3, 4, 5, QEDCheck.windowLimit]) func overlappingTables(_ window: UInt64) throws {
        var builder = QEDBuilder(imageSize: 16 << 20, clusterCount: 12)
        builder.tableSize = 2
        builder.l1 = [0: 3, 1: 4, 2: 6]
        builder.l2 = [6: [0: 8 * 4096]]
        let check = try check(builder, MemoryStorage(builder.encode()), window: window)
        #expect(check.report.remaining(.loss) == 1)
        #expect(check.dropped.sorted() == [4096 + 8])
        #expect(check.report.allocatedBlocks == 1)
    }

    /// A reader whose entries were cleared in memory sees zeros there, at any alignment, and nowhere else.
    @Test func clearedEntriesReadAsZeros() throws {
        let bytes = (0..<4096).map { UInt8(truncatingIfNeeded: $0 | 1) }
        let storage = QEDRepairedTables(MemoryStorage(bytes), clearing: [0, 512, 520, 4088])
        var expected = bytes
        for start in [0, 512, 520, 4088] { for index in start..<start + 8 { expected[index] = 0 } }
        for start in [0, 1, 7, 8, 9, 505, 511, 512, 515, 519, 527, 528, 4080, 4087, 4095] {
            for count in [1, 7, 8, 9, 30, 600, 4096] {
                let found = try storage.availableBytes(at: UInt64(start), count: count, for: .table)
                #expect(found == Array(expected[start..<min(4096, start + count)]), "\(count) bytes at \(start)")
            }
        }
        #expect(throws: DiskError.self) { try storage.write([1], at: 0, for: .table) }
    }

    /// Entries of a sparse file's tables are found beside its holes.
    @Test func holesArePassedOver() throws {
        let folder = try TemporaryFolder()
        let file = try FileStorage(creating: folder.file("sparse"))
        try file.setLength(1 << 40)
        let places = [0, 8, 4088, 65_528, 65_536, (1 << 30) - 8] as [UInt64]
        for place in places { try file.write([UInt8(place & 63 + 2)], at: (1 << 30) + place, for: .table) }
        try file.write([1], at: (1 << 30) + 16, for: .table)
        var found: [UInt64] = []
        let scanner = QEDTableScanner(storage: file, tableBytes: 1 << 30)
        try scanner.forEachEntry(of: 1 << 30, skipping: 1) { (place, entry) throws(DiskError) in
            found.append(place - (1 << 30))
            #expect(entry == (place - (1 << 30)) & 63 + 2)
        }
        #expect(found == places)
    }
}

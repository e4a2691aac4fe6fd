import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Every byte of a QED image is hostile, as of any other; see ``HostileVMDKTests``. And a header that asks for tables
/// of a gigabyte, or an image that must be checked, costs no more time and memory than another.
struct HostileQEDTests {
    enum Kind: String, Sendable, Codable, CaseIterable, CustomTestStringConvertible {
        case base
        case child
        case unclean
        case parentOfOthers

        var testDescription: String { rawValue }

        /// Files of an image, the first of which is opened, and the one that is harmed.
        func make() -> (files: [(name: String, bytes: [UInt8])], harmed: String) {
            var builder = QEDBuilder(imageSize: (100 << 10) + 512, clusterCount: 9)
            builder.tableSize = self == .child ? 2 : 1
            let table: UInt64 = 1 + builder.tableSize
            let first = table + builder.tableSize
            builder.l1 = [0: table]
            builder.l2 = [table: [0: first * 4096, 1: 1, 2: (first + 1) * 4096, 25: (first + 2) * 4096]]
            for cluster in first..<9 { builder.data[cluster] = UInt8(cluster) }
            let base = [UInt8](repeating: 0x33, count: 60 << 10)
            switch self {
            case .base: return ([("disk.qed", builder.encode())], "disk.qed")
            case .unclean:
                builder.features = 2
                return ([("disk.qed", builder.encode())], "disk.qed")
            case .child:
                (builder.features, builder.backingFilename) = (7, "base.raw")
                return ([("disk.qed", builder.encode()), ("base.raw", base)], "disk.qed")
            case .parentOfOthers:
                var top = QEDBuilder(imageSize: 100 << 10, clusterCount: 2)
                (top.features, top.backingFilename) = (1, "middle.qed")
                return ([("disk.qed", top.encode()), ("middle.qed", builder.encode())], "middle.qed")
            }
        }
    }

    @Test(arguments: Kind.allCases) func anyFieldHoldsAnything(_ kind: Kind) async throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as Kind, seed = seed as UInt64, path = folder.path as String] in
            try HostileQEDSession(kind, seed: seed, notes: path).changeFields()
        }
        HostileVMDKTests.explain(result, "seed \(seed)", folder)
    }

    @Test(arguments: Kind.allCases) func fileEndsAnywhere(_ kind: Kind) async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [kind = kind as Kind, path = folder.path as String] in
            try HostileQEDSession(kind, seed: 0, notes: path).truncate()
        }
        HostileVMDKTests.explain(result, "", folder)
    }

    /// Tables that are well formed one by one and absurd together.
    @Test func absurdTables() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            try HostileQEDSession(.base, seed: 0, notes: path).absurdTables()
        }
        HostileVMDKTests.explain(result, "", folder)
    }
}

/// Attempts, one after the other, in a process of their own.
struct HostileQEDSession {
    private let image: HostileImage
    private let harmed: String
    private let seed: UInt64
    private let progress: Progress
    private let folder: TemporaryFolder

    init(_ kind: HostileQEDTests.Kind, seed: UInt64, notes: String) throws {
        alarm(300)  // whatever goes on for ever ends here
        self.seed = seed
        folder = try TemporaryFolder()
        progress = try Progress(folder: notes)
        let made = kind.make()
        image = try HostileImage(made.files, folder: folder)
        harmed = folder.file(made.harmed)
        try #require(image.exercise() == nil)
        try #require(image.openingError() == nil)
    }

    private func attempt(_ what: String, _ image: HostileImage) {
        progress.note(what)
        if let problem = image.exercise() { Issue.record("\(what), seed \(seed): \(problem)") }
    }

    private func attempt(_ what: String, _ bytes: [UInt8], length: UInt64? = nil) {
        var attempt = image
        attempt.files[harmed] = bytes
        attempt.length = length
        self.attempt(what, attempt)
    }

    /// Sets each field to many values, and then several at once.
    func changeFields() {
        var generator = SeededGenerator(seed: seed)
        let bytes = image.files[harmed] ?? []
        let table = Int(bytes.number(at: 4096, width: 8))
        var fields: [(name: String, offset: Int, width: Int)] = [0, 4, 8, 12, 56, 60].map { ("header+\($0)", $0, 4) }
        fields += [16, 24, 32, 40, 48].map { ("header+\($0)", $0, 8) }
        fields += [0, 1, 511].map { ("L1 entry \($0)", 4096 + $0 * 8, 8) }
        fields += [0, 1, 2, 3, 25, 26, 511].map { ("L2 entry \($0)", table + $0 * 8, 8) }
        for field in fields {
            let old = bytes.number(at: field.offset, width: field.width)
            var values = hostileValues(width: field.width, was: old, using: &generator)
            values += [4096, 8192, 12_288, UInt64(bytes.count), UInt64(bytes.count - 4096)]
            for value in values where value != old {
                attempt("\(field.name) = \(value)", bytes.setting(value, at: field.offset, width: field.width))
            }
        }
        for _ in 0..<60 {
            var copy = bytes
            var what = "at once"
            for _ in 0..<Int.random(in: 2...4, using: &generator) {
                guard let field = fields.randomElement(using: &generator) else { break }
                let old = copy.number(at: field.offset, width: field.width)
                let values = hostileValues(width: field.width, was: old, using: &generator)
                guard let value = values.randomElement(using: &generator) else { break }
                copy = copy.setting(value, at: field.offset, width: field.width)
                what += ", \(field.name) = \(value)"
            }
            attempt(what, copy)
        }
    }

    /// Cuts the file off at every sector, and at odd places.
    func truncate() {
        let bytes = image.files[harmed] ?? []
        let odd = [1, 3, 4, 7, 63, 64, 511, 513, bytes.count / 2 + 1, bytes.count - 1, bytes.count - 511]
        for length in Array(stride(from: 0, to: bytes.count, by: 512)) + odd where length < bytes.count {
            attempt("ends after \(length) of \(bytes.count) bytes", bytes.prefixArray(length))
        }
    }

    /// Huge tables in files that are long and empty; tables and clusters in common.
    func absurdTables() {
        for features in [0, 2] as [UInt64] {
            for (cluster, table) in [(1 << 26, 16), (1 << 26, 1), (4096, 1), (4096, 16), (1 << 20, 16)]
                as [(UInt64, UInt64)]
            {
                var builder = QEDBuilder(imageSize: 512, clusterCount: 1)
                builder.features = features
                var header = builder.encode()
                header = header.setting(cluster, at: 4, width: 4).setting(table, at: 8, width: 4)
                header = header.setting(cluster, at: 40, width: 8)
                let entries = cluster * table / 8
                let (span, overflow) = (entries * entries).multipliedReportingOverflow(by: cluster)
                header = header.setting(min(overflow ? 1 << 62 : span, 1 << 62), at: 48, width: 8)
                for shift in [38, 43, 44] as [UInt64] {
                    attempt("\(cluster), \(table), features \(features), 2^\(shift) bytes", header, length: 1 << shift)
                }
            }
            attempt("tables in common", manyTables(features, of: 1, inCommon: true))
            attempt("tables that overlap", manyTables(features, of: 2, inCommon: false))
        }
    }

    /// A whole L1 table of a mebibyte, all of whose entries lead to one L2 table, or to tables that overlap, which are
    /// full of one entry.
    private func manyTables(_ features: UInt64, of tableSize: UInt64, inCommon: Bool) -> [UInt8] {
        var builder = QEDBuilder(imageSize: 1 << 40, clusterCount: 1 + 3 * tableSize)
        (builder.clusterSize, builder.tableSize, builder.features) = (1 << 20, tableSize, features)
        let first = 1 + tableSize
        for index in 0..<(tableSize << 17) { builder.l1[index] = first + (inCommon ? 0 : index % tableSize) }
        builder.l2[first] = Dictionary(uniqueKeysWithValues: (0..<1 << 17).map { ($0, first << 20) })
        return builder.encode()
    }
}

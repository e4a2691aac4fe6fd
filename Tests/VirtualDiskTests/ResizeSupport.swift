import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// An image whose disk gets other sizes, and what it must hold.
struct ResizedImage {
    /// A format, and how its image is made.
    struct Case: Sendable, CustomTestStringConvertible {
        let row: FormatRow
        let making: FormatRow.Making
        /// How a child is made over it; nil: the usual way, with blocks as large.
        var child: FormatRow.Making?
        var testDescription: String {
            [making, child].compactMap { $0 }.map {
                FormatMatrixTests.Case(row: row, making: $0, peerOptions: "").testDescription
            }.joined(separator: " under ")
        }

        /// Whether all of the disk takes space in the file.
        var isFlat: Bool {
            row.format == "raw" || ["fixed", "split-fixed", "esx"].contains(making.variant) && row.format != "qcow2"
        }
    }

    /// All formats whose disks get other sizes.
    static let rows = FormatRow.all.filter { row in
        ImageFormats.all.contains { $0.name == row.format && $0.capabilities.contains("resize") }
    }

    /// A format's parents, and children over them.
    static func chains(of row: FormatRow) -> [Case] {
        guard row.child != nil, let usual = row.ours.first else { return [] }
        return [Case(row: row, making: usual), Case(row: row, making: row.dense)]
            + row.otherChildren.map { Case(row: row, making: usual, child: $0) }
    }

    static let cases = rows.flatMap { row in row.ours.map { Case(row: row, making: $0) } }

    static let pool = RandomPool(seed: 11)

    let row: FormatRow
    let folder: TemporaryFolder
    let path: String
    var below: [FormatRow] = []
    var model: DiskModel

    /// Makes an image with random content in parts of it; as a child of an image of another size, if that is given.
    init(
        _ test: Case, in folder: TemporaryFolder, size: Int, parentSize: Int? = nil,
        using generator: inout SeededGenerator
    ) throws {
        row = test.row
        self.folder = folder
        model = DiskModel(size: parentSize ?? size)
        var base = NewImage(path: folder.file(row.file(parentSize == nil ? "top" : "base")))
        base.size = UInt64(parentSize ?? size)
        (base.variant, base.blockSize, base.options) = (test.making.variant, test.making.blockSize, test.making.options)
        try base.create()
        try Self.fill(base.path, row, &model, using: &generator)
        guard parentSize != nil, let child = test.child ?? row.child else {
            path = base.path
            return
        }
        var top = NewImage(path: folder.file(row.file("top")))
        (top.variant, top.blockSize, top.options) = (child.variant, child.blockSize, child.options)
        if test.child == nil, test.making.variant == nil { top.blockSize = test.making.blockSize }
        (top.parent, top.size) = (base.path, UInt64(size))
        try top.create()
        model = model.resized(to: size)
        below = [row]
        path = top.path
        try Self.fill(path, row, &model, pieces: 3, using: &generator)
    }

    private static func fill(
        _ path: String, _ row: FormatRow, _ model: inout DiskModel, pieces: Int = 8,
        using generator: inout SeededGenerator
    ) throws {
        let disk = try Disk.open(path, options: row.options(isWritable: true))
        let size = model.size
        for number in 0..<pieces {
            // The last one ends with the disk.
            let count = Int.random(in: 1...min(200_000, size), using: &generator)
            let start = number == 0 ? size - count : Int.random(in: 0...size - count, using: &generator)
            let bytes = pool.bytes(count, using: &generator)
            try disk.write(bytes, at: UInt64(start))
            model.write(bytes, at: start)
        }
        try disk.close()
    }

    /// Gives the disk another size.
    mutating func resize(to size: Int, discardsData: Bool = false) throws {
        var resize = ImageResize(path: path, size: .exactly(UInt64(size)), options: row.options(isWritable: true))
        resize.allowsShrinking = true
        resize.discardsData = discardsData
        let outcome = try resize.run()
        #expect(outcome.oldSize == UInt64(model.size) && outcome.newSize == UInt64(size))
        model = model.resized(to: size)
    }

    mutating func write(_ count: Int, at offset: Int, using generator: inout SeededGenerator) throws {
        let bytes = Self.pool.bytes(count, using: &generator)
        let disk = try Disk.open(path, options: row.options(isWritable: true))
        try disk.write(bytes, at: UInt64(offset))
        try disk.close()
        model.write(bytes, at: offset)
    }

    /// Makes the disk's end zeros, from `start` on.
    mutating func discard(from start: Int) throws {
        let disk = try Disk.open(path, options: row.options(isWritable: true))
        try disk.discard(offset: UInt64(start), length: UInt64(model.size - start))
        try disk.close()
        model.zero(start..<model.size)
    }

    /// We and everybody who can read the image find what it must hold, and nothing wrong with it.
    func expectSound(_ context: String, judges: Bool = true) throws {
        let disk = try Disk.open(path, options: row.options(isWritable: false))
        #expect(disk.size == UInt64(model.size), "\(context)")
        if disk.size == UInt64(model.size), let mistake = try model.mistake(of: disk, in: 0..<model.size) {
            Issue.record("\(context): \(mistake)")
        }
        try disk.close()
        let report = try ImageCheck.run(path, options: row.options(isWritable: false))
        #expect(
            report.remaining(.loss) + report.remaining(.repairable) == 0, "\(context): \(report.findings.prefix(3))")
        guard judges else { return }
        do {
            _ = try Judge.compare(row, path, over: below, with: model, in: folder)
        } catch {
            Issue.record("\(context): \(error)")
        }
    }
}

extension TemporaryFolder {
    /// Makes files what they were, as ``snapshotOfAll()`` told.
    func restore(_ files: [String: [UInt8]]) throws {
        for (name, bytes) in files {
            unsafe unlink(file(name))
            try write(bytes, to: name)
        }
    }
}

/// Ends the process before a change or flush of any file, as nothing else does.
final class KillCountdown: Sendable {
    private let left: Locked<Int>

    /// - Parameter count: How many changes may still happen.
    init(_ count: Int) { left = Locked(count) }

    func wrap(_ storage: any Storage) -> any Storage {
        ObservedStorage(storage) { [self] (access) throws(DiskError) in if access.isChange { step() } }
    }

    private func step() {
        let isOver = left.withLock { left in
            left -= 1
            return left < 0
        }
        if isOver { kill(getpid(), SIGKILL) }
    }
}

import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// `DiskComparison` beside byte arrays and beside qemu-img.
struct DiskComparisonTests {
    private static let size = 3 << 20
    private static let pool = RandomPool(seed: 21)

    /// An image with the model's bytes.
    private static func make(
        _ row: FormatRow, _ making: FormatRow.Making, _ name: String, _ model: DiskModel, in folder: TemporaryFolder
    ) throws -> String {
        var image = NewImage(path: folder.file(row.file(name)))
        (image.size, image.variant, image.blockSize) = (UInt64(model.size), making.variant, making.blockSize)
        try image.create()
        let disk = try Disk.open(image.path, options: row.options(isWritable: true))
        var position = 0
        while position < model.size {
            let piece = model.bytes.slice(position, min(65_536, model.size - position))
            if piece.contains(where: { $0 != 0 }) { try disk.write(piece, at: UInt64(position)) }
            position += piece.count
        }
        try disk.close()
        return image.path
    }

    private static func compare(
        _ a: String, _ aRow: FormatRow, _ b: String, _ bRow: FormatRow,
        _ change: (inout DiskComparison.Options) -> Void = { _ in }
    ) throws -> DiskComparison {
        var options = DiskComparison.Options()
        change(&options)
        let first = try Disk.open(a, options: aRow.options(isWritable: false))
        let second = try Disk.open(b, options: bRow.options(isWritable: false))
        let result = try DiskComparison.run(first, second, options: options)
        try first.close()
        try second.close()
        return result
    }

    private static func content(_ size: Int, _ generator: inout SeededGenerator) -> DiskModel {
        var model = DiskModel(size: size)
        for _ in 0..<5 {
            let start = Int.random(in: 0..<size, using: &generator)
            model.write(pool.bytes(min(size - start, 150_000), using: &generator), at: start)
        }
        return model
    }

    static let rows = FormatRow.all.filter { !$0.ours.isEmpty }

    /// Each format against raw: equal, and then with single bytes changed.
    @Test(arguments: rows) func everyFormatAgainstRaw(_ row: FormatRow) throws {
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        var model = Self.content(Self.size, &generator)
        let image = try Self.make(row, row.ours[0], "image", model, in: folder)
        let copy = try Self.make(raw, .init(), "copy", model, in: folder)
        #expect(try Self.compare(image, row, copy, raw).isEqual, "seed \(seed)")
        var changed: Set<Int> = []
        for _ in 0..<4 {
            let place = Int.random(in: 0..<Self.size, using: &generator)
            guard changed.insert(place).inserted else { continue }
            model.write([model.bytes[place] &+ 1], at: place)
            let disk = try Disk.open(copy, options: raw.options(isWritable: true))
            try disk.write([model.bytes[place]], at: UInt64(place))
            try disk.close()
            let found = try Self.compare(image, row, copy, raw)
            #expect(found.firstDifference == UInt64(changed.min() ?? 0), "seed \(seed)")
            let all = try Self.compare(copy, raw, image, row) { $0.findsAll = true }
            let sectors = Set(changed.map { $0 / 512 })
            #expect(all.differingBytes == UInt64(sectors.count * 512) && all.furtherRanges == 0, "seed \(seed)")
            #expect(
                changed.allSatisfy { place in all.ranges.contains { $0.range.contains(UInt64(place)) } }, "seed \(seed)"
            )
            guard let peer = row.peer else { continue }
            let judge = try Subprocess.run(["qemu-img", "compare", "-f", peer, "-F", "raw", image, copy])
            #expect(judge.status == 1, "seed \(seed)")
        }
    }

    /// The longer disk's rest must be zeros; strict, there must be none.
    @Test func sizesDiffer() throws {
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        let vmdk = try #require(FormatRow.all.first { $0.format == "vmdk" })
        var generator = SeededGenerator(seed: 4)
        let folder = try TemporaryFolder()
        let model = Self.content(Self.size, &generator)
        let short = try Self.make(raw, .init(), "short", model, in: folder)
        let long = try Self.make(vmdk, .init(), "long", model.resized(to: Self.size + 70_144), in: folder)
        for (a, aRow, b, bRow) in [(short, raw, long, vmdk), (long, vmdk, short, raw)] {
            #expect(try Self.compare(a, aRow, b, bRow).isEqual)
            let strict = try Self.compare(a, aRow, b, bRow) { $0.isStrict = true }
            #expect(!strict.isEqual && !strict.hasAcceptedSizes)
        }
        let disk = try Disk.open(long, options: vmdk.options(isWritable: true))
        try disk.write([1], at: UInt64(Self.size) + 70_143)
        try disk.close()
        for (a, aRow, b, bRow) in [(short, raw, long, vmdk), (long, vmdk, short, raw)] {
            #expect(try Self.compare(a, aRow, b, bRow).firstDifference == UInt64(Self.size) + 70_143)
        }
    }

    /// Strictly, zeros that are stored are not the same as zeros that are not.
    @Test func allocationDiffers() throws {
        let vmdk = try #require(FormatRow.all.first { $0.format == "vmdk" })
        let folder = try TemporaryFolder()
        var paths: [String] = []
        for name in ["a", "b"] {
            var image = NewImage(path: folder.file("\(name).vmdk"))
            image.size = 1 << 20
            try image.create()
            let disk = try Disk.open(image.path, options: vmdk.options(isWritable: true))
            try disk.write([UInt8](repeating: 9, count: 65_536), at: 0)
            if name == "b" { try disk.write([UInt8](repeating: 0, count: 512), at: 262_144) }
            try disk.close()
            paths.append(image.path)
        }
        #expect(try Self.compare(paths[0], vmdk, paths[1], vmdk).isEqual)
        let strict = try Self.compare(paths[0], vmdk, paths[1], vmdk) { options in
            options.isStrict = true
            options.findsAll = true
        }
        #expect(strict.ranges.map(\.range) == [262_144..<327_680] && strict.ranges[0].difference == .allocation)
        #expect(try Subprocess.run(["qemu-img", "compare", "-q", "-s", paths[0], paths[1]]).status == 1)
    }

    /// What two snapshots have of one base is not read, whether it is compressed or not.
    @Test(arguments: ["vmdk", "qcow2"]) func sharedParentIsNotRead(_ format: String) throws {
        let row = try #require(FormatRow.all.first { $0.format == format })
        var generator = SeededGenerator(seed: 5)
        let folder = try TemporaryFolder()
        let model = DiskModel(size: Self.size)
        var base = try Self.make(row, row.ours[0], "whole", model.filled(Self.pool, &generator), in: folder)
        if format == "qcow2" {
            let packed = folder.file("packed.qcow2")
            try Peer.run("qemu-img", "convert", "-c", "-O", "qcow2", base, packed)
            base = packed
        }
        var paths: [String] = []
        for name in ["left", "right"] {
            var child = NewImage(path: folder.file("\(name).\(format)"))
            child.parent = base
            try child.create()
            let disk = try Disk.open(child.path, options: row.options(isWritable: true))
            try disk.write([UInt8](repeating: 5, count: 65_536), at: 1 << 20)
            if name == "right" { try disk.write([1, 2, 3], at: 2 << 20) }
            try disk.close()
            paths.append(child.path)
        }
        let reads = Locked<[String: Int]>([:])
        var options = DiskOptions()
        options.wrapStorage = { storage in
            ObservedStorage(storage, tellsFile: true) { (access) throws(DiskError) in
                guard case .read(_, let count, .guestData) = access else { return }
                reads.withLock { $0[storage.name, default: 0] += count }
            }
        }
        let first = try Disk.open(paths[0], options: options)
        let second = try Disk.open(paths[1], options: options)
        reads.withLock { $0 = [:] }
        var wanted = DiskComparison.Options()
        wanted.findsAll = true
        let result = try DiskComparison.run(first, second, options: wanted)
        let changed: UInt64 = 2 << 20
        #expect(result.ranges.map(\.range) == [changed..<changed + 512])
        let counts = reads.withLock { $0 }
        // (One side of the place where the other holds a block of its own.)
        #expect((counts[base] ?? 0) <= 65_536, "\(counts)")
        #expect((counts[paths[0]] ?? 0) <= 65_536, "\(counts)")
        try first.close()
        try second.close()
    }

    @Test func stopsWhenAsked() throws {
        let raw = try #require(FormatRow.all.first { $0.format == "raw" })
        var generator = SeededGenerator(seed: 6)
        let folder = try TemporaryFolder()
        let model = DiskModel(size: 8 << 20).filled(Self.pool, &generator)
        let a = try Self.make(raw, .init(), "a", model, in: folder)
        let b = try Self.make(raw, .init(), "b", model, in: folder)
        let first = try Disk.open(a, options: raw.options(isWritable: false))
        let second = try Disk.open(b, options: raw.options(isWritable: false))
        let stopped = Locked<OperationControl?>(nil)
        let control = OperationControl { progress in
            if progress.done > 0 { stopped.withLock { $0 }?.cancel() }
        }
        stopped.withLock { $0 = control }
        #expect { try DiskComparison.run(first, second, control: control) } throws: { error in
            (error as? DiskError)?.kind == .cancelled
        }
        #expect(control.progress.done > 0 && control.progress.done < 8 << 20)
    }
}

extension DiskModel {
    /// The same with random bytes everywhere.
    fileprivate func filled(_ pool: RandomPool, _ generator: inout SeededGenerator) -> DiskModel {
        var result = self
        var start = 0
        while start < size {
            let count = min(100_000, size - start)
            result.write(pool.bytes(count, using: &generator), at: start)
            start += count
        }
        return result
    }
}

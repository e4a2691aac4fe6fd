import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Where data and holes begin: the same as the map of the disk and the files' own holes say, and found quickly.
struct SeekTests {
    /// The runs of a disk that may hold data, by its extents and the holes of its files.
    private static func dataRuns(_ disk: Disk) throws -> [Range<UInt64>] {
        var runs: [Range<UInt64>] = []
        func add(_ run: Range<UInt64>) {
            if let last = runs.last, last.upperBound == run.lowerBound {
                runs[runs.count - 1] = last.lowerBound..<run.upperBound
            } else {
                runs.append(run)
            }
        }
        // In pieces as short as requests, for which every entry is looked at.
        var extents: [DiskExtent] = []
        for start in stride(from: 0, to: disk.size, by: 8 << 20) {
            let length = min(8 << 20, disk.size - start)
            try disk.forEachExtent(offset: start, length: length) { (extent) throws(DiskError) in
                extents.append(extent)
                return true
            }
        }
        for extent in extents where extent.isAllocated {
            guard case .data(_, let path, let place) = extent.source else {
                add(extent.offset..<extent.offset + extent.length)
                continue
            }
            let file = try FileStorage(path: path, isWritable: false)
            var position = place
            while let data = try file.nextData(from: position), data.lowerBound < place + extent.length {
                let end = min(data.upperBound, place + extent.length)
                add(extent.offset + data.lowerBound - place..<extent.offset + end - place)
                position = end
                if position == place + extent.length { break }
            }
        }
        return runs
    }

    /// Every answer, from offsets in any order, is what `runs` says.
    private static func expect(
        _ disk: Disk, _ runs: [Range<UInt64>], _ context: String, using generator: inout SeededGenerator
    ) throws {
        for _ in 0..<300 {
            var offset = UInt64.random(in: 0..<disk.size, using: &generator)
            if Bool.random(using: &generator), let run = runs.randomElement(using: &generator) {
                let edge = Bool.random(using: &generator) ? run.lowerBound : run.upperBound
                offset = min(disk.size - 1, edge + UInt64.random(in: 0...2, using: &generator) - min(edge, 1))
            }
            let run = runs.first { $0.upperBound > offset }
            let data = run.map { max(offset, $0.lowerBound) }
            let hole = run.map { $0.contains(offset) ? $0.upperBound : offset } ?? offset
            let foundData = try disk.nextData(from: offset)
            let foundHole = try disk.nextHole(from: offset)
            #expect(foundData == data, "\(context): data from \(offset)")
            #expect(foundHole == hole, "\(context): hole from \(offset)")
            guard foundData == data, foundHole == hole else { return }
        }
        #expect(try disk.nextData(from: disk.size) == nil)
        #expect(try disk.nextHole(from: disk.size) == disk.size)
    }

    /// A chain over a raw base with holes: dynamic, split, and grains of zeros in between.
    private static func makeChain(_ folder: TemporaryFolder, using generator: inout SeededGenerator) throws -> String {
        let base = try FileStorage(creating: folder.file("base.raw"))
        try base.setLength(600 << 20)
        for _ in 0..<40 {
            let offset = UInt64.random(in: 0..<599 << 20, using: &generator) & ~511
            try base.write([UInt8](repeating: 3, count: 5000), at: offset, for: .guestData)
        }
        var parent = folder.file("base.raw")
        for (number, variant) in ["dynamic", "split", "dynamic", "dynamic"].enumerated() {
            var image = NewImage(path: folder.file("\(number).vmdk"))
            image.parent = parent
            image.parentFormat = number == 0 ? "raw" : "vmdk"
            image.variant = variant
            image.options = number == 2 ? ["zeroed-grain": "on"] : [:]
            if variant == "split" { image.options["split-size"] = "100M" }
            try image.create()
            let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true))
            for _ in 0..<20 where number < 3 {
                let offset = UInt64.random(in: 0..<580 << 20, using: &generator)
                try disk.write([UInt8](repeating: 4, count: 70_000), at: offset)
                try disk.discard(
                    offset: UInt64.random(in: 0..<580 << 20, using: &generator) & ~65_535, length: 6 << 20)
            }
            try disk.close()
            parent = image.path
        }
        return parent
    }

    @Test(arguments: [1, 2, 3] as [UInt64]) func answersAreTheMaps(seed: UInt64) throws {
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let path = try Self.makeChain(folder, using: &generator)
        let readOnly = try Disk.open(path)
        try Self.expect(readOnly, try Self.dataRuns(readOnly), "seed \(seed), read-only", using: &generator)
        try readOnly.close()
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try Self.expect(disk, try Self.dataRuns(disk), "seed \(seed), not written yet", using: &generator)
        for round in 0..<5 {
            for _ in 0..<10 {
                let offset = UInt64.random(in: 0..<590 << 20, using: &generator)
                try disk.write([UInt8](repeating: 5, count: 100), at: offset)
                try disk.discard(offset: UInt64.random(in: 0..<590 << 20, using: &generator), length: 1 << 20)
            }
            let context = "seed \(seed), round \(round)"
            try Self.expect(disk, try Self.dataRuns(disk), context, using: &generator)
        }
        try disk.close()
    }

    /// The processor's time that this thread has taken.
    private static var seconds: Double {
        var time = timespec()
        unsafe clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }

    /// A hole that was found before is not remembered over a write into it.
    @Test(arguments: ["vmdk", "raw"]) func writesEndHoles(format: String) throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.\(format)"))
        image.size = 10 << 30
        try image.create()
        let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true, format: format))
        #expect(try disk.nextData(from: 0) == nil)
        #expect(try disk.nextData(from: 5 << 30) == nil)
        try disk.write([1], at: 7 << 30)
        #expect(try disk.nextData(from: 0) == 7 << 30)
        #expect(try disk.nextHole(from: 7 << 30) > 7 << 30)
        try disk.write([1], at: 3 << 30)
        #expect(try disk.nextData(from: 0) == 3 << 30)
        try disk.discard(offset: 3 << 30, length: 65_536)
        #expect(try disk.nextData(from: 0) == 7 << 30)
        #expect(try disk.nextData(from: 8 << 30) == nil)
        try disk.write([1], at: 9 << 30)
        #expect(try disk.nextData(from: 8 << 30) == 9 << 30)
        try disk.close()
    }

    /// Who has written finds it, whatever others have searched for meanwhile.
    @Test(arguments: ["vmdk", "raw"]) func whatWasWrittenIsFoundBesideOtherSearches(format: String) throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.\(format)"))
        image.size = 1 << 30
        try image.create()
        let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true, format: format))
        let mistakes = Locked(0)
        onThreads(4) { thread in
            for round in 0..<1000 as Range<UInt64> {
                let offset = (round * 4 + UInt64(thread)) << 17
                do throws(DiskError) {
                    _ = try disk.nextData(from: offset)
                    try disk.write([1], at: offset)
                    guard try disk.nextData(from: offset) != offset else { continue }
                } catch {}
                mistakes.withLock { $0 += 1 }
            }
        }
        #expect(mistakes.withLock { $0 } == 0)
        try disk.close()
    }

    /// Eight empty snapshots of a disk of almost 2 TiB, whose tables are all there: once an answer took as long as to
    /// look at 260 million entries, and so did the next one, a buffer further on.
    @Test(arguments: [true, false]) func hugeEmptyChainIsPassedOverAtOnce(isWritable: Bool) throws {
        let folder = try TemporaryFolder()
        for number in 0..<8 {
            var image = NewImage(path: folder.file("\(number).vmdk"))
            image.size = 2040 << 30
            if number > 0 { image.parent = folder.file("\(number - 1).vmdk") }
            try image.create()
        }
        let disk = try Disk.open(folder.file("7.vmdk"), options: DiskOptions(isWritable: isWritable))
        if isWritable { try disk.write([1], at: 0) }
        let start = Self.seconds
        #expect(try disk.nextData(from: 1 << 20) == nil)
        for number in 1..<1000 as Range<UInt64> {
            #expect(try disk.nextData(from: number << 30) == nil)
        }
        // No measure of speed: going through the tables each time takes many minutes.
        let time = Self.seconds - start
        #expect(time < 30, "a thousand answers took \(time) s")
        try disk.close()
    }

    /// A search pays for the way to what it finds, not for the holes of upper layers behind it.
    @Test func dataBelowEmptySnapshotsIsFoundAtOnce() throws {
        let folder = try TemporaryFolder()
        let base = try FileStorage(creating: folder.file("base.raw"))
        try base.setLength(1 << 40)
        for number in 0..<1000 as Range<UInt64> { try base.write([1], at: number << 30, for: .guestData) }
        var image = NewImage(path: folder.file("disk.vmdk"))
        image.parent = folder.file("base.raw")
        image.parentFormat = "raw"
        try image.create()
        let disk = try Disk.open(image.path)
        let start = Self.seconds
        for number in 0..<999 as Range<UInt64> {
            #expect(try disk.nextData(from: number << 30 + 65_536) == (number + 1) << 30)
        }
        let time = Self.seconds - start
        #expect(time < 30, "a thousand answers took \(time) s")
        try disk.close()
    }

    /// Blocks in any order, all in a hole of the file: a search stops on its way, and the next ones get through.
    @Test func manyBlocksInAHole() throws {
        let folder = try TemporaryFolder()
        let count = 1 << 20
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = UInt64(count) << 20
        try image.create()
        let file = try FileStorage(path: image.path, isWritable: true)
        let header = FieldReader(try file.bytes(at: 0, count: 512, for: .header, "the header"))
        let map: UInt32 = try header.littleEndian(at: 340)
        let data: UInt32 = try header.littleEndian(at: 344)
        var entries = FieldWriter(count: count * 4)
        for block in 0..<count { entries.littleEndian(UInt32(count - 1 - block), at: block * 4) }
        try file.write(entries.bytes, at: UInt64(map), for: .table)
        var allocated = FieldWriter(count: 4)
        allocated.littleEndian(UInt32(count), at: 0)
        try file.write(allocated.bytes, at: 388, for: .header)
        try file.setLength(UInt64(data) + UInt64(count) << 20)
        // One block in the middle is there.
        try file.write([7], at: UInt64(data) + UInt64(count / 2) << 20, for: .guestData)
        let disk = try Disk.open(image.path)
        var position: UInt64 = 0
        var searches = 0
        var runs: [Range<UInt64>] = []
        while let start = try disk.nextData(from: position) {
            let end = try disk.nextHole(from: start)
            #expect(start > position || searches == 0)
            if end > start { runs.append(start..<end) }
            position = max(end, start)
            searches += 1
            try #require(searches < 20)
        }
        let place = UInt64(count / 2 - 1) << 20
        #expect(runs == [place..<place + 4096])
        #expect(searches > 2, "none of them stopped on its way")
        try disk.close()
    }
}

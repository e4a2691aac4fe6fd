import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// What is discarded makes the file shorter: the last blocks move into the holes, also under readers. VirtualBox's own
/// test of this (tstVDDiscard) is among these.
struct VDIDiscardTests {
    private static let block = 64 << 10

    private func make(_ folder: TemporaryFolder, blocks: Int, over parent: String? = nil) throws -> (String, DiskModel)
    {
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = UInt64(blocks * Self.block)
        image.blockSize = UInt64(Self.block)
        image.parent = parent
        try image.create()
        var model = DiskModel(size: blocks * Self.block)
        var generator = SeededGenerator(seed: 11)
        let disk = try open(image.path)
        for number in Array(0..<blocks).shuffled(using: &generator) {
            let data = ConformanceTests.pool.bytes(Self.block, using: &generator)
            try disk.write(data, at: UInt64(number * Self.block))
            model.write(data, at: number * Self.block)
        }
        try disk.close()
        return (image.path, model)
    }

    private func open(_ path: String) throws -> Disk {
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        return try Disk.open(path, options: options)
    }

    /// How many blocks the file has room for.
    private func places(_ path: String) throws -> Int {
        (Int(try FileStorage(path: path, isWritable: false).length()) - (2 << 20)) / Self.block
    }

    private func expectSound(_ path: String, _ model: DiskModel, allocated: Int, in folder: TemporaryFolder) throws {
        #expect(try places(path) == allocated)
        try VDIReader.check(path)
        #expect(try VDIReader.flatten(path, in: folder) == model.bytes)
        #expect(try ImageCheck.run(path).findings.isEmpty)
    }

    /// Half a block of twelve; the other half of some, in one piece or several; a piece; a whole block.
    @Test func fileShrinksWhenABlockBecomesFree() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try make(folder, blocks: 40)
        let disk = try open(path)
        func discard(_ block: Int, _ offset: Int, _ count: Int) throws {
            try disk.discard(offset: UInt64(block * Self.block + offset), length: UInt64(count))
            model.zero(block * Self.block + offset..<block * Self.block + offset + count)
        }
        let half = Self.block / 2
        for number in 0..<12 { try discard(number * 3, number % 2 * half, half) }
        try disk.flush()
        #expect(try places(path) == 40)
        // The other halves of two blocks.
        try discard(0, half, half)
        try discard(3, 0, half)
        try disk.flush()
        #expect(try places(path) == 38)
        // The rest of one, piece by piece.
        for piece in 0..<4 { try discard(6, half + piece * half / 4, half / 4) }
        try disk.flush()
        #expect(try places(path) == 37)
        // A piece that leaves something, and whole blocks.
        try discard(20, 4096, 8192)
        try discard(21, 0, Self.block)
        try discard(39, 0, Self.block)
        try disk.flush()
        #expect(try places(path) == 35)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
        try expectSound(path, model, allocated: 35, in: folder)
    }

    /// Everything is discarded, in random order, and written again.
    @Test func everythingGoesAndComesBack() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try make(folder, blocks: 64)
        var generator = SeededGenerator(seed: 4)
        var disk = try open(path)
        for (number, block) in Array(0..<64).shuffled(using: &generator).enumerated() {
            try disk.discard(offset: UInt64(block * Self.block), length: UInt64(Self.block))
            model.zero(block * Self.block..<(block + 1) * Self.block)
            if number % 5 == 4 {
                try disk.flush()
                #expect(try places(path) == 63 - number)
            }
        }
        try disk.close()
        try expectSound(path, model, allocated: 0, in: folder)
        disk = try open(path)
        try disk.write([1], at: UInt64(63 * Self.block))
        model.write([1], at: 63 * Self.block)
        try disk.close()
        try expectSound(path, model, allocated: 1, in: folder)
    }

    /// Freed places are used again before the file grows, also when every block of the disk is allocated.
    @Test func freedPlacesAreUsedAgain() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try make(folder, blocks: 32)
        let disk = try open(path)
        var generator = SeededGenerator(seed: 5)
        for _ in 0..<200 {
            let block = Int.random(in: 0..<32, using: &generator)
            try disk.discard(offset: UInt64(block * Self.block), length: UInt64(Self.block))
            let data = ConformanceTests.pool.bytes(Self.block, using: &generator)
            try disk.write(data, at: UInt64(block * Self.block))
            model.write(data, at: block * Self.block)
            #expect(try places(path) <= 32)
        }
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
        try expectSound(path, model, allocated: 32, in: folder)
    }

    /// A parent's data is masked by entries that say zeros, in a file that holds nothing.
    @Test func zeroEntriesMaskTheParent() throws {
        let folder = try TemporaryFolder()
        let (made, _) = try make(folder, blocks: 16)
        try Peer.run("mv", made, folder.file("base.vdi"))
        let base = folder.file("base.vdi")
        var child = NewImage(path: folder.file("disk.vdi"))
        child.parent = base
        child.blockSize = UInt64(Self.block)
        try child.create()
        var model = DiskModel(size: 16 * Self.block)
        var disk = try open(child.path)
        model.write(try disk.read(at: 0, count: model.size), at: 0)
        try disk.discard(offset: UInt64(3 * Self.block), length: UInt64(4 * Self.block))
        model.zero(3 * Self.block..<7 * Self.block)
        // Whole blocks of zeros that are written are such entries too; what is no whole block is data.
        try disk.write([UInt8](repeating: 0, count: 2 * Self.block + 512), at: UInt64(9 * Self.block))
        model.zero(9 * Self.block..<11 * Self.block + 512)
        try disk.close()
        try expectSound(child.path, model, allocated: 1, in: folder)
        let fields = try VDIReader.fields(child.path)
        #expect(fields["zero"] == "6" && fields["free"] == "9")
        // And they stay what they are.
        disk = try open(child.path)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.write([5], at: UInt64(4 * Self.block + 7))
        model.write([5], at: 4 * Self.block + 7)
        try disk.close()
        try expectSound(child.path, model, allocated: 2, in: folder)
    }

    /// In a base nothing lies below: what is zeros is free.
    @Test func zerosOfABaseTakeNoSpace() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try make(folder, blocks: 8)
        var image = NewImage(path: folder.file("empty.vdi"))
        image.size = 8 << 20
        try image.create()
        var disk = try open(image.path)
        try disk.write([UInt8](repeating: 0, count: 8 << 20), at: 0)
        try disk.close()
        #expect(try VDIReader.fields(image.path)["allocated"] == "0")
        disk = try open(path)
        try disk.discard(offset: 0, length: disk.size)
        model.zero(0..<model.size)
        try disk.close()
        try expectSound(path, model, allocated: 0, in: folder)
    }

    /// A fixed image stays what it is, and gives back the space of its file.
    @Test func fixedImagesKeepTheirBlocks() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = 8 << 20
        image.variant = "fixed"
        try image.create()
        let disk = try open(image.path)
        try disk.write([UInt8](repeating: 1, count: 8 << 20), at: 0)
        try disk.flush()
        let file = try FileStorage(path: image.path, isWritable: false)
        let before = try file.allocatedBytes()
        try disk.discard(offset: 1 << 20, length: 6 << 20)
        try disk.close()
        #expect(try file.allocatedBytes() <= before - (6 << 20))
        #expect(try VDIReader.fields(image.path)["allocated"] == "8")
        try VDIReader.check(image.path)
        try Peer.run("qemu-img", "check", "-q", "-f", "vdi", image.path)
    }

    /// Readers and writers of all blocks, while blocks are discarded, written again, and moved by flushes: nobody sees
    /// what is not the block's own.
    @Test func blocksMoveUnderReaders() throws {
        let folder = try TemporaryFolder()
        let blocks = 48
        let (path, _) = try make(folder, blocks: blocks)
        let disk = try open(path)
        @Sendable func content(_ block: Int, _ version: UInt8) -> [UInt8] {
            [UInt8](repeating: UInt8(block) << 2 | version & 3, count: Self.block)
        }
        for number in 0..<blocks { try disk.write(content(number, 0), at: UInt64(number * Self.block)) }
        let problems = Locked<[String]>([])
        let rounds = 400
        onThreads(5) { thread in
            var generator = SeededGenerator(seed: UInt64(thread) + 77)
            do throws(DiskError) {
                for round in 0..<rounds {
                    let number = Int.random(in: 0..<blocks, using: &generator)
                    let offset = UInt64(number * Self.block)
                    switch thread {
                    case 0:
                        // Discards blocks of its own, and makes others fill the holes.
                        let own = UInt64(number / 4 * 4 * Self.block)
                        try disk.discard(offset: own, length: UInt64(Self.block))
                        try disk.flush()
                    case 1:
                        try disk.write(content(number, UInt8(round % 4)), at: offset)
                    default:
                        let seen = try disk.read(at: offset, count: Self.block)
                        let isOwn = seen.allSatisfy { $0 == 0 && number % 4 == 0 || $0 >> 2 == UInt8(number) }
                        if !isOwn { problems.withLock { $0.append("block \(number): \(seen[0])") } }
                    }
                }
            } catch {
                problems.withLock { $0.append("\(error)") }
            }
        }
        #expect(problems.withLock { $0.prefix(5) } == [])
        let final = try disk.read(at: 0, count: blocks * Self.block)
        try disk.close()
        try VDIReader.check(path)
        #expect(try VDIReader.flatten(path, in: folder) == final)
    }

    /// Blocks that hold little take little space where they move to.
    @Test func movedBlocksStaySparse() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = 64 << 20
        try image.create()
        let disk = try open(image.path)
        for number in 0..<64 as Range<UInt64> { try disk.write([UInt8](repeating: 3, count: 4096), at: number << 20) }
        try disk.flush()
        try disk.discard(offset: 0, length: 32 << 20)
        try disk.close()
        let file = try FileStorage(path: image.path, isWritable: false)
        #expect(try file.length() == 34 << 20)
        #expect(try file.allocatedBytes() < 8 << 20)
    }

    /// Memory that is lost in a crash, places that nothing leads to, is found when the image is opened for writing.
    @Test func leakedPlacesAreUsedAgain() throws {
        let folder = try TemporaryFolder()
        var (path, model) = try make(folder, blocks: 16)
        // As a crash leaves it: entries 2, 7 and 15 never reached the disk.
        let file = try FileStorage(path: path, isWritable: true)
        for block in [2, 7, 15] {
            try file.write([0xff, 0xff, 0xff, 0xff], at: UInt64(1 << 20 + block * 4), for: .table)
            model.zero(block * Self.block..<(block + 1) * Self.block)
        }
        #expect(try ImageCheck.run(path).remaining(.leak) > 0)
        let before = try folder.read("disk.vdi")
        // Opened for writing, and nothing written: nothing changes.
        try open(path).close()
        #expect(try folder.read("disk.vdi") == before)
        let disk = try open(path)
        try disk.write([1, 2, 3], at: UInt64(2 * Self.block + 9))
        model.write([1, 2, 3], at: 2 * Self.block + 9)
        try disk.close()
        try expectSound(path, model, allocated: 14, in: folder)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Whatever the size and fill of an image, its mapping tables stay within the cache that they were given, and nothing
/// else grows with them: in any format, while it is written, read, searched, discarded from, checked and repaired.
struct MemoryBoundTests {
    private static let size: UInt64 = 4 << 30
    private static let cacheSize = 512 << 10
    /// What an opened disk may take in all: the cache and the bits of a check.
    private static let limit = 24 << 20
    /// One write a mebibyte: an entry in every page of the tables, with blocks of 4 KiB.
    private static let step: UInt64 = 1 << 20

    static let formats = FormatRow.all.filter(\.isWritable).map(\.format)

    /// Each format in a process of its own, whose memory is looked at.
    @Test(arguments: formats) func tablesStayInTheirBound(_ format: String) async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [format = format as String, path = folder.path as String] in
            alarm(300)
            let progress = try Progress(folder: path)
            let row = try #require(FormatRow.all.first { $0.format == format })
            try MemoryBoundTests.use(row, progress)
        }
        HostileVMDKTests.explain(result, format, folder)
    }

    /// Answers the image's path: one with small blocks, over a raw disk if the format is made over others alone.
    private static func make(_ row: FormatRow, _ folder: TemporaryFolder) throws -> String {
        var image = NewImage(path: folder.file(row.file("disk")))
        image.size = size
        (image.variant, image.options) = (row.dense.variant, row.dense.options)
        image.blockSize = row.dense.blockSize
        if row.ours.isEmpty {
            var base = NewImage(path: folder.file("base.raw"))
            base.size = size
            try base.create()
            (image.parent, image.parentFormat) = (base.path, "raw")
        }
        try image.create()
        return image.path
    }

    private static func use(_ row: FormatRow, _ progress: Progress) throws {
        let folder = try TemporaryFolder()
        let path = try make(row, folder)
        var options = row.options(isWritable: true)
        options.tableCacheSize = cacheSize
        let start = MemoryPeak.reset()
        func expectSmall(_ disk: Disk?, _ moment: String) {
            progress.note(moment)
            let grown = MemoryPeak.now - start
            #expect(grown < limit, "\(row.format), \(moment): \(grown >> 10) KiB more than before")
            if let disk { #expect(disk.tableCacheUse.cached <= cacheSize, "\(row.format), \(moment)") }
        }

        var disk = try Disk.open(path, options: options)
        for offset in stride(from: 0, to: size, by: Int(step)) {
            try disk.write([UInt8](repeating: UInt8(offset / step % 251 + 1), count: 512), at: offset + 512)
        }
        expectSmall(disk, "after writing")
        try disk.flush()
        expectSmall(disk, "after flushing")
        try disk.close()

        options.isWritable = false
        disk = try Disk.open(path, options: options)
        var generator = SeededGenerator(seed: 5)
        for _ in 0..<8192 {
            let number = UInt64.random(in: 0..<size / step, using: &generator)
            let bytes = try disk.read(at: number * step + 500, count: 20)
            #expect(bytes[12] == UInt8(number % 251 + 1) && bytes[11] == 0, "\(row.format), mebibyte \(number)")
        }
        expectSmall(disk, "after reading")
        var extents = 0
        try disk.forEachExtent(offset: 0, length: size) { (_) throws(DiskError) in
            extents += 1
            return true
        }
        _ = try disk.nextHole(from: size / 2)
        expectSmall(disk, "after a look at \(extents) extents")
        try disk.close()

        let report = try ImageCheck.run(path, options: options)
        #expect(report.remaining(.loss) + report.remaining(.repairable) == 0, "\(row.format): \(report.findings)")
        expectSmall(nil, "after a check")
        options.isWritable = true
        _ = try ImageCheck.run(path, options: options, repair: true)
        expectSmall(nil, "after a repair")

        disk = try Disk.open(path, options: options)
        try disk.discard(offset: 0, length: size)
        expectSmall(disk, "after discarding")
        #expect(try disk.read(at: size / 2 + 512, count: 1) == [0])
        try disk.close()
        expectSmall(nil, "in the end")
    }
}

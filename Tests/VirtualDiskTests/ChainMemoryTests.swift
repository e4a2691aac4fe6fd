import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Merging and compacting images of a disk with very many blocks takes no more memory than it does for a small one.
struct ChainMemoryTests {
    private static let size: UInt64 = 12 << 30
    private static let cacheSize = 512 << 10
    /// What it may take in all, beside what the process had before.
    private static let limit = 64 << 20
    /// A write in each of these many bytes.
    private static let step: UInt64 = 3 << 20

    static let formats = ChainMergeTests.rows.map(\.format)

    /// Each format in a process of its own, whose memory is looked at.
    @Test(arguments: formats) func memoryStaysInItsBound(_ format: String) async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) {
            [format = format as String, path = folder.path as String] in
            alarm(600)
            let row = try #require(FormatRow.all.first { $0.format == format })
            try ChainMemoryTests.use(row, Progress(folder: path))
        }
        HostileVMDKTests.explain(result, format, folder)
    }

    /// A chain of two images with blocks of their own everywhere.
    private static func make(_ row: FormatRow, _ folder: TemporaryFolder) throws -> [String] {
        let paths = ["top", "base"].map { folder.file(row.file($0)) }
        for number in [1, 0] {
            var image = NewImage(path: paths[number])
            image.size = size
            image.blockSize = row.dense.blockSize
            if number == 0 { image.parent = paths[1] }
            (image.variant, image.options) = (row.dense.variant, row.dense.options)
            try image.create()
            var options = row.options(isWritable: true)
            options.tableCacheSize = cacheSize
            let disk = try Disk.open(image.path, options: options)
            for offset in stride(from: UInt64(number) << 19, to: size, by: Int(step)) {
                // Some zeros and some that both images have, for a compaction to find.
                let value: UInt8 = offset / step % 5 == 1 ? 0 : UInt8(offset / step % 200 + 1)
                try disk.write([UInt8](repeating: value, count: 512), at: offset)
            }
            try disk.close()
        }
        return paths
    }

    private static func use(_ row: FormatRow, _ progress: Progress) throws {
        let folder = try TemporaryFolder()
        let paths = try make(row, folder)
        var options = row.options(isWritable: true)
        options.tableCacheSize = cacheSize
        let start = MemoryPeak.reset()
        func expectSmall(_ moment: String) {
            progress.note(moment)
            let grown = MemoryPeak.now - start
            #expect(grown < limit, "\(row.format), \(moment): \(grown >> 10) KiB more than before")
        }
        _ = try ImageCompaction.run(paths[0], options: options)
        expectSmall("after compacting the top image")
        var merge = ChainMerge(top: paths[0])
        merge.source = .number(1)
        merge.target = .number(0)
        merge.keepsFiles = true
        merge.options = options
        _ = try merge.run()
        expectSmall("after merging upwards")
        let child = try ImageSnapshot(of: paths[0]).create()
        var disk = try Disk.open(child, options: options)
        for offset in stride(from: 1 << 20, to: size, by: Int(step)) {
            try disk.write([UInt8](repeating: 7, count: 512), at: offset)
        }
        try disk.close()
        expectSmall("after writing")
        disk = try Disk.open(child, options: options)
        _ = try disk.merge(0, into: 1)
        expectSmall("after merging downwards on an open disk")
        #expect(try disk.read(at: 1 << 20, count: 1) == [7])
        #expect(try disk.read(at: 10 * step, count: 1) == [11])
        try disk.close()
        _ = try ImageCompaction.run(paths[0], options: options)
        expectSmall("after compacting the base")
    }
}

import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// On file systems with reflinks a conversion shares the blocks of the old image: hardly any space is taken, and both
/// read as they should, also after one of them is written.
struct ReflinkTests {
    static let formats = FormatRow.all.filter { !$0.ours.isEmpty }

    @Test(arguments: ["xfs", "btrfs"]) func conversionsShareBlocks(_ type: String) throws {
        let folder = try TemporaryFolder()
        let system = try LoopFileSystem(type, in: folder)
        defer { system.unmount() }
        let size = 64 << 20
        var model = DiskModel(size: size)
        let pool = RandomPool(seed: 7)
        var generator = SeededGenerator(seed: 7)
        for place in Array(0..<16) + Array(40..<52) {
            model.write(pool.bytes(1 << 20, using: &generator), at: place << 20)
        }
        // An odd end of data, and small islands of it.
        model.write(pool.bytes(70_000, using: &generator), at: 30 << 20)
        let raw = "\(system.path)/model.raw"
        try FileStorage(creating: raw).write(model.bytes, at: 0, for: .guestData)
        for source in Self.formats {
            let old = "\(system.path)/old.\(source.format)"
            var image = NewImage(path: old)
            image.format = source.format
            try ImageConversion(from: raw, options: DiskOptions(format: "raw"), to: image).run()
            for target in Self.formats {
                let before = try system.usedBytes()
                var new = NewImage(path: "\(system.path)/new.\(target.format)")
                new.format = target.format
                try ImageConversion(from: old, options: source.options(isWritable: false), to: new).run()
                let after = try system.usedBytes()
                let context = "\(type): \(source.format) to \(target.format)"
                #expect(after < before + (3 << 20), "\(context): \(before) bytes were in use, and now \(after)")
                // The new one can be written, and the old one does not see it.
                let disk = try Disk.open(new.path, options: target.options(isWritable: true))
                #expect(try model.mistake(of: disk, in: 0..<size) == nil, "\(context)")
                try disk.write(pool.bytes(100_000, using: &generator), at: 1_000_000)
                try disk.close()
                let other = try Disk.open(old, options: source.options(isWritable: false))
                #expect(try model.mistake(of: other, in: 0..<size) == nil, "\(context), the old one")
                try other.close()
                unsafe unlink(new.path)
            }
            unsafe unlink(old)
        }
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// The cases of QEMU's and VirtualBox's own tests of VDI: iotests 084 and 211, tstVDIo, tstVDMultBackends,
/// tstVDShareable. (tstVDDiscard is in ``VDIDiscardTests``.)
struct VDIPeerCaseTests {
    private func poke(_ path: String, _ value: UInt32, at offset: UInt64) throws {
        var field = FieldWriter(count: 4)
        field.littleEndian(value, at: 0)
        try FileStorage(path: path, isWritable: true).write(field.bytes, at: offset, for: .header)
    }

    private func open(_ path: String, isWritable: Bool = true) throws -> Disk {
        var options = DiskOptions(isWritable: isWritable)
        options.lazyFlushInterval = 0
        return try Disk.open(path, options: options)
    }

    private func isZero(_ model: DiskModel, _ offset: Int) -> Bool {
        model.bytes.slice(offset, 1 << 20).allSatisfy { $0 == 0 }
    }

    /// 084: a static image; blocks that are too few, too many, and of another size.
    @Test func fieldsThatContradictEachOther() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vdi")
        try Peer.run("qemu-img", "create", "-q", "-f", "vdi", "-o", "static=on", path, "64M")
        let disk = try open(path)
        #expect(disk.size == 64 << 20 && disk.blockSize == 1 << 20)
        try disk.write([1], at: (64 << 20) - 1)
        try disk.close()
        try Peer.run("qemu-img", "check", "-q", "-f", "vdi", path)
        for (value, offset) in [(63, 384), (1, 384), (0x2000_0000, 384), (0xffff_ffff, 384), (3 << 19, 376), (0, 376)]
            as [(UInt32, UInt64)]
        {
            let old = try FileStorage(path: path, isWritable: false).bytes(at: offset, count: 4, for: .header, "it")
            try poke(path, value, at: offset)
            #expect { try open(path) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
            #expect(throws: DiskError.self) { try ImageCheck.run(path) }
            try FileStorage(path: path, isWritable: true).write(old, at: offset, for: .header)
        }
        try open(path).close()
    }

    /// 211: images of nothing.
    @Test func emptyDisk() throws {
        let folder = try TemporaryFolder()
        let path = folder.file("disk.vdi")
        try Peer.run("qemu-img", "create", "-q", "-f", "vdi", path, "0")
        for (name, isOurs) in [(path, false), (folder.file("ours.vdi"), true)] {
            if isOurs {
                var image = NewImage(path: name)
                image.size = 0
                try image.create()
            }
            let disk = try open(name)
            #expect(disk.size == 0)
            try disk.discard(offset: 0, length: 0)
            #expect(throws: DiskError.self) { try disk.write([1], at: 0) }
            #expect(try disk.nextData(from: 0) == nil)
            try disk.close()
            #expect(try ImageCheck.run(name).findings.isEmpty)
        }
    }

    /// tstVDIo: a base, a child and a grandchild, each written at random, and a whole block of zeros in a child.
    @Test func randomWorkOnEachLevel() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        var model = DiskModel(size: 24 << 20)
        for level in 0..<3 {
            var image = NewImage(path: folder.file("\(level).vdi"))
            image.size = UInt64(model.size)
            image.parent = level > 0 ? folder.file("\(level - 1).vdi") : nil
            try image.create()
            let disk = try open(image.path)
            if level == 0 {
                for offset in stride(from: 0, to: model.size, by: 64 << 10) {
                    let data = ConformanceTests.pool.bytes(64 << 10, using: &generator)
                    try disk.write(data, at: UInt64(offset))
                    model.write(data, at: offset)
                }
            } else {
                try disk.write([UInt8](repeating: 0, count: 1 << 20), at: UInt64(level) << 21)
                model.zero(level << 21..<level << 21 + 1 << 20)
            }
            for _ in 0..<60 {
                let offset = Int.random(in: 0..<model.size / 512, using: &generator) * 512
                let count = min(model.size - offset, 65_536)
                if Bool.random(using: &generator), level > 0 {
                    let data = ConformanceTests.pool.bytes(count, using: &generator)
                    try disk.write(data, at: UInt64(offset))
                    model.write(data, at: offset)
                }
                if let mistake = try model.mistake(of: disk, in: offset..<offset + count) {
                    Issue.record("level \(level), seed \(seed): \(mistake)")
                }
            }
            try disk.close()
            #expect(try VDIReader.flatten(image.path, in: folder) == model.bytes, "level \(level), seed \(seed)")
            // The block of zeros, unless something was written to it since.
            let zeros = Int(try VDIReader.fields(image.path)["zero"] ?? "") ?? 0
            if level > 0, isZero(model, level << 21) { #expect(zeros >= 1, "level \(level), seed \(seed)") }
        }
    }

    /// tstVDMultBackends: five VMDKs over a VDI.
    @Test func fiveOfAnotherFormatAbove() throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 8)
        var model = DiskModel(size: 5 << 20)
        for level in 0...5 {
            var image = NewImage(path: folder.file(level == 0 ? "0.vdi" : "\(level).vmdk"))
            image.size = UInt64(model.size)
            image.parent = level > 0 ? folder.file(level == 1 ? "0.vdi" : "\(level - 1).vmdk") : nil
            try image.create()
            let disk = try open(image.path)
            for _ in 0..<15 {
                let offset = Int.random(in: 0..<model.size, using: &generator)
                let data = ConformanceTests.pool.bytes(min(model.size - offset, 90_000), using: &generator)
                try disk.write(data, at: UInt64(offset))
                model.write(data, at: offset)
            }
            #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
            try disk.close()
        }
        let disk = try open(folder.file("5.vmdk"), isWritable: false)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
    }

    /// tstVDShareable: what one opener of a fixed image writes, another one that has it open sees.
    @Test func fixedImageOpenTwice() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = 4 << 20
        image.variant = "fixed"
        try image.create()
        var options = DiskOptions(isWritable: true)
        options.locksImages = false
        let disks = [try Disk.open(image.path, options: options), try Disk.open(image.path, options: options)]
        for (number, disk) in disks.enumerated() {
            try disk.write([UInt8](repeating: UInt8(number + 1), count: 5000), at: UInt64(number) << 20)
            #expect(
                try disks[1 - number].read(at: UInt64(number) << 20, count: 5000)
                    == [UInt8](repeating: UInt8(number + 1), count: 5000))
        }
        for disk in disks { try disk.close() }
        // With locks there is one writer.
        let first = try open(image.path)
        #expect { try open(image.path) } throws: { ($0 as? DiskError)?.kind == .locked }
        try first.close()
    }

    /// 16 TiB, written at both ends and in the middle: the memory is that of a small one.
    @Test func largeDisk() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.vdi"))
        image.size = 16 << 40
        try image.create()
        let disk = try open(image.path)
        let places: [UInt64] = [0, 255 << 30, (8 << 40) + 5, (16 << 40) - 512]
        for (number, place) in places.enumerated() {
            try disk.write([UInt8](repeating: UInt8(number + 1), count: 512), at: place)
        }
        try disk.flush()
        #expect(disk.tableCacheUse.cached <= 8 << 20)
        #expect(try disk.nextData(from: 1 << 30) == 255 << 30)
        try disk.discard(offset: 255 << 30, length: 1 << 20)
        try disk.close()
        try Peer.run("qemu-img", "check", "-q", "-f", "vdi", image.path)
        try Peer.run("qemu-io", "-r", "-f", "vdi", "-c", "read -P 4 \(places[3]) 512", image.path)
        // The map has 64 MiB, and lies behind the first.
        #expect(try FileStorage(path: image.path, isWritable: false).length() == (65 + 3) << 20)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// How a differencing VHD finds and knows its parent, and what it holds itself.
struct VHDChainTests {
    private static let size = 3 << 20

    private func makeChain(_ folder: TemporaryFolder, base: String = "base.vhd") throws -> String {
        try VHD.create(folder, base, size: Self.size)
        try VHD.write(folder.file(base), [(1, 0, Self.size)])
        return try VHD.create(folder, "child.vhd", parent: base)
    }

    private func firstByte(_ path: String, _ folders: [String] = []) throws -> UInt8 {
        let disk = try Disk.open(path, options: DiskOptions(allowedFolders: folders))
        let bytes = try disk.read(at: 0, count: 1)
        try disk.close()
        return bytes[0]
    }

    // MARK: - What is recorded

    @Test func childRecordsItsParent() throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        let information = try ImageInformation.read(child, wholeChain: true)
        #expect(information.count == 2 && information[0].virtualSize == UInt64(Self.size))
        #expect(information[0].parent?.uuid == information[1].identity.uuid)
        let real = try #require(information[1].files.first)
        let absolute = String(real.map { $0 == "/" ? "\\" : $0 })
        #expect(information[0].parent?.paths == [".\\base.vhd", absolute, "base.vhd"])
        #expect(try VHD.property("type", of: child) == "differencing")
        // The parent's time stamp is when its file was changed.
        let time = try Peer.run("date", "-u", "-r", folder.file("base.vhd"), "+%Y-%m-%d %H:%M:%S UTC\n")
        #expect(try VHD.property("parent-created", of: child).map { $0 + "\n\n" } == time)
        let vhdiinfo = try Peer.run("vhdiinfo", child)
        #expect(vhdiinfo.contains("Differential") && vhdiinfo.contains("base.vhd"))
    }

    /// A parent above or beside the child's folder.
    @Test func pathsLeadOutOfTheFolder() throws {
        let folder = try TemporaryFolder()
        try Peer.run("mkdir", "-p", folder.file("a/b"), folder.file("c ä"))
        try VHD.create(folder, "c ä/base.vhd", size: Self.size)
        try VHD.write(folder.file("c ä/base.vhd"), [(1, 0, 1)])
        let child = try VHD.create(folder, "a/b/child.vhd", parent: "c ä/base.vhd")
        #expect(try ImageInformation.read(child)[0].parent?.paths.first == "..\\..\\c ä\\base.vhd")
        #expect { try Disk.open(child) } throws: { ($0 as? DiskError)?.kind == .refused }
        #expect(try firstByte(child, [folder.file("c ä")]) == 1)
    }

    // MARK: - Where it is found

    @Test func folderMoves() throws {
        let folder = try TemporaryFolder()
        try Peer.run("mkdir", folder.file("one"))
        try VHD.create(folder, "one/base.vhd", size: Self.size)
        try VHD.write(folder.file("one/base.vhd"), [(1, 0, 1)])
        try VHD.create(folder, "one/child.vhd", parent: "one/base.vhd")
        try Peer.run("mv", folder.file("one"), folder.file("two"))
        #expect(try firstByte(folder.file("two/child.vhd")) == 1)
    }

    @Test func parentIsRenamed() throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        try Peer.run("mv", folder.file("base.vhd"), folder.file("renamed.vhd"))
        #expect(try firstByte(child) == 1, "found by its UUID")
        try Peer.run("rm", folder.file("renamed.vhd"))
        #expect { try Disk.open(child) } throws: { ($0 as? DiskError)?.kind == .notFound }
    }

    /// One of the spellings alone is enough: a locator with that code and data, and no name in the header.
    @Test(arguments: [
        ("W2ru", ".\\sub\\base.vhd", true), ("W2ku", "C:\\VMs\\sub\\base.vhd", true),
        ("MacX", "file:///x/base.vhd", false),
        ("MacX", "file:sub/base.vhd", false), ("Wi2r", ".\\base.vhd", false), ("Wi2k", "D:\\x\\base.vhd", false),
        ("W2ku", "\\\\server\\share\\base.vhd", true), ("", "base.vhd", true), ("", "C:\\elsewhere\\base.vhd", true),
    ])
    func anySpellingLeadsToTheParent(_ code: String, _ text: String, _ isWide: Bool) throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        if text.contains("sub"), !text.contains(":\\") {
            try Peer.run("mkdir", folder.file("sub"))
            try Peer.run("mv", folder.file("base.vhd"), folder.file("sub/base.vhd"))
        }
        var header = try folder.read("child.vhd").slice(512, 1024)
        for index in 64..<768 { header[index] = 0 }
        let data = isWide ? text.utf16.flatMap { [UInt8(truncatingIfNeeded: $0), UInt8($0 >> 8)] } : Array(text.utf8)
        if code.isEmpty {
            // The name alone, big endian.
            for (index, unit) in text.utf16.enumerated() { header[64 + index * 2 + 1] = UInt8(unit) }
        } else {
            let place = try folder.read("child.vhd").slice(512 + 576 + 16, 8)
            let entry = Array(code.utf8) + [0, 0, 0, 1, 0, 0, 0, UInt8(data.count), 0, 0, 0, 0] + place
            for (index, byte) in entry.enumerated() { header[576 + 24 * 3 + index] = byte }
            try VHD.poke(child, data, at: place.reduce(UInt64(0)) { $0 << 8 | UInt64($1) })
        }
        for index in 36..<40 { header[index] = 0 }
        let sum = ~header.reduce(UInt32(0)) { $0 &+ UInt32($1) }
        for index in 0..<4 { header[36 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(24 - 8 * index)) }
        try VHD.poke(child, header, at: 512)
        #expect(try ImageInformation.read(child)[0].parent?.paths.count == 1)
        #expect(try firstByte(child) == 1)
    }

    // MARK: - Whether it is the one

    @Test func anotherImageOfThatName() throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        try Peer.run("rm", folder.file("base.vhd"))
        try VHD.create(folder, "base.vhd", size: Self.size)
        #expect { try Disk.open(child) } throws: { error in
            (error as? DiskError)?.kind == .brokenLink && "\(error)".contains("UUID")
        }
        try Peer.run("rm", folder.file("base.vhd"))
        try folder.write([UInt8](repeating: 0, count: 1 << 20), to: "base.vhd")
        #expect { try Disk.open(child) } throws: { ($0 as? DiskError)?.kind == .brokenLink }
    }

    /// A copy of the parent has another time of change, and is the parent nevertheless.
    @Test func timeOfTheParentDoesNotMatter() throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        try Peer.run("touch", "-d", "2001-02-03", folder.file("base.vhd"))
        #expect(try firstByte(child) == 1)
    }

    @Test func circle() throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        let uuid = try folder.read("child.vhd").slice(68, 16)
        var header = try folder.read("child.vhd").slice(512, 1024)
        header.replaceSubrange(40..<56, with: uuid)
        header.replaceSubrange(36..<40, with: [0, 0, 0, 0])
        let sum = ~header.reduce(UInt32(0)) { $0 &+ UInt32($1) }
        for index in 0..<4 { header[36 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(24 - 8 * index)) }
        try VHD.poke(child, header, at: 512)
        try Peer.run("mv", child, folder.file("base.vhd"))
        #expect { try Disk.open(folder.file("base.vhd")) } throws: { ($0 as? DiskError)?.kind == .brokenLink }
    }

    // MARK: - What is held

    /// One sector takes one sector: the others stay the parent's, also in the same block.
    @Test func sectorsAreHeldOneByOne() throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        let disk = try Disk.open(child, options: DiskOptions(isWritable: true))
        for sector in [3, 4, 9, 4095] as [UInt64] {
            try disk.write([UInt8](repeating: 8, count: 512), at: sector * 512)
        }
        // Part of a sector: the rest of it is copied.
        try disk.write([9], at: 20 * 512 + 100)
        var own: [Range<UInt64>] = []
        try disk.forEachExtent(offset: 0, length: disk.size) { (extent) throws(DiskError) in
            if case .data(layer: 0, file: _, offset: _) = extent.source {
                own.append(extent.offset / 512..<(extent.offset + extent.length) / 512)
            }
            return true
        }
        #expect(own == [3..<5, 9..<10, 20..<21, 4095..<4096])
        try disk.close()
        try VHD.expectSound([child])
        var model = DiskModel(size: Self.size)
        model.write([UInt8](repeating: 1, count: Self.size), at: 0)
        for sector in [3, 4, 9, 4095] { model.write([UInt8](repeating: 8, count: 512), at: sector * 512) }
        model.write([9], at: 20 * 512 + 100)
        try VHD.expectAgreement(child, model)
        let again = try Disk.open(child)
        #expect(try model.mistake(of: again, in: 0..<Self.size) == nil)
        try again.close()
    }

    /// A discarded block over a parent with data is kept, full of zeros that take no space.
    @Test func discardHidesTheParent() throws {
        let folder = try TemporaryFolder()
        let child = try makeChain(folder)
        let disk = try Disk.open(child, options: DiskOptions(isWritable: true))
        try disk.discard(offset: 0, length: disk.size)
        #expect(try disk.read(at: 0, count: Self.size).allSatisfy { $0 == 0 })
        try disk.close()
        #expect(try ImageCheck.run(child).allocatedBlocks == 2)
        #expect(try FileStorage(path: child, isWritable: false).allocatedBytes() < 64 << 10)
        try VHD.expectSound([child])
        try VHD.expectAgreement(child, DiskModel(size: Self.size))
    }

    /// XenServer's batmap says of blocks, by number, that they are held whole: none is given up then, and the map is
    /// not written over.
    @Test func batmapStaysTrue() throws {
        let folder = try TemporaryFolder()
        try VHD.create(folder, "base.vhd", size: Self.size)
        let child = try VHD.create(folder, "child.vhd", parent: "base.vhd")
        // An image as XenServer lays it out: the batmap follows the table.
        let bytes = try folder.read("child.vhd")
        var batmap = [UInt8](repeating: 0, count: 1024)
        batmap.replaceSubrange(0..<8, with: "tdbatmap".utf8)
        batmap[14] = 0x0c
        batmap[19] = 1
        batmap[512] = 0x80
        var header = bytes.slice(512, 1024)
        for index in 576..<768 { header[index] = 0 }
        for index in 36..<40 { header[index] = 0 }
        let sum = ~header.reduce(UInt32(0)) { $0 &+ UInt32($1) }
        for index in 0..<4 { header[36 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(24 - 8 * index)) }
        try Peer.run("rm", child)
        // The map itself lies at 3072 (0x0c00), one sector.
        batmap[14] = 0x0a
        try folder.write(
            bytes.slice(0, 512) + header + bytes.slice(1536, 512) + batmap + bytes.suffix(512), to: "child.vhd")
        let disk = try Disk.open(child, options: DiskOptions(isWritable: true))
        try disk.write([1], at: 0)
        try disk.discard(offset: 0, length: disk.size)
        #expect(try disk.read(at: 0, count: Self.size).allSatisfy { $0 == 0 })
        try disk.close()
        #expect(try folder.read("child.vhd").slice(2048, 1024) == batmap)
        #expect(try ImageCheck.run(child).allocatedBlocks == 1)
    }

    // MARK: - Space

    /// Space of discarded blocks is used again after a flush, and the file does not grow.
    @Test func freedBlocksAreReused() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 64 << 20)
        try VHD.write(path, [(1, 0, 8 << 20)])
        let length = try VHD.length(path)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        for round in 0..<6 as Range<UInt64> {
            try disk.discard(offset: round * 8 << 20, length: 8 << 20)
            try disk.flush()
            try disk.write([UInt8](repeating: 2, count: 8 << 20), at: (round + 1) * 8 << 20)
        }
        try disk.close()
        #expect(try VHD.length(path) == length)
        try VHD.expectSound([path])
        // The last one of the file goes: the file ends before it.
        let again = try Disk.open(path, options: DiskOptions(isWritable: true))
        try again.discard(offset: 0, length: again.size)
        try again.write([1], at: 40 << 20)
        try again.close()
        try VHD.expectSound([path])
    }

    /// What a session that was killed leaves, a footer far behind the last block, is used and cut off by the next.
    @Test func fileOfAKilledSession() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 64 << 20)
        do {
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            try disk.write([1, 2, 3], at: 0)
            try disk.flush()
            try Peer.run("cp", "--sparse=always", path, folder.file("killed.vhd"))
            try disk.close()
        }
        let killed = folder.file("killed.vhd")
        let ahead = try VHD.length(killed)
        #expect(ahead > 60 << 20, "a footer is put ahead, so that it need not be moved for each block")
        try VHD.expectSound([killed], isClosed: false)
        let report = try ImageCheck.run(killed)
        #expect(report.counts[.leak] == 1 && report.remaining(.loss) + report.remaining(.repairable) == 0)
        let reader = try Disk.open(killed, options: DiskOptions(isWritable: true))
        try reader.close()
        #expect(try VHD.length(killed) == ahead, "nothing was written")
        try VHD.write(killed, [(5, 8 << 20, 100)])
        try VHD.expectSound([killed])
        #expect(try VHD.length(killed) < 5 << 20)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// The log of images that were not closed: replayed in memory for readers, in the file for writers, and refused where
/// it makes no sense.
struct VHDXLogTests {
    private static let size = 16 << 20

    /// An image as a writer leaves it that was killed; all blocks but the first are here by the log alone.
    private func makeUnclean(_ folder: TemporaryFolder) async throws -> String {
        let path = try VHD.create(folder, "disk.vhdx", size: Self.size, blockSize: 1 << 20)
        try await VHDX.leaveUnclean(path)
        // As if no change of the table had reached it.
        let zeros = [UInt8](repeating: 0, count: 4096)
        try VHD.poke(path, zeros, at: UInt64(VHDX.table))
        return path
    }

    private func expectContent(_ disk: Disk, sourceLocation: SourceLocation = #_sourceLocation) throws {
        for number in 0..<8 as Range<UInt64> {
            let bytes = try disk.read(at: number << 20 + 1000, count: 5000)
            #expect(bytes.allSatisfy { $0 == UInt8(0xa0 + number) }, sourceLocation: sourceLocation)
        }
        #expect(try disk.read(at: 9 << 20, count: 512).allSatisfy { $0 == 0 }, sourceLocation: sourceLocation)
    }

    @Test func readersReplayInMemory() async throws {
        let folder = try TemporaryFolder()
        let path = try await makeUnclean(folder)
        let before = try folder.snapshotOfAll()
        let disk = try Disk.open(path)
        try expectContent(disk)
        #expect(try disk.nextData(from: 8 << 20) == nil)
        try disk.close()
        #expect(try VHD.property("log", of: path)?.contains("to be replayed") == true)
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.repairable) == 1 && report.remaining(.loss) == 0)
        #expect(report.allocatedBlocks == 8)
        #expect(try folder.snapshotOfAll() == before)
    }

    @Test(arguments: ["open", "check", "qemu"]) func writersReplayInTheFile(_ who: String) async throws {
        let folder = try TemporaryFolder()
        let path = try await makeUnclean(folder)
        let before = try VHDX.header(of: path)
        switch who {
        case "open": try Disk.open(path, options: DiskOptions(isWritable: true)).close()
        case "check":
            let report = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
            #expect(report.remaining(.repairable) == 0)
        default: _ = try Subprocess.run(["qemu-img", "check", "-q", "-f", "vhdx", "-r", "all", path])
        }
        let after = try VHDX.header(of: path)
        #expect(!after.hasLog && after.fileWriteGUID != before.fileWriteGUID)
        if who != "qemu" { #expect(after.dataWriteGUID == before.dataWriteGUID, "the disk shows what it did") }
        try SecondReader.vhdx.expectSound([path], isClosed: who == "check")
        let disk = try Disk.open(path)
        try expectContent(disk)
        try disk.close()
        try Peer.run("qemu-img", "check", "-q", "-f", "vhdx", path)
    }

    /// A child whose parent was not closed: the parent is replayed in memory, whoever writes to the child.
    @Test func parentIsNotTouched() async throws {
        let folder = try TemporaryFolder()
        let path = try await makeUnclean(folder)
        let before = try folder.snapshotOfAll()
        let child = try VHD.create(folder, "child.vhdx", parent: "disk.vhdx")
        try VHD.write(child, [(1, 8 << 20, 512)])
        let disk = try Disk.open(child)
        for number in 0..<8 as Range<UInt64> {
            #expect(try disk.read(at: number << 20 + 1000, count: 1) == [UInt8(0xa0 + number)])
        }
        try disk.close()
        #expect(try folder.read("disk.vhdx") == before["disk.vhdx"])
        _ = path
    }

    @Test func logThatHoldsNothingIsRefused() async throws {
        let folder = try TemporaryFolder()
        let path = try await makeUnclean(folder)
        try VHD.poke(path, [UInt8](repeating: 0, count: 1 << 20), at: UInt64(VHDX.log))
        for isWritable in [false, true] {
            #expect { try Disk.open(path, options: DiskOptions(isWritable: isWritable)) } throws: {
                ($0 as? DiskError)?.kind == .needsRepair
            }
        }
        #expect(try VHD.property("damage", of: path)?.contains("log") == true)
        #expect(try ImageCheck.run(path).remaining(.loss) == 1)
        let report = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(report.remaining(.loss) == 0)
        try Disk.open(path).close()
    }

    @Test func fileThatLostItsEndIsRefused() async throws {
        let folder = try TemporaryFolder()
        let path = try await makeUnclean(folder)
        let file = try FileStorage(path: path, isWritable: true)
        try file.setLength(file.length() - 512)
        for isWritable in [false, true] {
            #expect { try Disk.open(path, options: DiskOptions(isWritable: isWritable)) } throws: {
                ($0 as? DiskError)?.message.contains("cut short") == true
            }
        }
        #expect(throws: DiskError.self) { try ImageCheck.run(path) }
    }

    /// One that was closed, too: when it is opened, not where somebody reads what is missing.
    @Test func closedFileThatLostItsEndIsRefused() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, "disk.vhdx", size: Self.size, blockSize: 1 << 20)
        try VHD.write(path, [(1, 0, Self.size)])
        let file = try FileStorage(path: path, isWritable: true)
        try file.setLength(file.length() - (1 << 20))
        #expect { try Disk.open(path) } throws: { ($0 as? DiskError)?.message.contains("cut short") == true }
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.loss) == 1 && report.allocatedBlocks == 15)
    }

    /// An entry of which a byte is wrong ends the sequence before it.
    @Test(arguments: [0, 5, 64, 4096, 8191]) func tornEntryDoesNotCount(_ place: Int) async throws {
        let folder = try TemporaryFolder()
        let path = try await makeUnclean(folder)
        let bytes = try folder.read("disk.vhdx")
        // The last entry: the one with the highest number.
        let starts = stride(from: VHDX.log, to: VHDX.metadata, by: 4096).filter {
            bytes.slice($0, 4).elementsEqual("loge".utf8)
        }
        let last = try #require(
            starts.max { bytes.number(at: $0 + 16, width: 8) < bytes.number(at: $1 + 16, width: 8) })
        try VHD.poke(path, [bytes[last + place] ^ 0x40], at: UInt64(last + place))
        let disk = try Disk.open(path)
        #expect(try disk.read(at: 6 << 20 + 1000, count: 1) == [0xa6])
        #expect(try disk.read(at: 7 << 20 + 1000, count: 1) == [0], "what the last entry says is not believed")
        try disk.close()
    }

    /// A log that somebody else wrote: several entries that belong together, over the ring's end, and runs of zeros.
    @Test func sequenceOfSeveralEntries() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, "disk.vhdx", size: Self.size, blockSize: 1 << 20)
        try VHD.write(path, [(1, 0, Self.size)])
        var bytes = try folder.read("disk.vhdx")
        let guid = [UInt8](1...16)
        var page = bytes.slice(VHDX.table, 4096)
        // Block 3 is no more, then all are zeros, then block 2 is back.
        page = page.setting(0, at: 3 * 8, width: 8)
        var entries = [LogEntry(number: 41, changes: [(VHDX.table, page)])]
        entries.append(LogEntry(number: 42, zeros: VHDX.table..<VHDX.table + 4096))
        page = [UInt8](repeating: 0, count: 4096).setting(bytes.number(at: VHDX.table + 16, width: 8), at: 16, width: 8)
        entries.append(LogEntry(number: 43, changes: [(VHDX.table, page)]))
        // An older sequence, and one of another session, which are worth nothing.
        LogEntry(number: 7, changes: [(VHDX.table, page)]).write(
            to: &bytes, at: 100 * 4096, tail: 100 * 4096, guid: guid)
        LogEntry(number: 99, changes: [(VHDX.table, page)]).write(
            to: &bytes, at: 120 * 4096, tail: 120 * 4096, guid: guid.reversed())
        var place = (256 - 3) * 4096
        let tail = place
        for entry in entries { place = entry.write(to: &bytes, at: place, tail: tail, guid: guid) }
        for start in VHDX.headers { bytes.replaceSubrange(start + 48..<start + 64, with: guid) }
        bytes = VHDX.withChecksums(bytes)
        try VHDX.replace(path, by: bytes)
        let disk = try Disk.open(path)
        for block in 0..<16 as Range<UInt64> {
            #expect(try disk.read(at: block << 20, count: 1) == [block == 2 ? 1 : 0], "block \(block)")
        }
        try disk.close()
        try Disk.open(path, options: DiskOptions(isWritable: true)).close()
        #expect(try VHDX.entry(2, of: path).state == 6)
        #expect(try VHDX.entry(3, of: path).state == 0)
        #expect(try ImageCheck.run(path).allocatedBlocks == 1)
    }

    /// Sessions that go round the log many times, with entries of any size, looked at as if they had been killed.
    @Test(arguments: [20, 200]) func logGoesRound(_ flushes: Int) throws {
        let folder = try TemporaryFolder()
        // A page of the table is for 512 blocks: these have 600 pages.
        let path = try VHD.create(folder, "disk.vhdx", size: 300 << 30, blockSize: 1 << 20)
        var generator = SeededGenerator(seed: UInt64(flushes))
        var expected: [UInt64: UInt8] = [:]
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        let disk = try Disk.open(path, options: options)
        for flush in 1...flushes {
            for _ in 0..<Int.random(in: 1...6000 / flushes, using: &generator) {
                let place = UInt64.random(in: 0..<(300 << 18), using: &generator) * 4096
                let value = UInt8.random(in: 1...255, using: &generator)
                try disk.write([UInt8](repeating: value, count: 512), at: place)
                expected[place] = value
            }
            try disk.flush()
            guard flush % (flushes / 5) == 0 else { continue }
            let copy = folder.file("copy.vhdx")
            try Peer.run("cp", "--sparse=always", path, copy)
            try SecondReader.vhdx.expectSound([copy], isClosed: false)
            for isWritable in [false, true] {
                let killed = try Disk.open(copy, options: DiskOptions(isWritable: isWritable))
                for (place, value) in expected { #expect(try killed.read(at: place, count: 1) == [value]) }
                try killed.close()
            }
            try Peer.run("cp", "--sparse=always", path, copy)
            _ = try Subprocess.run(["qemu-img", "check", "-q", "-f", "vhdx", "-r", "all", copy])
            let replayed = try Disk.open(copy)
            for (place, value) in expected { #expect(try replayed.read(at: place, count: 1) == [value]) }
            try replayed.close()
        }
        try disk.close()
        try SecondReader.vhdx.expectSound([path])
    }
}

/// An entry of a log, as another program might write it.
private struct LogEntry {
    let number: UInt64
    var changes: [(offset: Int, bytes: [UInt8])] = []
    var zeros: Range<Int>?

    /// Writes it at `place` of the log, which is a ring; answers where the next one goes.
    @discardableResult
    func write(to file: inout [UInt8], at place: Int, tail: Int, guid: [UInt8]) -> Int {
        let descriptors = changes.count + (zeros == nil ? 0 : 1)
        var entry = [UInt8](repeating: 0, count: (1 + changes.count) * 4096)
        entry.replaceSubrange(0..<4, with: "loge".utf8)
        for (value, offset, width) in [
            (UInt64(entry.count), 8, 4), (UInt64(tail), 12, 4), (number, 16, 8), (UInt64(descriptors), 24, 4),
            (UInt64(file.count), 48, 8), (UInt64(file.count), 56, 8),
        ] { entry = entry.setting(value, at: offset, width: width) }
        entry.replaceSubrange(32..<48, with: guid)
        for (index, change) in changes.enumerated() {
            let start = 64 + index * 32
            entry.replaceSubrange(start..<start + 4, with: "desc".utf8)
            entry.replaceSubrange(start + 4..<start + 8, with: change.bytes[4092...])
            entry.replaceSubrange(start + 8..<start + 16, with: change.bytes[..<8])
            entry = entry.setting(UInt64(change.offset), at: start + 16, width: 8)
            entry = entry.setting(number, at: start + 24, width: 8)
            let sector = (index + 1) * 4096
            entry.replaceSubrange(sector..<sector + 4, with: "data".utf8)
            entry = entry.setting(number >> 32, at: sector + 4, width: 4)
            entry.replaceSubrange(sector + 8..<sector + 4092, with: change.bytes[8..<4092])
            entry = entry.setting(number & 0xffff_ffff, at: sector + 4092, width: 4)
        }
        if let zeros {
            let start = 64 + changes.count * 32
            entry.replaceSubrange(start..<start + 4, with: "zero".utf8)
            entry = entry.setting(UInt64(zeros.count), at: start + 8, width: 8)
            entry = entry.setting(UInt64(zeros.lowerBound), at: start + 16, width: 8)
            entry = entry.setting(number, at: start + 24, width: 8)
        }
        VHDX.putChecksum(&entry, 0..<entry.count)
        for start in stride(from: 0, to: entry.count, by: 4096) {
            let target = VHDX.log + (place + start) % (1 << 20)
            file.replaceSubrange(target..<target + 4096, with: entry[start..<start + 4096])
        }
        return (place + entry.count) % (1 << 20)
    }
}

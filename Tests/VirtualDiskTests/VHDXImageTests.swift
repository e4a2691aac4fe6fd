import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// What a new VHDX is, who changes which of its GUIDs and when, and how blocks lie in its table.
struct VHDXImageTests {
    private static let size = 3 << 20

    @discardableResult private func make(
        _ folder: TemporaryFolder, _ name: String = "disk.vhdx", size: Int = Self.size, blockSize: UInt64? = 1 << 20,
        variant: String? = nil, parent: String? = nil, _ options: [String: String] = [:]
    ) throws -> String {
        try VHD.create(
            folder, name, size: parent == nil ? size : nil, blockSize: blockSize, variant: variant, parent: parent,
            options)
    }

    // MARK: - Creation

    @Test(arguments: [1, 2, 16, 256] as [UInt64]) func peersSeeWhatWasMade(_ megabytes: UInt64) throws {
        let folder = try TemporaryFolder()
        let path = try make(folder, size: 100 << 30, blockSize: megabytes << 20)
        let information = try Peer.run("qemu-img", "info", "-f", "vhdx", path)
        #expect(
            information.contains("(107374182400 bytes)") && information.contains("cluster_size: \(megabytes << 20)"))
        try Peer.run("qemu-img", "check", "-q", "-f", "vhdx", path)
        #expect(try Peer.run("vhdiinfo", path).contains("107374182400 bytes"))
        try SecondReader.vhdx.expectSound([path])
    }

    @Test func usualBlocks() throws {
        let folder = try TemporaryFolder()
        let base = try make(folder, "base.vhdx", blockSize: nil)
        #expect(try ImageInformation.read(base)[0].blockSize == 32 << 20)
        #expect(try ImageInformation.read(make(folder, blockSize: nil, parent: "base.vhdx"))[0].blockSize == 2 << 20)
    }

    @Test(arguments: ["full", "off"]) func fixedImages(_ preallocation: String) throws {
        let folder = try TemporaryFolder()
        let path = try make(folder, variant: "fixed", ["preallocation": preallocation])
        #expect(try VHD.length(path) == 7 << 20)
        let allocated = try FileStorage(path: path, isWritable: false).allocatedBytes()
        #expect(preallocation == "full" ? allocated >= 3 << 20 : allocated < 2 << 20)
        #expect(try VHD.property("type", of: path) == "fixed")
        // What is discarded stays allocated.
        try VHD.write(path, [(1, 0, Self.size)])
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.discard(offset: 0, length: disk.size)
        #expect(try disk.read(at: 1 << 20, count: 100) == [UInt8](repeating: 0, count: 100))
        try disk.close()
        #expect(try VHD.length(path) == 7 << 20)
        for block in 0..<3 { #expect(try VHDX.entry(block, of: path).state == 6) }
        try SecondReader.vhdx.expectSound([path])
    }

    @Test(
        arguments: [
            (1 << 20, 512, nil, ["preallocation": "full"]), (1 << 20, 3 << 20, nil, [:]),
            (1 << 20, 512 << 20, nil, [:]),
            ((1 << 20) + 512, 1 << 20, nil, ["logical-sector-size": "4096"]), (1000, 1 << 20, nil, [:]),
            (1 << 20, 1 << 20, nil, ["logical-sector-size": "4096", "physical-sector-size": "512"]),
            ((64 << 40) + 512, 1 << 20, nil, [:]), (1 << 20, 1 << 20, "split", [:]),
            (1 << 20, 1 << 20, nil, ["a": "b"]),
        ] as [(Int, UInt64, String?, [String: String])])
    func whatCannotBeIsRefused(
        _ size: Int, _ blockSize: UInt64, _ variant: String?, _ options: [String: String]
    ) throws {
        let folder = try TemporaryFolder()
        #expect { try make(folder, size: size, blockSize: blockSize, variant: variant, options) } throws: {
            ($0 as? DiskError)?.kind == .invalidArgument
        }
        #expect(try folder.snapshotOfAll().isEmpty)
    }

    /// The largest disk there is, and blocks at its end.
    @Test func sixtyFourTebibytes() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder, size: 64 << 40, blockSize: 1 << 20)
        try VHD.write(path, [(1, (64 << 40) - 512, 512), (2, 0, 512)])
        let disk = try Disk.open(path)
        #expect(try disk.read(at: (64 << 40) - 512, count: 512) == [UInt8](repeating: 1, count: 512))
        #expect(try disk.nextData(from: 1 << 20).map { $0 >> 20 } == (64 << 20) - 1)
        try disk.close()
        #expect(try ImageCheck.run(path).allocatedBlocks == 2)
    }

    // MARK: - The table

    /// Disks of several chunks: after the blocks of each comes an entry for its sector bitmap.
    @Test func entriesOfSectorBitmapsLieBetween() throws {
        let folder = try TemporaryFolder()
        // Sixteen blocks of 256 MiB are a chunk.
        let path = try make(folder, size: 20 << 30, blockSize: 256 << 20)
        let places = [0, 15, 16, 17, 31, 32, 79].map { UInt64($0) << 28 }
        try VHD.write(path, places.enumerated().map { (UInt8($0.0 + 1), $0.1 + 4096, 4096) })
        for (block, index) in [(15, 15), (16, 17), (32, 34), (79, 83)] {
            #expect(try VHDX.entry(index, of: path).state == 6, "block \(block)")
        }
        #expect(try VHDX.entry(16, of: path).state == 0)
        for (number, place) in places.enumerated() {
            try Peer.run("qemu-io", "-r", "-f", "vhdx", "-c", "read -P \(number + 1) \(place + 4096) 4096", path)
        }
        // And QEMU's, in our eyes.
        let other = folder.file("other.vhdx")
        try Peer.run("qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=256M", other, "20G")
        for place in places { try Peer.run("qemu-io", "-f", "vhdx", "-c", "write -P 7 \(place) 4096", other) }
        let disk = try Disk.open(other)
        for place in places { #expect(try disk.read(at: place, count: 4096) == [UInt8](repeating: 7, count: 4096)) }
        #expect(try disk.read(at: 14 << 28, count: 4096) == [UInt8](repeating: 0, count: 4096))
        try disk.close()
    }

    /// A child's bitmaps, in several chunks.
    @Test func childOfSeveralChunks() throws {
        let folder = try TemporaryFolder()
        try make(folder, "base.vhdx", size: 20 << 30, blockSize: 256 << 20)
        let path = try make(folder, blockSize: 256 << 20, parent: "base.vhdx")
        let places = [0, 15, 16, 17, 31, 32, 79].map { UInt64($0) << 28 }
        try VHD.write(path, places.enumerated().map { (UInt8($0.0 + 1), $0.1 + 1024, 512) })
        for index in [0, 15, 17, 18, 32, 34, 83] { #expect(try VHDX.entry(index, of: path, table: 6 << 20).state == 7) }
        for index in [16, 33, 84] { #expect(try VHDX.entry(index, of: path, table: 6 << 20).state == 6) }
        try SecondReader.vhdx.expectSound([path])
        let disk = try Disk.open(path)
        for (number, place) in places.enumerated() {
            let bytes = try disk.read(at: place, count: 2048)
            #expect(bytes.slice(1024, 512) == [UInt8](repeating: UInt8(number + 1), count: 512))
            #expect(bytes.slice(1536, 512) == [UInt8](repeating: 0, count: 512))
        }
        try disk.close()
    }

    /// A block of a child that was written sector by sector is fully present when the last one is there.
    @Test(arguments: ["512", "4096"]) func blockFillsUp(_ sectorSize: String) throws {
        let folder = try TemporaryFolder()
        let options = ["logical-sector-size": sectorSize]
        try make(folder, "base.vhdx", options)
        let path = try make(folder, parent: "base.vhdx", options)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        let piece = 16 << 10
        for number in (0..<(1 << 20) / piece).reversed() {
            #expect(try disk.read(at: UInt64(number * piece), count: 1) == [0])
            try disk.write([UInt8](repeating: 5, count: piece), at: UInt64(number * piece))
            if number == 1 {
                try disk.flush()
                #expect(try VHDX.entry(0, of: path, table: 6 << 20).state == 7)
            }
        }
        try disk.close()
        #expect(try VHDX.entry(0, of: path, table: 6 << 20).state == 6)
        try SecondReader.vhdx.expectSound([path])
    }

    /// In an image without a parent all states but the two are zeros, and bitmaps mean nothing.
    @Test func otherStates() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder, size: 6 << 20)
        try VHD.write(path, [(9, 0, 6 << 20)])
        for state in 0...3 as ClosedRange<UInt64> { try VHDX.setEntry(Int(state), of: path, state, at: 4 << 20) }
        let disk = try Disk.open(path)
        #expect(try disk.read(at: 0, count: 4 << 20).allSatisfy { $0 == 0 })
        #expect(try disk.read(at: 4 << 20, count: 100) == [UInt8](repeating: 9, count: 100))
        try disk.close()
        for state in 4...5 as ClosedRange<UInt64> {
            try VHDX.setEntry(0, of: path, state, at: 4 << 20)
            let disk = try Disk.open(path)
            #expect { try disk.read(at: 0, count: 1) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
            try disk.close()
        }
    }

    /// A child's zeros hide what the parent has; what is not present does not.
    @Test func statesOfAChild() throws {
        let folder = try TemporaryFolder()
        try VHD.write(try make(folder, "base.vhdx"), [(9, 0, Self.size)])
        let path = try make(folder, parent: "base.vhdx")
        for state in 0...3 as ClosedRange<UInt64> {
            try VHDX.setEntry(1, of: path, table: 6 << 20, state)
            let disk = try Disk.open(path)
            #expect(try disk.read(at: 1 << 20, count: 1) == [state == 0 ? 9 : 0], "state \(state)")
            try disk.close()
        }
    }

    // MARK: - Discarding

    @Test func discardedBlocksAreUnmappedAndUsedAgain() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder, size: 8 << 20)
        try VHD.write(path, [(1, 0, 8 << 20)])
        #expect(try VHD.length(path) == 12 << 20)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.discard(offset: 2 << 20, length: 2 << 20)
        try disk.flush()
        #expect(try VHDX.entry(2, of: path).state == 3)
        try disk.write([UInt8](repeating: 2, count: 1 << 20), at: 3 << 20)
        try disk.flush()
        let place = try VHDX.entry(3, of: path)
        #expect(place.state == 6 && place.offset < 12 << 20, "the place was not used again")
        try disk.discard(offset: 5 << 20, length: 3 << 20)
        try disk.close()
        #expect(try VHD.length(path) == 9 << 20)
        try SecondReader.vhdx.expectSound([path])
        try Peer.run("qemu-img", "check", "-q", "-f", "vhdx", path)
        // And of what is free another session makes use.
        try VHD.write(path, [(3, 2 << 20, 512)])
        #expect(try VHD.length(path) == 9 << 20)
        let again = try Disk.open(path)
        #expect(try again.read(at: (2 << 20) + 512, count: 4096).allSatisfy { $0 == 0 })
        #expect(try again.read(at: 1 << 20, count: 1) == [1])
        try again.close()
    }

    /// Where another program keeps a place for a block that is not there, it stays the block's.
    @Test func keptPlacesAreLeftAlone() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder, size: 4 << 20)
        try VHD.write(path, [(1, 0, 4 << 20)])
        // One between the others, and the last one of the file.
        let kept = try [1, 3].map { try VHDX.entry($0, of: path).offset }
        try VHDX.setEntry(1, of: path, 3, at: kept[0])
        try VHDX.setEntry(3, of: path, 2, at: kept[1])
        #expect(try ImageCheck.run(path).counts.isEmpty)
        let length = try VHD.length(path)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.discard(offset: 0, length: 1 << 20)
        try disk.flush()
        for block in [0, 1] as [UInt64] { try disk.write([5], at: block << 20) }
        try disk.close()
        for block in [0, 1] { #expect(try !kept.contains(VHDX.entry(block, of: path).offset)) }
        #expect(try VHDX.entry(3, of: path) == (2, kept[1]))
        #expect(try VHD.length(path) > length)
        #expect(try ImageCheck.run(path).remaining(.leak) == 0)
    }

    // MARK: - GUIDs

    @Test func guidsChangeWhenTheyMust() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder)
        let first = try VHDX.header(of: path)
        let bytes = try folder.read("disk.vhdx")
        let reader = try Disk.open(path)
        _ = try reader.read(at: 0, count: 4096)
        try reader.close()
        try Disk.open(path, options: DiskOptions(isWritable: true)).close()
        #expect(try folder.read("disk.vhdx") == bytes, "who only reads changes nothing")
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        try disk.write([1], at: 0)
        let during = try VHDX.header(of: path)
        #expect(during.fileWriteGUID != first.fileWriteGUID && during.dataWriteGUID != first.dataWriteGUID)
        #expect(during.hasLog && during.sequenceNumber == first.sequenceNumber + 2)
        try disk.write([1], at: 1 << 20)
        try disk.flush()
        #expect(try VHDX.header(of: path) == during, "once a session")
        try disk.close()
        let last = try VHDX.header(of: path)
        #expect(!last.hasLog && last.dataWriteGUID == during.dataWriteGUID)
        #expect(last.sequenceNumber == during.sequenceNumber + 2)
    }

    // MARK: - Chains

    @Test func childKnowsItsParent() throws {
        let folder = try TemporaryFolder()
        let base = try make(folder, "base.vhdx")
        try VHD.write(base, [(1, 0, 512)])
        let child = try make(folder, parent: "base.vhdx")
        let parent = try VHDX.header(of: base)
        let linkage = try DiskUUID(mixedEndian: parent.dataWriteGUID)
        #expect(try VHD.property("parent-linkage", of: child) == "{\(linkage)}")
        #expect(try VHD.property("parent-relative-path", of: child) == ".\\base.vhdx")
        #expect(try VHD.property("uuid", of: child) == VHD.property("uuid", of: base))
        #expect(try Peer.run("vhdiinfo", child).contains("base.vhdx"))
        // Renamed, it is found by what it records.
        try Peer.run("mv", base, folder.file("renamed.vhdx"))
        var disk = try Disk.open(child)
        #expect(try disk.read(at: 0, count: 1) == [1])
        try disk.close()
        try Peer.run("mv", folder.file("renamed.vhdx"), base)
        // Opened for writing and closed, it is still the one; written to, it is not.
        try Disk.open(base, options: DiskOptions(isWritable: true)).close()
        disk = try Disk.open(child)
        try disk.close()
        try VHD.write(base, [(2, 0, 512)])
        #expect { try Disk.open(child) } throws: { ($0 as? DiskError)?.kind == .brokenLink }
    }

    @Test func sectorsOfFourKilobytesAreSaid() throws {
        let folder = try TemporaryFolder()
        let path = try make(folder, "disk.vhdx", ["logical-sector-size": "4096"])
        // A child has its parent's, also over one of a format that has no word for it.
        let between = try VHD.create(folder, "between.qcow2", parent: "disk.vhdx")
        let child = try make(folder, "child.vhdx", parent: "between.qcow2")
        #expect(try ImageInformation.read(child)[0].sectorSize == 4096)
        for image in [between, child] {
            let disk = try Disk.open(image)
            #expect(disk.sectorSize == 4096)
            try disk.close()
        }
        #expect { try make(folder, "other.vhdx", parent: "disk.vhdx", ["logical-sector-size": "512"]) } throws: {
            ($0 as? DiskError)?.kind == .invalidArgument
        }
        #expect(try ImageInformation.read(path)[0].sectorSize == 4096)
        #expect(try Peer.run("vhdiinfo", path).contains("4096"))
    }
}

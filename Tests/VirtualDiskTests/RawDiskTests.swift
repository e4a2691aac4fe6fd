import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// VMDKs of whole devices and of some of their partitions, made, read and written: on files that take a device's place,
/// and on loop devices. What is exposed is judged by sfdisk.
struct RawDiskTests {
    private static let mib = 1 << 20
    private static let pool = RandomPool(seed: 31)

    /// A partition table, as sfdisk is told it, and what of it is chosen.
    struct Table: Sendable, CustomTestStringConvertible {
        let name: String
        let script: String
        /// The first partition is writable, the second is read-only.
        let chosen: (Int, Int)
        var testDescription: String { name }
    }

    static let tables = [
        Table(
            name: "MBR with logical partitions",
            script: "label: dos\n,8M,83\n,4M,82\n,,5\n,4M,83\n,4M,83\n,2M,83\n", chosen: (1, 6)),
        Table(name: "GPT", script: "label: gpt\n,8M\n,4M\n,4M\n,2M\n", chosen: (3, 1)),
    ]

    /// A partitioned disk of 40 MiB in a file.
    private func makeDevice(_ table: Table, _ folder: TemporaryFolder) throws -> String {
        var bytes: [UInt8] = []
        while bytes.count < 40 * Self.mib { bytes += Self.pool.prefix(Self.mib) }
        bytes.replaceSubrange(0..<Self.mib, with: [UInt8](repeating: 0, count: Self.mib))
        let path = try folder.write(bytes, to: "device.raw")
        let result = try Subprocess.run(["sfdisk", "-q", path], input: Array(table.script.utf8))
        guard result.status == 0 else { throw DiskError(.system, "sfdisk: \(result.errorText)") }
        return path
    }

    /// Where the partitions are, by number, as sfdisk says.
    private func partitions(of path: String) throws -> [Int: Range<Int>] {
        var found: [Int: Range<Int>] = [:]
        for line in try Peer.run("sfdisk", "-d", path).split(separator: "\n") where line.contains("start=") {
            let name = line.prefix { $0 != " " }
            let digits = String(name.reversed().prefix { $0.isNumber }.reversed())
            func field(_ key: String) -> Int? {
                guard let part = line.components(after: key) else { return nil }
                return Int(part.drop { $0 == " " }.prefix { $0.isNumber })
            }
            if let number = Int(digits), let start = field("start="), let size = field("size=") {
                found[number] = start * 512..<(start + size) * 512
            }
        }
        return found
    }

    private func create(
        _ device: String, _ table: Table, _ folder: TemporaryFolder, _ more: [String: String] = [:]
    ) throws
        -> String
    {
        var new = NewImage(path: folder.file("disk.vmdk"))
        (new.size, new.variant) = (0, "partitioned-device")
        new.options = ["device": device, "partitions": "\(table.chosen.0),\(table.chosen.1)r"]
        new.options.merge(more) { _, new in new }
        try new.create()
        return new.path
    }

    private func open(_ path: String, isWritable: Bool, _ folders: [String]) throws -> Disk {
        var options = DiskOptions(isWritable: isWritable, allowedFolders: folders)
        options.lazyFlushInterval = 0
        return try Disk.open(path, options: options)
    }

    @Test(arguments: tables) func partitionsOfAFile(_ table: Table) throws {
        let folder = try TemporaryFolder()
        let device = try makeDevice(table, folder)
        let path = try create(device, table, folder)
        try use(path, device, table, folder, allowed: [])
    }

    /// Partitions as places on a loop device, and by their own devices.
    @Test(arguments: tables, [false, true]) func partitionsOfALoopDevice(_ table: Table, _ isRelative: Bool) throws {
        guard getuid() == 0, try FileMover.exists("/dev/loop-control") else { return }
        let folder = try TemporaryFolder()
        let file = try makeDevice(table, folder)
        let loop = try Peer.run("losetup", "--find", "--show", "--partscan", file).filter { $0 != "\n" }
        defer { _ = try? Subprocess.run(["losetup", "-d", loop]) }
        let hasDevices = try FileMover.exists("\(loop)p\(table.chosen.0)")
        guard !isRelative || hasDevices else { return }
        let path = try create(loop, table, folder, isRelative ? ["relative": "on"] : [:])
        let text = String(decoding: try folder.read("disk.vmdk"), as: UTF8.self)
        #expect(text.contains("\"\(loop)p\(table.chosen.1)\" 0\n") == isRelative, "\(text)")
        #expect(throws: DiskError.self, "/dev was not allowed") { try open(path, isWritable: false, []) }
        try use(path, loop, table, folder, allowed: ["/dev"])
    }

    private func use(
        _ path: String, _ device: String, _ table: Table, _ folder: TemporaryFolder, allowed: [String]
    ) throws {
        let places = try partitions(of: device)
        let writable = try #require(places[table.chosen.0])
        let readOnly = try #require(places[table.chosen.1])
        let original = try content(of: device)
        let disk = try open(path, isWritable: true, allowed)
        #expect(disk.size == UInt64(original.count))
        for place in [writable, readOnly] {
            let found = try disk.read(at: UInt64(place.lowerBound), count: place.count)
            #expect(found == Array(original[place]), "\(table)")
        }
        let hidden = places.filter { $0.key != table.chosen.0 && $0.key != table.chosen.1 }.map(\.value)
        for place in hidden where !(place.contains(readOnly.lowerBound) || place.count < 4096) {
            let found = try disk.read(at: UInt64(place.lowerBound), count: place.count)
            #expect(found.allSatisfy { $0 == 0 }, "\(table): a partition that was not chosen is not shown")
        }
        // The exposed bytes have the device's table, sound, both copies of it.
        let exposed = try disk.read(at: 0, count: original.count)
        let copy = try folder.write(exposed, to: "exposed.raw")
        #expect(try partitions(of: copy) == places, "\(table)")
        let verify = try Subprocess.run(["sfdisk", "--verify", copy])
        #expect(!verify.errorText.contains("corrupt") && !verify.outputText.contains("corrupt"), "\(verify.errorText)")

        let data = Self.pool.prefix(100_000)
        try disk.write(data, at: UInt64(writable.lowerBound + 5000))
        for place in [readOnly.lowerBound, readOnly.upperBound - 10_000] {
            let error = #expect(throws: DiskError.self) { try disk.write([1, 2, 3], at: UInt64(place)) }
            #expect(error?.kind == .readOnly)
        }
        // The table is written beside the device.
        try disk.write([0xfa, 0xfb], at: 16)
        try disk.close()
        var expected = original
        expected.replaceSubrange(writable.lowerBound + 5000..<writable.lowerBound + 5000 + data.count, with: data)
        #expect(try content(of: device) == expected, "\(table): the device has what was written to its partition alone")
        #expect(try folder.read("disk-pt.vmdk")[16..<18] == [0xfa, 0xfb])
        let again = try open(path, isWritable: false, allowed)
        #expect(try again.read(at: 16, count: 2) == [0xfa, 0xfb])
        #expect(try again.read(at: UInt64(writable.lowerBound + 5000), count: data.count) == data)
        try again.close()
        let report = try ImageCheck.run(path, options: DiskOptions(allowedFolders: allowed))
        #expect(report.counts[.loss] == nil && report.counts[.repairable] == nil)
    }

    private func content(of path: String) throws -> [UInt8] {
        let storage = try FileStorage(path: path, isWritable: false)
        return try storage.availableBytes(at: 0, count: Int(try storage.length()), for: .guestData)
    }

    @Test func fullDevice() throws {
        let folder = try TemporaryFolder()
        let device = try makeDevice(Self.tables[0], folder)
        var new = NewImage(path: folder.file("disk.vmdk"))
        (new.size, new.variant, new.options) = (0, "full-device", ["device": device])
        try new.create()
        let original = try content(of: device)
        let disk = try open(new.path, isWritable: true, [])
        #expect(try disk.read(at: 0, count: original.count) == original)
        try disk.write([1, 2, 3], at: 1000)
        try disk.close()
        #expect(try content(of: device)[1000..<1003] == [1, 2, 3])
    }

    /// The image's boot loader is another one; the table and the disk's signature are the device's.
    @Test func bootSector() throws {
        let folder = try TemporaryFolder()
        let device = try makeDevice(Self.tables[0], folder)
        let code = try folder.write([UInt8](repeating: 0x90, count: 512), to: "boot.bin")
        let path = try create(device, Self.tables[0], folder, ["boot-sector": code])
        let original = try content(of: device)
        let disk = try open(path, isWritable: false, [])
        let sector = try disk.read(at: 0, count: 512)
        #expect(sector[..<440].allSatisfy { $0 == 0x90 } && Array(sector[440...]) == Array(original[440..<512]))
        try disk.close()
        for bad in [["boot-sector": device], ["boot-sector": "/nowhere"], ["relative": "on"], ["partitions": "1,1r"]] {
            #expect(throws: DiskError.self, "\(bad)") {
                var new = NewImage(path: folder.file("bad.vmdk"))
                (new.size, new.variant) = (0, "partitioned-device")
                new.options = ["device": device, "partitions": "1"].merging(bad) { _, new in new }
                try new.create()
            }
        }
        #expect(try folder.snapshotOfAll().keys.filter { $0.hasPrefix("bad") }.isEmpty)
    }
}

extension Substring {
    /// What follows the first occurrence of a text.
    fileprivate func components(after text: String) -> Substring? {
        var rest = self
        while !rest.isEmpty {
            if rest.hasPrefix(text) { return rest.dropFirst(text.count) }
            rest = rest.dropFirst()
        }
        return nil
    }
}

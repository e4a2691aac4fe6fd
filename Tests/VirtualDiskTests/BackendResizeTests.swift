import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// Back ends give their disks other sizes: what was there stays, what is new is zeros, also where something was before.
struct BackendResizeTests {
    private static let pool = RandomPool(seed: 23)

    /// How an image is made, and which sizes its disk gets, one after the other.
    struct Layout: Sendable, CustomTestStringConvertible {
        let name: String
        var format = "vmdk"
        var variant: String?
        var blockSize: UInt64?
        var options: [String: String] = [:]
        var sizes: [Int]
        /// Whether QEMU reads such images.
        var isReadByPeer = true
        /// Sizes that it cannot have.
        var refused: [UInt64] = [1000]
        var testDescription: String { name }

        var row: FormatRow {
            guard let row = FormatRow.all.first(where: { $0.format == format }) else { preconditionFailure(format) }
            return row
        }
    }

    private static let mib = 1 << 20

    static let layouts = [
        Layout(name: "dynamic", sizes: [mib + 512, 3 * mib, 70 * mib, mib / 2 + 1024, 5 * mib, 512]),
        Layout(
            name: "dynamic, 4 KiB grains", blockSize: 4096,
            sizes: [mib + 512, 3 * mib, 3 * mib + 512, mib / 2 + 1024, 9 * mib, mib], refused: [1 << 42, 0]),
        Layout(
            name: "dynamic, zero grains", blockSize: 8192, options: ["zeroed-grain": "on"],
            sizes: [mib + 512, 20 * mib, mib / 2 + 1024, 5 * mib]),
        Layout(name: "fixed", variant: "fixed", sizes: [mib + 512, 3 * mib, mib / 2, 2 * mib + 512]),
        Layout(
            name: "fixed, holes", variant: "fixed", options: ["preallocation": "off"],
            sizes: [mib + 512, 3 * mib, mib / 2, 2 * mib + 512]),
        Layout(name: "esx", variant: "esx", sizes: [mib + 512, 3 * mib, mib / 2, 2 * mib + 512]),
        Layout(
            name: "split", variant: "split", options: ["split-size": "1048576"],
            sizes: [mib / 2 + 512, 3 * mib + 512, 3 * mib + 1024, 4 * mib, mib + mib / 2, mib, mib + 512, 6 * mib]),
        Layout(
            name: "split fixed", variant: "split-fixed", options: ["split-size": "1048576"],
            sizes: [2 * mib + 512, 3 * mib + 512, 3 * mib + 1024, 4 * mib, mib + mib / 2, mib, mib + 512, 6 * mib]),
        Layout(
            name: "ESX sparse", variant: "esx-sparse", blockSize: 512,
            sizes: [mib + 512, 3 * mib, 10 * mib, mib / 2 + 1024, 5 * mib], refused: [1 << 42]),
        Layout(
            name: "ESX sparse, 4 KiB grains", variant: "esx-sparse", blockSize: 4096,
            sizes: [mib + 512, 40 * mib, mib / 2 + 1024, 5 * mib]),
        Layout(
            name: "VDI", format: "vdi", sizes: [3 * mib + 512, 9 * mib, 2 * mib + 1024, 4 * mib], refused: [1 << 60]),
        Layout(
            name: "VDI, map before blocks", format: "vdi", options: ["alignment": "512"],
            sizes: [3 * mib + 512, 200 * mib, 2 * mib + 1024, 4 * mib]),
        Layout(
            name: "VDI, 4 KiB blocks, blocks move", format: "vdi", blockSize: 4096, options: ["alignment": "512"],
            sizes: [mib / 4 + 512, mib, 9 * mib, mib / 8 + 1024, 20 * mib], isReadByPeer: false),
        Layout(
            name: "VDI fixed", format: "vdi", variant: "fixed", sizes: [3 * mib + 512, 9 * mib, 2 * mib, 3 * mib]),
        Layout(
            name: "VDI fixed, blocks move", format: "vdi", variant: "fixed", blockSize: 8192,
            options: ["alignment": "512"], sizes: [mib / 4 + 512, 3 * mib, 4 * mib, mib / 8], isReadByPeer: false),
        Layout(name: "raw", format: "raw", sizes: [mib + 512, 3 * mib, mib / 2, 2 * mib], refused: [1 << 63]),
        Layout(name: "raw fixed", format: "raw", variant: "fixed", sizes: [mib + 512, 3 * mib, mib / 2, 2 * mib]),
    ]

    static func resize(
        _ path: String, to size: UInt64, _ row: FormatRow, wrap: (@Sendable (any Storage) -> any Storage)? = nil
    ) throws {
        var options = row.options(isWritable: true)
        if let wrap { options.wrapStorage = { $0.traits.isWritable ? wrap($0) : $0 } }
        var opener = ChainOpener(options: options)
        opener.keepsIdentity = true
        let layer = try opener.open(path, mode: .readWrite, withParents: false)[0]
        let backend = try #require(layer.backend as? any EditableBackend)
        try backend.resize(to: size)
        try backend.close()
    }

    static func make(_ layout: Layout, in folder: TemporaryFolder, parent: String? = nil) throws -> String {
        var new = NewImage(path: folder.file("disk.\(layout.format)"))
        (new.size, new.format, new.variant) = (UInt64(layout.sizes[0]), layout.format, layout.variant)
        (new.blockSize, new.options, new.parent) = (layout.blockSize, layout.options, parent)
        try new.create()
        return new.path
    }

    /// Writes at random places, and at the end.
    static func fill(_ path: String, _ row: FormatRow, _ model: inout DiskModel, _ random: inout SeededGenerator) throws
    {
        let disk = try Disk.open(path, options: row.options(isWritable: true))
        for number in 0..<10 {
            let start = number == 0 ? max(0, model.size - 3000) : Int.random(in: 0..<model.size, using: &random)
            let data = pool.bytes(min(model.size - start, Int.random(in: 1...90_000, using: &random)), using: &random)
            try disk.write(data, at: UInt64(start))
            model.write(data, at: start)
        }
        let hole = model.size / 3..<model.size / 2
        try disk.discard(offset: UInt64(hole.lowerBound), length: UInt64(hole.count))
        model.zero(hole)
        try disk.close()
    }

    @Test(arguments: layouts) func keepsWhatItHolds(_ layout: Layout) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let path = try Self.make(layout, in: folder)
        var model = DiskModel(size: layout.sizes[0])
        for size in layout.sizes.dropFirst() + [layout.sizes[0]] {
            try Self.fill(path, layout.row, &model, &random)
            let identity = try ImageInformation.read(path, options: layout.row.options(isWritable: false))[0].identity
            for size in layout.refused {
                let before = try folder.snapshotOfAll()
                let error = #expect(throws: DiskError.self, "\(layout): \(size)") {
                    try Self.resize(path, to: size, layout.row)
                }
                #expect(error?.kind == .unsupported, "\(layout): \(error.map(String.init(describing:)) ?? "")")
                #expect(try folder.snapshotOfAll() == before, "\(layout): a refusal changed something")
            }
            try Self.resize(path, to: UInt64(size), layout.row)
            model = model.resized(to: size)
            let context = "\(layout), seed \(seed), \(size)"
            let information = try ImageInformation.read(path, options: layout.row.options(isWritable: false))[0]
            #expect(information.virtualSize == UInt64(size), "\(context)")
            #expect(information.identity == identity, "\(context): the identity is as it was")
            let disk = try Disk.open(path, options: layout.row.options(isWritable: false))
            let mistake = try model.mistake(of: disk, in: 0..<size)
            #expect(mistake == nil, "\(context): \(mistake ?? "")")
            try disk.close()
            let report = try ImageCheck.run(path, options: layout.row.options(isWritable: false))
            for finding in report.findings where finding.severity != .note && finding.severity != .leak {
                Issue.record("\(context): \(finding.message)")
            }
            var row = layout.row
            if !layout.isReadByPeer { row.peer = nil }
            do {
                let judges = try Judge.compare(row, path, over: [], with: model, in: folder)
                #expect(judges > 0, "\(context): nobody looked at it")
            } catch {
                Issue.record("\(context): \(error)")
            }
        }
    }

    /// Directories that become longer than their room move to the end of the file.
    @Test(arguments: ["dynamic", "esx-sparse"]) func longDirectory(_ variant: String) throws {
        let folder = try TemporaryFolder()
        let large = 3 << 30
        let layout = Layout(
            name: "long", variant: variant, blockSize: variant == "dynamic" ? 4096 : 1024, sizes: [Self.mib])
        let path = try Self.make(layout, in: folder)
        let mirror = try FileStorage(creating: folder.file("mirror.raw"))
        try mirror.setLength(UInt64(large))
        func write(_ bytes: [UInt8], _ offset: Int) throws {
            let disk = try Disk.open(path, options: layout.row.options(isWritable: true))
            try disk.write(bytes, at: UInt64(offset))
            try disk.close()
            try mirror.write(bytes, at: UInt64(offset), for: .guestData)
        }
        try write(Self.pool.prefix(100_000), 1000)
        try Self.resize(path, to: UInt64(large), layout.row)
        try write(Self.pool.prefix(70_000), large - 70_000)
        try write(Self.pool.prefix(70_000), large / 2)
        try Peer.run("qemu-img", "check", "-q", path)
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vmdk", mirror.name, path)
        // Another program writes where the new tables are.
        try Peer.run("qemu-io", "-f", "vmdk", "-c", "write -P 99 2000M 64k", path)
        try mirror.write([UInt8](repeating: 99, count: 65_536), at: 2000 << 20, for: .guestData)
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vmdk", mirror.name, path)
        let report = try ImageCheck.run(path)
        #expect(report.counts[.repairable] == nil && report.counts[.loss] == nil)
        try Self.resize(path, to: UInt64(Self.mib), layout.row)
        try mirror.setLength(UInt64(Self.mib))
        try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vmdk", mirror.name, path)
        #expect(try ImageInformation.read(path)[0].allocatedBytes < 4 << 20, "what was given up is given back")
    }

    /// A stream, an seSparse extent and a device have the size that they have.
    @Test func cannotBeResized() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("stream.vmdk"))
        (new.size, new.variant) = (1 << 20, "stream")
        try new.create()
        let raw = try folder.write([UInt8](repeating: 1, count: 1 << 20), to: "device.raw")
        var device = NewImage(path: folder.file("device.vmdk"))
        (device.size, device.variant, device.options) = (0, "full-device", ["device": raw])
        try device.create()
        let row = Layout(name: "", sizes: []).row
        for path in [new.path, device.path] {
            let before = try folder.snapshotOfAll()
            let error = #expect(throws: DiskError.self) { try Self.resize(path, to: 2 << 20, row) }
            #expect(error?.kind == .unsupported)
            #expect(try folder.snapshotOfAll() == before)
        }
    }
}

extension RandomPool {
    /// The same bytes each time.
    func prefix(_ count: Int) -> [UInt8] {
        var generator = SeededGenerator(seed: 1)
        return bytes(count, using: &generator)
    }
}

import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// The power fails at any moment of a session of writes, discards and flushes on a snapshot chain: afterwards the image
/// opens, what was flushed is there, and what was not is old or new.
@Suite(.serialized) struct PowerCutTests {
    /// How a chain is made.
    struct Layout: Sendable, CustomTestStringConvertible {
        let name: String
        let variant: String?
        let blockSize: UInt64?
        var options: [String: String] = [:]
        var hasParent = true
        var format = "vmdk"
        /// The parent's format.
        var parentFormat = "vmdk"
        /// What qemu-img calls the format of the top image; nil: it cannot check it.
        var peerFormat: String? = "vmdk"
        /// Sectors of the disk.
        var sectors = 1024
        /// Cuts of a plain run.
        var cuts = 1_500
        var tortureCuts = 60_000
        var testDescription: String { name }

        var size: Int { sectors * GuestModel.sectorSize }

        var topName: String { "top.\(format)" }
        var baseName: String { "base.\(parentFormat)" }
    }

    static let layouts = vmdkLayouts + vdiLayouts + vhdLayouts + vhdxLayouts + qedLayouts + qcow2Layouts

    private static let vmdkLayouts = [
        Layout(name: "dynamic child, 64 KiB grains", variant: "dynamic", blockSize: nil),
        Layout(name: "dynamic child, 4 KiB grains", variant: "dynamic", blockSize: 4096),
        Layout(
            name: "dynamic child with zero grains", variant: "dynamic", blockSize: 4096,
            options: ["zeroed-grain": "on"]),
        Layout(
            name: "split child", variant: "split", blockSize: 4096, options: ["split-size": "524288"]),
        Layout(name: "dynamic base", variant: "dynamic", blockSize: 8192, hasParent: false),
        Layout(name: "ESX sparse child", variant: "esx-sparse", blockSize: 4096),
        Layout(name: "flat base", variant: "fixed", blockSize: nil, hasParent: false),
        Layout(name: "overlay", variant: "dynamic", blockSize: 4096, format: "overlay", peerFormat: nil),
    ]

    static let isTorture = unsafe getenv("VDMOUNT_TORTURE") != nil

    @Test(arguments: layouts) func whatWasFlushedSurvivesEveryCut(_ layout: Layout) throws {
        let sessions = 6
        for session in 0..<sessions {
            let seed =
                UInt64(session) &* 7919
                &+ UInt64(truncatingIfNeeded: layout.name.utf8.reduce(5381) { $0 &* 33 &+ Int($1) })
            try runSession(layout, seed: seed, cuts: (Self.isTorture ? layout.tortureCuts : layout.cuts) / sessions)
        }
    }

    private func runSession(_ layout: Layout, seed: UInt64, cuts: Int) throws {
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let initial = try makeChain(layout, folder, &generator)
        let log = CrashLog()
        var model = GuestModel(initial: initial, firstStamp: 1_000_000)
        try work(on: folder.file(layout.topName), layout.sectors, log, &model, &generator)

        // Every prefix of the session, as far as the number of cuts goes, and random ones.
        var positions = (0..<cuts).map { _ in Int.random(in: 0...log.count, using: &generator) }
        for position in 0...min(log.count, cuts - 1) { positions[position] = position }
        var replay = log.replay()
        for (number, cut) in positions.sorted().enumerated() {
            let percent = [10, 50, 90].randomElement(using: &generator) ?? 50
            let mode: CrashReplay.CutMode = [.all, .none, .some(percent: percent)][number % 3]
            let files = replay.files(at: cut, mode, using: &generator)
            let context = "\(layout.name), seed \(seed), cut \(cut) of \(log.count), \(mode)"
            try verify(
                files, layout.size, folder.file(layout.topName), model, cut, isWritable: number % 2 == 0, context)
            if number % 50 == 7 { try judge(files, layout, folder, context) }
            // Here QEMU has to do with our log what we do with it.
            if layout.format == "vhdx", layout.peerFormat != nil, number % 8 == 2 {
                try letPeerReplay(files, layout, model, cut, context)
            }
        }
    }

    /// Makes the images and answers the stamps that the disk holds.
    private func makeChain(
        _ layout: Layout, _ folder: TemporaryFolder, _ generator: inout SeededGenerator
    ) throws -> [UInt32] {
        var stamps = [UInt32](repeating: 0, count: layout.sectors)
        if layout.hasParent {
            var base = NewImage(path: folder.file(layout.baseName))
            base.size = UInt64(layout.size)
            base.blockSize = layout.parentFormat == "vmdk" ? 8192 : nil
            try base.create()
            var options = DiskOptions(isWritable: true)
            options.lazyFlushInterval = 0
            let disk = try Disk.open(base.path, options: options)
            for stamp in 1...40 as ClosedRange<UInt32> {
                let start = Int.random(in: 0..<layout.sectors, using: &generator)
                let range = start..<min(layout.sectors, start + Int.random(in: 1...60, using: &generator))
                for sector in range { stamps[sector] = stamp }
                try disk.write(
                    range.flatMap { GuestModel.sector($0, stamp: stamp) }, at: UInt64(start * GuestModel.sectorSize))
            }
            try disk.close()
        }
        var top = NewImage(path: folder.file(layout.topName))
        top.size = UInt64(layout.size)
        top.format = layout.format
        top.variant = layout.variant
        top.blockSize = layout.blockSize
        top.options = layout.options
        if layout.hasParent { top.parent = folder.file(layout.baseName) }
        try top.create()
        return stamps
    }

    /// A guest's session, recorded.
    private func work(
        on path: String, _ count: Int, _ log: CrashLog, _ model: inout GuestModel, _ generator: inout SeededGenerator
    ) throws {
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        let disk = try Disk.open(path, options: options)
        for _ in 0..<60 {
            let start = Int.random(in: 0..<count, using: &generator)
            // Where blocks are large, some of what is written and discarded is, too.
            let longest = count > 1024 && Int.random(in: 0..<4, using: &generator) == 0 ? count / 3 : 150
            let length =
                Bool.random(using: &generator)
                ? Int.random(in: 1...16, using: &generator) : Int.random(in: 1...longest, using: &generator)
            let sectors = start..<min(count, start + length)
            let offset = UInt64(start * GuestModel.sectorSize)
            switch Int.random(in: 0..<10, using: &generator) {
            case 0...5: try disk.write(model.write(sectors, event: log.count), at: offset)
            case 6...7:
                model.discard(sectors, event: log.count)
                try disk.discard(offset: offset, length: UInt64(sectors.count * GuestModel.sectorSize))
            default:
                try disk.flush()
                model.flush(event: log.count)
            }
        }
        try disk.close()
        model.flush(event: log.count)
    }

    /// What the cut left, in files, for another tool to check: nothing worse than leaked space.
    private func judge(
        _ files: [String: [UInt8]], _ layout: Layout, _ folder: TemporaryFolder, _ context: String
    ) throws {
        guard layout.peerFormat != nil || ["vdi", "vhdx"].contains(layout.format) else { return }
        let remains = try TemporaryFolder()
        if let base = try? folder.read(layout.baseName) { try remains.write(base, to: layout.baseName) }
        for (path, bytes) in files { try remains.write(bytes, to: String(path.split(separator: "/").last ?? "")) }
        let path = remains.file(layout.topName)
        if layout.format == "vhdx" { return try SecondReader.vhdx.expectSound([path], isClosed: false, context) }
        guard let peer = layout.peerFormat else {
            do { try VDIReader.check(path, isOpen: true) } catch {
                Issue.record("\(context): \(error)")
            }
            return
        }
        let result = try Subprocess.run(["qemu-img", "check", "-f", peer, path])
        #expect(result.status == 0 || result.status == 3, "\(context): \(result.outputText) \(result.errorText)")
    }

    /// `qemu-img check` replays the log of a VHDX, and afterwards the disk holds what it must.
    private func letPeerReplay(
        _ files: [String: [UInt8]], _ layout: Layout, _ model: GuestModel, _ cut: Int, _ context: String
    ) throws {
        let remains = try TemporaryFolder()
        for (path, bytes) in files { try remains.write(bytes, to: String(path.split(separator: "/").last ?? "")) }
        let path = remains.file(layout.topName)
        // What QEMU cannot open although the specification says how; see docs/formats-vhdx.md.
        if try VHDX.hasTornLogEntry(path) { return }
        let result = try Subprocess.run(["qemu-img", "check", "-f", "vhdx", "-r", "all", path])
        #expect(result.status == 0, "\(context): \(result.outputText) \(result.errorText)")
        #expect(try !VHDX.header(of: path).hasLog, "\(context): QEMU left the log")
        let disk = try Disk.open(path)
        let content = try disk.read(at: 0, count: layout.size)
        let mistake = model.firstMistake(in: content, allowed: model.allowed(at: cut))
        #expect(mistake == nil, "\(context), replayed by QEMU: \(mistake ?? "")")
        try disk.close()
    }

    /// Opens the files as the cut left them and looks at every sector.
    private func verify(
        _ files: [String: [UInt8]], _ size: Int, _ path: String, _ model: GuestModel, _ cut: Int, isWritable: Bool,
        _ context: String
    ) throws {
        var options = DiskOptions(isWritable: isWritable)
        options.lazyFlushInterval = 0
        options.locksImages = false
        options.wrapStorage = { storage in
            guard let bytes = files[storage.name] else { return storage }
            return MemoryStorage(bytes, name: storage.name)
        }
        do {
            let disk = try Disk.open(path, options: options)
            let content = try disk.read(at: 0, count: size)
            if let mistake = model.firstMistake(in: content, allowed: model.allowed(at: cut)) {
                Issue.record("\(context): \(mistake)")
            }
            try disk.close()
        } catch {
            Issue.record("\(context): \(error)")
        }
    }
}

import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// The power fails at any moment of a session of writes, discards and flushes on a snapshot chain: afterwards the image
/// opens, what was flushed is there, and what was not is old or new.
@Suite(.serialized) struct PowerCutTests {
    private static let sectors = 1024
    private static let size = sectors * GuestModel.sectorSize

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
        var testDescription: String { name }

        var topName: String { "top.\(format)" }
        var baseName: String { "base.\(parentFormat)" }
    }

    static let layouts = vmdkLayouts + vdiLayouts + vhdLayouts + qedLayouts + qcow2Layouts

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

    /// Cuts of each layout; the seven of VMDK make 10,500 in a plain run.
    static var cutsPerLayout: Int { unsafe getenv("VDMOUNT_TORTURE") != nil ? 60_000 : 1_500 }

    @Test(arguments: layouts) func whatWasFlushedSurvivesEveryCut(_ layout: Layout) throws {
        let sessions = 6
        for session in 0..<sessions {
            let seed =
                UInt64(session) &* 7919
                &+ UInt64(truncatingIfNeeded: layout.name.utf8.reduce(5381) { $0 &* 33 &+ Int($1) })
            try runSession(layout, seed: seed, cuts: Self.cutsPerLayout / sessions)
        }
    }

    private func runSession(_ layout: Layout, seed: UInt64, cuts: Int) throws {
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let initial = try makeChain(layout, folder, &generator)
        let log = CrashLog()
        var model = GuestModel(initial: initial, firstStamp: 1_000_000)
        try work(on: folder.file(layout.topName), log, &model, &generator)

        // Every prefix of the session, as far as the number of cuts goes, and random ones.
        var positions = (0..<cuts).map { _ in Int.random(in: 0...log.count, using: &generator) }
        for position in 0...min(log.count, cuts - 1) { positions[position] = position }
        var replay = log.replay()
        for (number, cut) in positions.sorted().enumerated() {
            let percent = [10, 50, 90].randomElement(using: &generator) ?? 50
            let mode: CrashReplay.CutMode = [.all, .none, .some(percent: percent)][number % 3]
            let files = replay.files(at: cut, mode, using: &generator)
            let context = "\(layout.name), seed \(seed), cut \(cut) of \(log.count), \(mode)"
            try verify(files, folder.file(layout.topName), model, cut, isWritable: number % 2 == 0, context)
            if number % 50 == 7 { try judge(files, layout, folder, context) }
        }
    }

    /// Makes the images and answers the stamps that the disk holds.
    private func makeChain(
        _ layout: Layout, _ folder: TemporaryFolder, _ generator: inout SeededGenerator
    ) throws -> [UInt32] {
        var stamps = [UInt32](repeating: 0, count: Self.sectors)
        if layout.hasParent {
            var base = NewImage(path: folder.file(layout.baseName))
            base.size = UInt64(Self.size)
            base.blockSize = layout.parentFormat == "vmdk" ? 8192 : nil
            try base.create()
            var options = DiskOptions(isWritable: true)
            options.lazyFlushInterval = 0
            let disk = try Disk.open(base.path, options: options)
            for stamp in 1...40 as ClosedRange<UInt32> {
                let start = Int.random(in: 0..<Self.sectors, using: &generator)
                let range = start..<min(Self.sectors, start + Int.random(in: 1...60, using: &generator))
                for sector in range { stamps[sector] = stamp }
                try disk.write(
                    range.flatMap { GuestModel.sector($0, stamp: stamp) }, at: UInt64(start * GuestModel.sectorSize))
            }
            try disk.close()
        }
        var top = NewImage(path: folder.file(layout.topName))
        top.size = UInt64(Self.size)
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
        on path: String, _ log: CrashLog, _ model: inout GuestModel, _ generator: inout SeededGenerator
    ) throws {
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        let disk = try Disk.open(path, options: options)
        for _ in 0..<60 {
            let start = Int.random(in: 0..<Self.sectors, using: &generator)
            let length =
                Bool.random(using: &generator)
                ? Int.random(in: 1...16, using: &generator) : Int.random(in: 1...150, using: &generator)
            let sectors = start..<min(Self.sectors, start + length)
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
        guard layout.peerFormat != nil || layout.format == "vdi" else { return }
        let remains = try TemporaryFolder()
        if let base = try? folder.read(layout.baseName) { try remains.write(base, to: layout.baseName) }
        for (path, bytes) in files { try remains.write(bytes, to: String(path.split(separator: "/").last ?? "")) }
        guard let peer = layout.peerFormat else {
            do { try VDIReader.check(remains.file(layout.topName), isOpen: true) } catch {
                Issue.record("\(context): \(error)")
            }
            return
        }
        let result = try Subprocess.run(["qemu-img", "check", "-f", peer, remains.file(layout.topName)])
        #expect(result.status == 0 || result.status == 3, "\(context): \(result.outputText) \(result.errorText)")
    }

    /// Opens the files as the cut left them and looks at every sector.
    private func verify(
        _ files: [String: [UInt8]], _ path: String, _ model: GuestModel, _ cut: Int, isWritable: Bool, _ context: String
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
            let content = try disk.read(at: 0, count: Self.size)
            if let mistake = model.firstMistake(in: content, allowed: model.allowed(at: cut)) {
                Issue.record("\(context): \(mistake)")
            }
            try disk.close()
        } catch {
            Issue.record("\(context): \(error)")
        }
    }
}

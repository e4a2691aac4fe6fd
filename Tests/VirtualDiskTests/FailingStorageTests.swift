import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// The storage fails at any write, discard or flush of a session: the error reaches the caller, what follows works, and
/// what was flushed is there.
struct FailingStorageTests {
    private static let sectors = 1024

    /// A kind of fault.
    struct Fault: Sendable, CustomTestStringConvertible {
        let name: String
        let errno: Int32
        let lasts: Bool
        var testDescription: String { name }
    }

    static let faults = [
        Fault(name: "EIO once", errno: 5, lasts: false), Fault(name: "ENOSPC once", errno: 28, lasts: false),
        Fault(name: "EIO from then on", errno: 5, lasts: true),
    ]

    /// How the child is made.
    struct Layout: Sendable, CustomTestStringConvertible {
        let name: String
        var format = "vmdk"
        var variant: String?
        var blockSize: UInt64? = 4096
        var options: [String: String] = [:]
        /// The parent's format.
        var parentFormat = "vmdk"
        /// Whether blocks are moved to make the file shorter: nobody asked for that, and if there is no room for it,
        /// nobody is told.
        var movesBlocks = false
        var testDescription: String { name }

        var topName: String { "top.\(format)" }
        var baseName: String { "base.\(parentFormat)" }
    }

    static let layouts =
        [
            Layout(name: "dynamic", variant: "dynamic"),
            Layout(name: "split", variant: "split", options: ["split-size": "262144"]),
            Layout(name: "esx-sparse", variant: "esx-sparse"),
            Layout(name: "overlay", format: "overlay"),
        ] + vdiLayouts + vhdLayouts + vhdxLayouts + qedLayouts + qcow2Layouts

    @Test(arguments: faults, layouts) func everyEventFails(_ fault: Fault, _ layout: Layout) throws {
        let plan = FaultPlan(event: nil, errno: fault.errno)
        _ = try session(plan, layout)
        let count = try #require(plan.eventsWhenLifted)
        #expect(count > 20)
        for event in 0..<count {
            let plan = FaultPlan(event: event, errno: fault.errno, lasts: fault.lasts)
            let context = "\(layout.name), \(fault.name), event \(event) of \(count)"
            let errors = try session(plan, layout, context)
            let isOptional = layout.movesBlocks && fault.errno == 28
            #expect((errors > 0 || isOptional) && plan.failures > 0, "\(context): nobody was told")
        }
    }

    /// A session of writes, discards and flushes over a parent; answers how many calls failed.
    private func session(_ plan: FaultPlan, _ layout: Layout, _ context: String = "") throws -> Int {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 99)
        try makeChain(folder, layout)
        var model = GuestModel(
            initial: (0..<Self.sectors).map { $0 < 300 ? 7 : 0 }, firstStamp: 1000)
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { $0.traits.isWritable ? plan.wrap($0) : $0 }
        var errors = 0
        var disk: Disk?
        do { disk = try Disk.open(folder.file(layout.topName), options: options) } catch { errors += 1 }
        for step in 0..<24 {
            guard let disk else { break }
            if step == 20 { plan.lift() }
            let start = Int.random(in: 0..<Self.sectors - 64, using: &generator)
            let sectors = start..<start + Int.random(in: 1...64, using: &generator)
            do {
                switch step % 6 {
                case 0...2: try disk.write(model.write(sectors, event: step), at: UInt64(start * 512))
                case 3:
                    model.discard(sectors, event: step)
                    try disk.discard(offset: UInt64(start * 512), length: UInt64(sectors.count * 512))
                default:
                    try disk.flush()
                    model.flush(event: step)
                }
            } catch {
                errors += 1
                if step % 6 < 4 { model.lastChangeFailed() }
                if step >= 20 { Issue.record("\(context): step \(step) after the fault: \(error)") }
            }
        }
        do {
            try disk?.close()
            if disk != nil { model.flush(event: 100) }
        } catch { errors += 1 }
        try verify(folder.file(layout.topName), model, context)
        return errors
    }

    private func makeChain(_ folder: TemporaryFolder, _ layout: Layout) throws {
        var base = NewImage(path: folder.file(layout.baseName))
        base.size = UInt64(Self.sectors * 512)
        try base.create()
        let disk = try Disk.open(base.path, options: DiskOptions(isWritable: true))
        try disk.write((0..<300).flatMap { GuestModel.sector($0, stamp: 7) }, at: 0)
        try disk.close()
        var top = NewImage(path: folder.file(layout.topName))
        top.parent = base.path
        (top.format, top.variant, top.blockSize) = (layout.format, layout.variant, layout.blockSize)
        top.options = layout.options
        try top.create()
    }

    private func verify(_ path: String, _ model: GuestModel, _ context: String) throws {
        do {
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            let content = try disk.read(at: 0, count: Self.sectors * 512)
            try disk.close()
            if let mistake = model.firstMistake(in: content, allowed: model.allowed(at: 1000)) {
                Issue.record("\(context): \(mistake)")
            }
            let report = try ImageCheck.run(path)
            if report.remaining(.loss) + report.remaining(.repairable) > 0 {
                Issue.record("\(context): \(report.findings)")
            }
        } catch {
            Issue.record("\(context): \(error)")
        }
    }
}

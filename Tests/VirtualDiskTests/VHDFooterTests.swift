import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// There is no instant at which a VHD that grows has no footer at its end: not during a session that a power cut may
/// end anywhere, nor when the disk is full or fails.
struct VHDFooterTests {
    private static let size = 2 << 20
    private static let blockSize: UInt64 = 64 << 10

    /// Writes and discards all over the disk.
    private func work(on disk: Disk, _ generator: inout SeededGenerator, rounds: Int = 60) throws {
        for round in 0..<rounds {
            let start = Int.random(in: 0..<Self.size - 40_000, using: &generator)
            switch round % 6 {
            case 0...3:
                let data = [UInt8](repeating: UInt8(round + 1), count: Int.random(in: 1...40_000, using: &generator))
                try disk.write(data, at: UInt64(start))
            case 4: try disk.discard(offset: UInt64(start), length: 40_000 * 3 > Self.size - start ? 1 : 120_000)
            default: try disk.flush()
            }
        }
    }

    private func makeImage(_ folder: TemporaryFolder, isChild: Bool) throws -> String {
        guard isChild else { return try VHD.create(folder, "top.vhd", size: Self.size, blockSize: Self.blockSize) }
        try VHD.create(folder, "base.vhd", size: Self.size, blockSize: Self.blockSize)
        try VHD.write(folder.file("base.vhd"), [(9, 100, 1_500_000)])
        return try VHD.create(folder, "top.vhd", blockSize: Self.blockSize, parent: "base.vhd")
    }

    /// Every prefix of a session's events, with what was not flushed there in whole, not at all, or in part.
    @Test(arguments: [false, true]) func footerIsThereAtEveryInstant(_ isChild: Bool) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let path = try makeImage(folder, isChild: isChild)
        let footer = try folder.read("top.vhd").suffix(512)
        let log = CrashLog()
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
        let disk = try Disk.open(path, options: options)
        try work(on: disk, &generator)
        try disk.close()
        for percent in [0, 50, 100] {
            var replay = log.replay()
            for cut in 0...log.count {
                let mode: CrashReplay.CutMode = percent == 0 ? .none : percent == 100 ? .all : .some(percent: percent)
                let files = replay.files(at: cut, mode, using: &generator)
                let bytes = try #require(files[files.keys.first { $0.hasSuffix("top.vhd") } ?? ""])
                guard bytes.suffix(512) == footer, bytes.prefix(512) == footer else {
                    Issue.record("seed \(seed), \(percent) %, cut \(cut) of \(log.count): no footer at the end")
                    return
                }
                guard cut % 40 == 7 else { continue }
                let remains = try folder.write(bytes, to: "cut-\(percent)-\(cut).vhd")
                try VHD.expectSound([remains], isClosed: false, "seed \(seed), \(percent) %, cut \(cut)")
            }
        }
    }

    /// A session in which the n-th event fails, once or for good, or everything after it for want of space: whatever
    /// happened, the file ends with its footer, and all is well when it can be written again.
    @Test(arguments: [(28, false), (28, true), (5, false), (5, true), (27, true)] as [(Int32, Bool)], [false, true])
    func footerIsThereAfterEveryFailure(_ fault: (errno: Int32, lasts: Bool), _ isChild: Bool) throws {
        let count = try failingSession(FaultPlan(event: nil, errno: 0), isChild: isChild)
        #expect(count > 60)
        for event in stride(from: 0, to: count, by: 3) {
            let plan = FaultPlan(event: event, errno: fault.errno, lasts: fault.lasts)
            _ = try failingSession(plan, isChild: isChild, "errno \(fault.errno), event \(event)")
        }
    }

    @discardableResult
    private func failingSession(_ plan: FaultPlan, isChild: Bool, _ context: String = "") throws -> Int {
        let folder = try TemporaryFolder()
        let path = try makeImage(folder, isChild: isChild)
        let footer = try folder.read("top.vhd").suffix(512)
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { $0.traits.isWritable ? plan.wrap($0) : $0 }
        var generator = SeededGenerator(seed: 3)
        let disk = try Disk.open(path, options: options)
        for _ in 0..<24 {
            try? work(on: disk, &generator, rounds: 2)
            try? disk.flush()
            let file = try FileStorage(path: path, isWritable: false)
            let tail = try file.bytes(at: file.length() - 512, count: 512, for: .footer, "the footer")
            #expect(tail == Array(footer), "\(context): no footer at the end")
        }
        try? disk.close()
        let events = plan.events
        let file = try FileStorage(path: path, isWritable: false)
        let tail = try file.bytes(at: file.length() - 512, count: 512, for: .footer, "the footer")
        #expect(tail == Array(footer), "\(context): no footer at the end of the closed file")
        try VHD.write(path, [(1, 100, 70_000), (2, UInt64(Self.size) - 100, 100)])
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.loss) + report.remaining(.repairable) == 0, "\(context): \(report.findings)")
        return events
    }

    /// Where the file may not become long, the footer is put no further on than it must be.
    @Test func fileMayNotBecomeLong() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 1 << 30)
        let limit: UInt64 = 9 << 20
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { short($0, limit: limit) }
        let disk = try Disk.open(path, options: options)
        for block in 0..<4 as Range<UInt64> { try disk.write([7], at: block * 100 << 20) }
        #expect { try disk.write([7], at: 900 << 20) } throws: { ($0 as? DiskError)?.errno == 27 }
        try disk.write([8], at: 300 << 20)
        try disk.close()
        try VHD.expectSound([path])
        #expect(try ImageCheck.run(path).allocatedBlocks == 4)
    }

    /// A file that may become long is not flushed for each block.
    @Test func footerIsSeldomMoved() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 1 << 30)
        let log = CrashLog()
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { log.record($0) }
        let disk = try Disk.open(path, options: options)
        for block in 0..<100 as Range<UInt64> { try disk.write([7], at: block * 2 << 20) }
        // A bitmap and the guest's bytes each, and the footer moved twice.
        #expect(log.count <= 206)
        try disk.close()
        try VHD.expectSound([path])
    }

    /// On a device the footer stays where it is, and blocks lie before it.
    @Test func storageOfFixedLength() throws {
        let folder = try TemporaryFolder()
        let path = try VHD.create(folder, size: 64 << 20)
        let bytes = try folder.read("disk.vhd")
        // As on a logical volume: behind the image is whatever was there before, and the footer at its end.
        let device = try folder.write(
            bytes.dropLast(512) + [UInt8](repeating: 0xdd, count: 9 << 20) + bytes.suffix(512), to: "device.vhd")
        var options = DiskOptions(isWritable: true)
        options.lazyFlushInterval = 0
        options.wrapStorage = { short($0, limit: .max, hasFixedLength: true) }
        let disk = try Disk.open(device, options: options)
        var model = DiskModel(size: 64 << 20)
        for offset in [100, 20 << 20, 33 << 20, 40 << 20] {
            try disk.write([1, 2, 3], at: UInt64(offset))
            model.write([1, 2, 3], at: offset)
        }
        #expect { try disk.write([7], at: 50 << 20) } throws: { ($0 as? DiskError)?.errno == 28 }
        try disk.discard(offset: 20 << 20, length: 2 << 20)
        model.zero(20 << 20..<22 << 20)
        try disk.flush()
        try disk.write([7], at: 50 << 20)
        model.write([7], at: 50 << 20)
        #expect(try model.mistake(of: disk, in: 0..<model.size) == nil)
        try disk.close()
        #expect(try VHD.length(device) == UInt64(bytes.count + 9 << 20))
        let again = try Disk.open(device)
        #expect(try model.mistake(of: again, in: 0..<model.size) == nil)
        try again.close()
        try VHD.expectSound([device], isClosed: false)
        _ = path
    }
}

/// A storage that cannot become longer than it is said to; or one of fixed length.
private func short(_ storage: any Storage, limit: UInt64, hasFixedLength: Bool = false) -> any Storage {
    var traits = storage.traits
    traits.descriptor = -1
    traits.hasFixedLength = hasFixedLength
    return ObservedStorage(storage, traits: traits) { (access) throws(DiskError) in
        let limit = hasFixedLength ? try storage.length() : limit
        switch access {
        case .write(let offset, let bytes, _) where offset + UInt64(bytes.count) > limit:
            throw .system(EFBIG, "write")
        case .setLength(let length) where length > limit || hasFixedLength:
            throw .system(EFBIG, "set the length")
        default: break
        }
    }
}

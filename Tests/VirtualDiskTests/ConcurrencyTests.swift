import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Requests of many threads at once: everybody sees the own writes, nobody sees bytes from elsewhere.
struct ConcurrencyTests {
    static let kinds = DiskKind.all.filter { kind in
        [
            "raw", "dynamic, 64 KiB grains", "dynamic, 4 KiB grains, zero grains", "split",
            "ESX sparse, 512-byte grains",
            "small grains over large ones", "large grains over small ones", "over a compressed stream",
            "four images of four kinds", "overlay over grains", "overlay of 4 KiB blocks over a smaller raw base",
            "QED, small clusters over large ones", "QED over VMDK grains",
            "VDI, 4 KiB blocks", "VDI over VDI", "four VDIs",
            "QCOW2", "QCOW2, 512-byte clusters, 1-bit refcounts", "QCOW2, subclusters over a base",
            "QCOW2, subclusters of 512 bytes", "QCOW2, raw data file", "QCOW2 over a compressed one",
        ].contains(kind.name) || kind.name.hasPrefix("VHD")
    }

    /// Bytes that belong to one writer: cells of several writers share each block and many a sector.
    private static let cell = 3000
    private static let writers = 8

    /// What one writer's bytes look like: its number and a version.
    private static func value(_ writer: Int, _ version: Int) -> UInt8 { UInt8((writer + 1) << 4 | version & 15) }

    /// Also for what a flush that makes the file longer cuts off: a window of microseconds, once in hundreds of runs.
    static let rounds = unsafe getenv("VDMOUNT_TORTURE") != nil ? 100 : 3

    @Test(arguments: kinds) func eightWritersInTheSameBlocks(_ kind: DiskKind) throws {
        for _ in 0..<Self.rounds { try expectOwnBytes(kind) }
    }

    private func expectOwnBytes(_ kind: DiskKind) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var generator = SeededGenerator(seed: seed)
        let folder = try TemporaryFolder()
        let made = try kind.make(in: folder, pool: ConformanceTests.pool, using: &generator)
        let initial = made.model
        let disk = try Disk.open(made.path, options: kind.options(isWritable: true))
        let model = Locked(initial)
        let problems = Locked<[String]>([])
        onThreads(Self.writers + 2) { thread in
            var generator = SeededGenerator(seed: seed &+ UInt64(thread) &+ 1)
            do throws(DiskError) {
                if thread < Self.writers {
                    try Self.write(thread, disk, model, &generator)
                } else {
                    try Self.read(disk, initial, problems, &generator)
                }
            } catch {
                problems.withLock { $0.append("\(error)") }
            }
        }
        let context = "\(kind.name), seed \(seed)"
        for problem in problems.withLock({ $0.prefix(5) }) { Issue.record("\(context): \(problem)") }
        let final = model.withLock { $0 }
        if let mistake = try final.mistake(of: disk, in: 0..<final.size) { Issue.record("\(context): \(mistake)") }
        try disk.close()
        try ConformanceTests.expectSoundClosed(kind, made.path, final, context)
    }

    /// One writer's requests, to cells of its own.
    private static func write(
        _ writer: Int, _ disk: Disk, _ model: Locked<DiskModel>, _ generator: inout SeededGenerator
    ) throws(DiskError) {
        let cells = Int(disk.size) / Self.cell
        for version in 1...60 {
            let start = Int.random(in: 0..<cells / Self.writers, using: &generator) * Self.writers + writer
            let offset = start * Self.cell
            switch Int.random(in: 0..<10, using: &generator) {
            case 0..<7:
                let data = [UInt8](repeating: value(writer, version), count: Self.cell)
                try disk.write(data, at: UInt64(offset))
                model.withLock { $0.write(data, at: offset) }
            case 7..<9:
                try disk.discard(offset: UInt64(offset), length: UInt64(Self.cell))
                model.withLock { $0.zero(offset..<offset + Self.cell) }
            default: try disk.flush()
            }
            let seen = try disk.read(at: UInt64(offset), count: Self.cell)
            if let mistake = model.withLock({ $0.mistake(in: seen, at: offset) }) {
                throw DiskError(.system, "writer \(writer) after request \(version): \(mistake)")
            }
        }
    }

    /// Reads anywhere: each byte is what was there first, or zero, or its writer's.
    private static func read(
        _ disk: Disk, _ initial: DiskModel, _ problems: Locked<[String]>, _ generator: inout SeededGenerator
    ) throws(DiskError) {
        let first = initial.bytes
        for _ in 0..<150 {
            let offset = Int.random(in: 0..<first.count - 8000, using: &generator)
            let seen = try disk.read(at: UInt64(offset), count: 8000)
            for index in seen.indices where seen[index] != first[offset + index] && seen[index] != 0 {
                let writer = (offset + index) / Self.cell % Self.writers
                guard Int(seen[index] >> 4) != writer + 1 else { continue }
                let text = "byte \(offset + index) of writer \(writer) is \(seen[index]), was \(first[offset + index])"
                problems.withLock { $0.append(text) }
                return
            }
        }
    }

    /// Requests to a queue: all are answered once, and a flush comes after all before it and before all after it.
    @Test func flushIsABarrierOfTheQueue() async throws {
        let folder = try TemporaryFolder()
        let size = 4 << 20
        var image = NewImage(path: folder.file("disk.vmdk"))
        image.size = UInt64(size)
        try image.create()
        let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true))
        let queue = DiskQueue(disk)
        let answers = Locked<[String]>([])
        let perRound = 20
        for round in 0..<10 {
            for number in 0..<perRound {
                let offset = UInt64((round * perRound + number) * 4096 + 100)
                queue.write([UInt8](repeating: UInt8(round + 1), count: 4096), at: offset) { result in
                    answers.withLock { $0.append(Self.word(result, "write \(round)")) }
                }
            }
            queue.flush { result in answers.withLock { $0.append(Self.word(result, "flush \(round)")) } }
        }
        try await queue.flush()
        let list = answers.withLock { $0 }
        #expect(list.count == 10 * (perRound + 1))
        for round in 0..<10 {
            let part = list[round * (perRound + 1)..<(round + 1) * (perRound + 1)]
            #expect(part.dropLast().allSatisfy { $0 == "write \(round)" }, "round \(round): \(part)")
            #expect(part.last == "flush \(round)")
        }
        try await expectAwaitedRequestsInOrder(queue, size)
        try disk.close()
        let report = try Peer.run("qemu-img", "check", "-f", "vmdk", image.path)
        #expect(report.contains("No errors"))
    }

    private static func word(_ result: Result<Void, DiskError>, _ word: String) -> String {
        switch result {
        case .success: word
        case .failure(let error): "\(word): \(error)"
        }
    }

    /// The same with async/await: what one task wrote another reads, and errors arrive where they belong.
    private func expectAwaitedRequestsInOrder(_ queue: DiskQueue, _ size: Int) async throws {
        let block = 10_000
        let count = size / block
        try await withThrowingTaskGroup(of: Void.self) { group in
            for number in 0..<count {
                group.addTask {
                    let data = [UInt8](repeating: UInt8(number % 251 + 1), count: block)
                    try await queue.write(data, at: UInt64(number * block))
                    if number % 16 == 0 { try await queue.flush() }
                    let seen = try await queue.read(at: UInt64(number * block), count: block)
                    #expect(seen == data, "block \(number)")
                }
            }
            try await group.waitForAll()
        }
        try await queue.discard(offset: 0, length: UInt64(block))
        #expect(try await queue.read(at: 0, count: block) == [UInt8](repeating: 0, count: block))
        #expect(try await queue.read(at: UInt64(block), count: 1) == [2])
        await #expect(throws: DiskError.self) { try await queue.read(at: UInt64(size), count: 1) }
        await #expect(throws: DiskError.self) { try await queue.write([1], at: UInt64(size)) }
        await #expect(throws: DiskError.self) { try await queue.discard(offset: UInt64(size), length: 1) }
    }
}

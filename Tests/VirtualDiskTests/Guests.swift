import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Threads with a part of the disk each, which check what they read against what they wrote.
final class Guests: Sendable {
    private let disk: Disk
    private let state: Locked<(isEnding: Bool, mistakes: [String])>
    private let models: [Locked<DiskModel>]
    private let part: Int
    static let count = 3

    init(_ disk: Disk, _ model: DiskModel) {
        self.disk = disk
        part = model.size / Self.count
        state = Locked((false, []))
        models = (0..<Self.count).map { number in
            var own = DiskModel(size: model.size / Self.count)
            own.write(model.bytes.slice(number * own.size, own.size), at: 0)
            return Locked(own)
        }
    }

    var mistakes: [String] { state.withLock { $0.mistakes } }
    func end() { state.withLock { $0.isEnding = true } }

    /// Works until the end; `isWriting`: writes too.
    func run(_ number: Int, isWriting: Bool) {
        var generator = SeededGenerator(seed: UInt64(number) + 1)
        let pool = RandomPool(size: 1 << 20, seed: UInt64(number))
        var count = 0
        while !state.withLock({ $0.isEnding }) {
            count += 1
            do throws(DiskError) {
                try step(number, count, isWriting, pool, &generator)
            } catch {
                state.withLock { $0.mistakes.append("guest \(number), step \(count): \(error)") }
                return
            }
        }
    }

    private func step(
        _ number: Int, _ count: Int, _ isWriting: Bool, _ pool: RandomPool, _ generator: inout SeededGenerator
    ) throws(DiskError) {
        let start = Int.random(in: 0..<part - 1, using: &generator)
        let length = min(part - start, Int.random(in: 1...(count % 5 == 0 ? 300_000 : 9_000), using: &generator))
        let place = UInt64(number * part + start)
        var model = models[number].withLock { $0 }
        switch isWriting ? count % 4 : 0 {
        case 0, 2:
            if let mistake = try model.mistake(in: disk.read(at: place, count: length), at: start) {
                state.withLock { $0.mistakes.append("guest \(number), step \(count): \(mistake)") }
            }
        case 1:
            let data = pool.bytes(length, using: &generator)
            try disk.write(data, at: place)
            model.write(data, at: start)
        default:
            if count % 16 == 3 { try disk.flush() }
            try disk.discard(offset: place, length: UInt64(length))
            model.zero(start..<start + length)
        }
        models[number].withLock { $0 = model }
    }

    /// What the disk must hold.
    func content(of model: DiskModel) -> DiskModel {
        var whole = model
        for (number, part) in models.enumerated() {
            whole.write(part.withLock { $0.bytes }, at: number * self.part)
        }
        return whole
    }

    /// Runs `body` beside the guests; answers what the disk holds at the end.
    static func beside(
        _ disk: Disk, _ model: DiskModel, isWriting: Bool, _ body: @escaping @Sendable () throws(DiskError) -> Void
    ) throws -> DiskModel {
        let guests = Guests(disk, model)
        let failure = Locked<DiskError?>(nil)
        onThreads(count + 1) { number in
            if number < count { return guests.run(number, isWriting: isWriting) }
            do throws(DiskError) { try body() } catch { failure.withLock { $0 = error } }
            guests.end()
        }
        #expect(guests.mistakes.isEmpty, "\(guests.mistakes.prefix(3))")
        if let failure = failure.withLock({ $0 }) { throw failure }
        return guests.content(of: model)
    }
}

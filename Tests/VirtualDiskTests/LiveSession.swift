import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// A chain of four images in one format, whose sectors say which write they are of.
struct StampedChain {
    static let sectors = 8192 + 24

    let row: FormatRow
    let folder: TemporaryFolder
    /// What the disk of each image holds, the top one's first.
    let stamps: [[UInt32]]

    init(_ row: FormatRow, seed: UInt64) throws {
        self.row = row
        folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: seed)
        var now = [UInt32](repeating: 0, count: Self.sectors)
        var stamps: [[UInt32]] = []
        var stamp: UInt32 = 0
        for number in [3, 2, 1, 0] {
            var image = NewImage(path: Self.path(row, folder, number))
            image.size = UInt64(Self.sectors * 512)
            if number < 3, let making = row.child {
                (image.variant, image.blockSize, image.options) = (making.variant, making.blockSize, making.options)
                image.parent = Self.path(row, folder, number + 1)
            }
            try image.create()
            let disk = try Disk.open(image.path, options: row.options(isWritable: true))
            for step in 0..<10 {
                let start = Int.random(in: 0..<Self.sectors, using: &generator)
                let range = start..<min(Self.sectors, start + Int.random(in: 1...700, using: &generator))
                stamp += 1
                let isZero = step % 4 == 3
                for sector in range { now[sector] = isZero ? 0 : stamp }
                if isZero {
                    try disk.discard(offset: UInt64(start * 512), length: UInt64(range.count * 512))
                } else {
                    try disk.write(range.flatMap { GuestModel.sector($0, stamp: stamp) }, at: UInt64(start * 512))
                }
            }
            try disk.close()
            stamps.insert(now, at: 0)
        }
        self.stamps = stamps
    }

    /// One that is there, in a folder that another process has made.
    init(existing row: FormatRow, in path: String) {
        self.row = row
        folder = TemporaryFolder(existing: path)
        stamps = []
    }

    private init(_ other: StampedChain, in folder: TemporaryFolder) {
        (row, self.folder, stamps) = (other.row, folder, other.stamps)
    }

    func copy() throws -> StampedChain {
        let other = try TemporaryFolder()
        try Peer.run("cp", "-r", "--sparse=always", folder.path + "/.", other.path)
        return StampedChain(self, in: other)
    }

    private static func path(_ row: FormatRow, _ folder: TemporaryFolder, _ number: Int) -> String {
        folder.file(row.file("image\(number)"))
    }

    func path(_ number: Int) -> String { Self.path(row, folder, number) }
}

/// What is done to the chain of an open disk.
enum LiveChange: String, Sendable, CaseIterable, CustomTestStringConvertible {
    case down, commit, up, upIntoTop, snapshot, pop
    var testDescription: String { rawValue }

    static let merges: [LiveChange] = [.down, .commit, .up, .upIntoTop]

    func run(_ disk: Disk, _ control: OperationControl) throws(DiskError) {
        switch self {
        case .down: _ = try disk.merge(1, into: 3, keepsFiles: true, control: control)
        case .commit: _ = try disk.merge(0, into: 2, keepsFiles: true, control: control)
        case .up: _ = try disk.merge(3, into: 1, keepsFiles: true, control: control)
        case .upIntoTop: _ = try disk.merge(2, into: 0, keepsFiles: true, control: control)
        case .snapshot: _ = try disk.makeSnapshot()
        case .pop: try disk.popTop()
        }
    }
}

/// The guest of a disk whose chain changes: works step by step, the same steps each time, and knows what it may find.
final class SteppingGuest: @unchecked Sendable {  // works on one thread
    private let disk: Disk?
    private var generator: SeededGenerator
    /// What a power cut may leave.
    private(set) var model: GuestModel
    /// What reads may find now.
    private(set) var current: [[UInt32]]
    private(set) var steps = 0
    private(set) var failures = 0
    private let moment: () -> Int

    /// - Parameter disk: Nil: what the guest's steps make of the model.
    /// - Parameter moment: How many events there were so far.
    init(_ disk: Disk?, holding stamps: [UInt32], seed: UInt64, firstStamp: UInt32 = 1000, moment: @escaping () -> Int)
    {
        self.disk = disk
        generator = SeededGenerator(seed: seed)
        model = GuestModel(initial: stamps, firstStamp: firstStamp)
        current = stamps.map { [$0] }
        self.moment = moment
    }

    func work(_ count: Int) { for _ in 0..<count { step() } }

    /// `fails`: nobody knows whether it was done.
    func step(fails: Bool = false) {
        let start = Int.random(in: 0..<StampedChain.sectors, using: &generator)
        let longest = steps % 5 == 0 ? 900 : 40
        let range = start..<min(StampedChain.sectors, start + Int.random(in: 1...longest, using: &generator))
        let offset = UInt64(start * 512)
        defer { steps += 1 }
        switch Int.random(in: 0..<10, using: &generator) {
        case 0...5:
            let data = model.write(range, event: moment())
            let stamp = UInt32(data[0]) | UInt32(data[1]) << 8 | UInt32(data[2]) << 16 | UInt32(data[3]) << 24
            note(range, stamp, fails) { () throws(DiskError) in try disk?.write(data, at: offset) }
        case 6...7:
            model.discard(range, event: moment())
            note(range, 0, fails) { () throws(DiskError) in
                try disk?.discard(offset: offset, length: UInt64(range.count * 512))
            }
        default:
            do throws(DiskError) { try disk?.flush() } catch {
                failures += 1
                return
            }
            if !fails { model.flush(event: moment()) }
        }
    }

    private func note(_ range: Range<Int>, _ stamp: UInt32, _ fails: Bool, _ body: () throws(DiskError) -> Void) {
        var hasFailed = fails
        do throws(DiskError) { try body() } catch {
            failures += 1
            hasFailed = true
        }
        if hasFailed { model.lastChangeFailed() }
        for sector in range { current[sector] = hasFailed ? current[sector] + [stamp] : [stamp] }
    }

    /// What is wrong with what a disk shows; nil: nothing, or it cannot be read.
    func mistake(of disk: Disk) -> String? {
        var position = 0
        while position < StampedChain.sectors {
            let count = min(1024, StampedChain.sectors - position)
            if let bytes = try? disk.read(at: UInt64(position * 512), count: count * 512),
                let mistake = mistake(in: bytes, from: position, current)
            {
                return mistake
            }
            position += count
        }
        return nil
    }

    /// What is wrong with the sectors from `first` on.
    private func mistake(in bytes: [UInt8], from first: Int, _ allowed: [[UInt32]]) -> String? {
        for sector in 0..<bytes.count / 512 {
            let stamps = allowed[first + sector]
            let content = bytes.slice(sector * 512, 512)
            if !stamps.contains(where: { GuestModel.sector(first + sector, stamp: $0) == content }) {
                return "sector \(first + sector) begins with \(content.prefix(8)), allowed are the stamps \(stamps)"
            }
        }
        return nil
    }
}

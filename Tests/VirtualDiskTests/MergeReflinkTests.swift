import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// On file systems with reflinks merges and rebases share blocks, with the disk open or not: hardly any space is taken,
/// and all that is left reads as it should. A power cut in between leaves the disk as it was.
@Suite(.serialized) struct MergeReflinkTests {
    static let rows = ChainMergeTests.rows
    private static let size = 48 << 20
    private static let pool = RandomPool(seed: 11)

    /// What is done to a chain of three images.
    enum Change: String, CaseIterable {
        case down, up, flatten, liveCommit, liveDown, liveUp

        /// The image that shows what the top one did.
        var top: Int { self == .liveCommit ? 2 : 0 }

        func run(_ chain: BigChain, _ control: OperationControl = OperationControl()) throws(DiskError) {
            switch self {
            case .down, .up:
                var merge = ChainMerge(top: chain.path(0))
                merge.source = .number(self == .down ? 1 : 2)
                merge.target = .number(self == .down ? 2 : 1)
                merge.keepsFiles = true
                _ = try merge.run(control)
            case .flatten: try ChainRebase(chain.path(0), parent: nil).run(control)
            case .liveCommit, .liveDown, .liveUp:
                let disk = try Disk.open(chain.path(0), options: chain.row.options(isWritable: true))
                do throws(DiskError) {
                    let pair = [.liveCommit: (0, 2), .liveDown: (1, 2)][self] ?? (2, 0)
                    _ = try disk.merge(pair.0, into: pair.1, keepsFiles: true, control: control)
                } catch {
                    try? disk.close()
                    throw error
                }
                try disk.close()
            }
        }
    }

    /// Images with some mebibytes of their own each.
    struct BigChain {
        let row: FormatRow
        let folder: String
        private(set) var model = DiskModel(size: MergeReflinkTests.size)

        init(_ row: FormatRow, in folder: String, seed: UInt64) throws {
            self.row = row
            self.folder = folder
            var generator = SeededGenerator(seed: seed)
            for number in [2, 1, 0] {
                var image = NewImage(path: "\(folder)/\(row.file("image\(number)"))")
                image.size = UInt64(MergeReflinkTests.size)
                if number < 2, let making = row.child {
                    (image.variant, image.blockSize, image.options) = (making.variant, making.blockSize, making.options)
                    image.parent = "\(folder)/\(row.file("image\(number + 1)"))"
                }
                try image.create()
                let disk = try Disk.open(image.path, options: row.options(isWritable: true))
                for place in [number, number + 4, number + 8, number + 20, 30, 31, 40 - number] {
                    let data = MergeReflinkTests.pool.bytes(1 << 20, using: &generator)
                    try disk.write(data, at: UInt64(place) << 20)
                    model.write(data, at: place << 20)
                }
                // An odd piece, and zeros over what lies below.
                let data = MergeReflinkTests.pool.bytes(70_001, using: &generator)
                try disk.write(data, at: UInt64(15 << 20 + 333 + number * 40_000))
                model.write(data, at: 15 << 20 + 333 + number * 40_000)
                try disk.discard(offset: UInt64(9 + number) << 20, length: 1 << 20)
                model.zero((9 + number) << 20..<(10 + number) << 20)
                try disk.close()
            }
        }

        func path(_ number: Int) -> String { "\(folder)/\(row.file("image\(number)"))" }

        /// `wasCut`: space may be lost.
        func expectShown(_ number: Int, _ context: String, wasCut: Bool = false) throws {
            let disk = try Disk.open(path(number), options: row.options(isWritable: false))
            #expect(try model.mistake(of: disk, in: 0..<model.size) == nil, "\(context)")
            try disk.close()
            let report = try ImageCheck.run(path(number), options: row.options(isWritable: false))
            let worst = report.remaining(.loss) + (wasCut ? 0 : report.remaining(.repairable))
            #expect(worst == 0, "\(context): \(report.findings)")
        }
    }

    @Test(arguments: ["xfs", "btrfs"]) func mergesShareBlocks(_ type: String) throws {
        let folder = try TemporaryFolder()
        let system = try LoopFileSystem(type, in: folder)
        defer { system.unmount() }
        for row in Self.rows {
            for change in Change.allCases {
                let place = "\(system.path)/\(row.format)-\(change.rawValue)"
                try Peer.run("mkdir", place)
                let chain = try BigChain(row, in: place, seed: 1)
                let before = try system.usedBytes()
                try change.run(chain)
                let after = try system.usedBytes()
                let context = "\(type): \(row.format), \(change)"
                // All images are there still: eight mebibytes and more would have been copied.
                #expect(after < before + (3 << 20), "\(context): \(before) bytes were in use, and now \(after)")
                try chain.expectShown(change.top, context)
                try Peer.run("rm", "-r", place)
            }
        }
    }

    @Test func aPowerCutInBetweenLeavesTheDisk() throws {
        let folder = try TemporaryFolder()
        let system = try LoopFileSystem("xfs", in: folder)
        defer { system.unmount() }
        for row in Self.rows {
            for change in Change.allCases {
                let place = "\(system.path)/\(row.format)-\(change.rawValue)"
                try Peer.run("mkdir", place)
                let chain = try BigChain(row, in: place, seed: 2)
                try Peer.run("sync", "-f", place)
                let isCut = Locked(false)
                let control = OperationControl { progress in
                    guard progress.fraction > 0.6, !isCut.withLock({ $0 }) else { return }
                    isCut.withLock { $0 = true }
                    try? system.cutPower()
                }
                let context = "\(row.format), \(change), cut"
                #expect(throws: DiskError.self, "\(context)") { try change.run(chain, control) }
                try system.restart()
                try chain.expectShown(0, context, wasCut: true)
                try change.run(chain)
                try chain.expectShown(change.top, "\(context), done again", wasCut: true)
                try Peer.run("rm", "-r", place)
            }
        }
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// A repair that is tried first says what the real one then does, and changes nothing.
struct DryRunTests {
    static let cases = FormatRow.all.filter(\.isWritable).flatMap { row in
        row.ours.map { ResizedImage.Case(row: row, making: $0) }
    }

    /// What came of it, in words.
    private func outcome(_ body: () throws -> CheckReport) -> [String] {
        do {
            let report = try body()
            let counts = report.counts.map { "\($0.key): \($0.value)" }.sorted()
            let repaired = report.repairedCounts.filter { $0.value > 0 }.map { "repaired \($0.key): \($0.value)" }
            return report.findings.map { "\($0.severity): \($0.message), \($0.isRepaired)" } + counts
                + repaired.sorted()
        } catch {
            return ["\(error)"]
        }
    }

    @Test(arguments: cases) func dryRunSaysWhatARepairDoes(_ test: ResizedImage.Case) throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 41)
        let image = try ResizedImage(test, in: folder, size: (3 << 20) + 512, using: &generator)
        let whole = try folder.snapshotOfAll()
        let name = test.row.file("top")
        let length = whole[name]?.count ?? 0
        // Headers and tables are at the beginning, as a rule.
        let reach = min(length, test.row.format == "vhdx" ? 4 << 20 : 256 << 10)
        for round in 0..<12 {
            try folder.restore(whole)
            let file = try FileStorage(path: image.path, isWritable: true)
            for _ in 0..<round where length > 0 {
                let place = Int.random(in: 0..<reach, using: &generator)
                // Whatever is there is a number more or less.
                let old = try file.bytes(at: UInt64(place), count: 1, for: .table, "a byte")
                try file.write([old[0] &+ 1], at: UInt64(place), for: .table)
            }
            if round % 4 == 3, length > 1024 { try file.setLength(UInt64(length - 512)) }
            let before = try folder.snapshotOfAll()
            let options = test.row.options(isWritable: false)
            let planned = outcome { try ImageCheck.dryRun(image.path, options: options) }
            #expect(try folder.snapshotOfAll() == before, "\(test.testDescription), round \(round): something changed")
            let done = outcome {
                try ImageCheck.run(image.path, options: test.row.options(isWritable: true), repair: true)
            }
            #expect(planned == done, "\(test.testDescription), round \(round)")
        }
    }

    /// Reads and writes of what seems to be a file, beside a model.
    @Test func scratchStorageHoldsWhatIsWritten() throws {
        let folder = try TemporaryFolder()
        var generator = SeededGenerator(seed: 42)
        let pool = RandomPool(size: 1 << 20, seed: 43)
        var model = pool.bytes(200_000, using: &generator)
        let path = try folder.write(model, to: "file")
        let before = model
        let storage = try ScratchStorage(FileStorage(path: path, isWritable: false), folder: folder.path)
        for _ in 0..<400 {
            let start = Int.random(in: 0..<300_000, using: &generator)
            let count = Int.random(in: 1...20_000, using: &generator)
            switch Int.random(in: 0..<5, using: &generator) {
            case 0, 1:
                let bytes = pool.bytes(count, using: &generator)
                try storage.write(bytes, at: UInt64(start), for: .guestData)
                if model.count < start + count { model += [UInt8](repeating: 0, count: start + count - model.count) }
                model.replaceSubrange(start..<start + count, with: bytes)
            case 2:
                let end = min(model.count, start + count)
                guard start < end else { continue }
                try storage.discard(UInt64(start)..<UInt64(end), mustZero: true, for: .guestData)
                model.replaceSubrange(start..<end, with: repeatElement(0, count: end - start))
            case 3:
                try storage.setLength(UInt64(start))
                if start < model.count {
                    model.removeLast(model.count - start)
                } else {
                    model += [UInt8](repeating: 0, count: start - model.count)
                }
            default: break
            }
            #expect(try storage.length() == UInt64(model.count))
            let found = try storage.availableBytes(at: 0, count: 400_000, for: .guestData)
            #expect(found == model)
            // Where there is no data, there are zeros.
            var position: UInt64 = 0
            while let data = try storage.nextData(from: position) {
                let hole = model[
                    Int(min(position, UInt64(model.count)))..<Int(min(data.lowerBound, UInt64(model.count)))]
                #expect(hole.allSatisfy { $0 == 0 })
                position = data.upperBound
            }
        }
        #expect(try folder.read("file") == before)
    }
}

import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// The power fails, or the storage, at any moment of a change of what an image says, or of its size: afterwards it
/// opens, is as before or as after, shows the same bytes, and what was begun can be done again.
struct EditingPowerCutTests {
    /// What happens to an image.
    struct Change: Sendable, CustomTestStringConvertible {
        var layout: BackendResizeTests.Layout
        /// The new size; nil: the comment and all else that it can store is changed.
        var size: Int?
        var testDescription: String { "\(layout.name), \(size.map { "to \($0)" } ?? "set")" }
    }

    static let changes = BackendResizeTests.layouts.flatMap { layout in
        layout.sizes.dropFirst().prefix(3).filter { $0 <= 20 << 20 }.map { Change(layout: layout, size: $0) }
            + (layout.format == "raw" ? [] : [Change(layout: layout, size: nil)])
    }

    /// An image with some content, and what is to become of it.
    private struct Subject {
        let change: Change
        let folder: TemporaryFolder
        let path: String
        let before: [String: [UInt8]]
        let metadata: ImageMetadata
        let old: DiskModel
        let new: DiskModel
        var edit = ImageChanges()

        var row: FormatRow { change.layout.row }

        init(_ change: Change, _ random: inout SeededGenerator) throws {
            self.change = change
            folder = try TemporaryFolder()
            path = try BackendResizeTests.make(change.layout, in: folder)
            var model = DiskModel(size: change.layout.sizes[0])
            let row = change.layout.row
            try BackendResizeTests.fill(path, row, &model, &random)
            old = model
            new = model.resized(to: change.size ?? model.size)
            before = try folder.snapshotOfAll()
            metadata = try ImageInformation.read(path, options: row.options(isWritable: false))[0].metadata
            edit.metadata.comment = String(repeating: "changed ", count: change.layout.format == "vmdk" ? 100 : 20)
            edit.metadata.uuid = .random()
        }

        /// Makes the change.
        func perform(_ path: String, wrap: (@Sendable (any Storage) -> any Storage)? = nil) throws {
            if let size = change.size {
                try BackendResizeTests.resize(path, to: UInt64(size), row, wrap: wrap)
            } else {
                var options = row.options(isWritable: true)
                if let wrap { options.wrapStorage = { $0.traits.isWritable ? wrap($0) : $0 } }
                try ImageEditor.apply(edit, to: path, options: options)
            }
        }

        /// Looks at the image and does the change again; answers whether the change was there.
        func verify(_ image: String, isWritable: Bool, _ context: String) throws -> Bool {
            let found = try ImageInformation.read(image, options: row.options(isWritable: false))[0]
            let isOld = change.size == nil ? found.metadata == metadata : found.virtualSize == UInt64(old.size)
            if change.size == nil, !isOld { #expect(edit.metadata.isContained(in: found.metadata), "\(context)") }
            let disk = try Disk.open(image, options: row.options(isWritable: isWritable))
            let model = isOld ? old : new
            #expect(Int(disk.size) == model.size, "\(context): the disk has \(disk.size) bytes")
            let mistake = try model.mistake(of: disk, in: 0..<min(model.size, Int(disk.size)))
            #expect(mistake == nil, "\(context): \(mistake ?? "")")
            try disk.close()
            try perform(image)
            let again = try Disk.open(image, options: row.options(isWritable: false))
            let wrong = try new.mistake(of: again, in: 0..<Int(again.size))
            #expect(Int(again.size) == new.size && wrong == nil, "\(context), done again: \(wrong ?? "")")
            try again.close()
            return !isOld
        }
    }

    @Test(arguments: changes) func oldOrNew(_ change: Change) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededGenerator(seed: seed)
        let subject = try Subject(change, &random)
        let log = CrashLog()
        try subject.perform(subject.path) { log.record($0) }
        var replay = log.replay()
        let step = max(1, log.count / 25)
        var seen: Set<Bool> = []
        for (number, cut) in stride(from: 0, through: log.count, by: step).enumerated() {
            for mode in [CrashReplay.CutMode.all, .none, .some(percent: 50)] {
                let files = replay.files(at: cut, mode, using: &random)
                let context = "\(change), seed \(seed), cut \(cut) of \(log.count), \(mode)"
                let remains = try TemporaryFolder()
                var contents = subject.before
                for (name, bytes) in files { contents[String(name.split(separator: "/").last ?? "")] = bytes }
                for (name, bytes) in contents { try remains.write(bytes, to: name) }
                do {
                    let image = remains.file("disk.\(change.layout.format)")
                    seen.insert(try subject.verify(image, isWritable: number % 2 == 0, context))
                } catch {
                    Issue.record("\(context): \(error)")
                }
            }
        }
        #expect(seen.count == 2, "\(change): both states were seen")
    }

    /// The file system is full, or fails once.
    @Test(arguments: changes) func failure(_ change: Change) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededGenerator(seed: seed)
        let subject = try Subject(change, &random)
        let counting = FaultPlan(event: nil, errno: 28)
        try subject.perform(subject.path) { counting.wrap($0) }
        let step = max(1, counting.events / 12)
        for event in stride(from: 0, to: counting.events, by: step) {
            let lasts = event % 2 == 0
            let context = "\(change), seed \(seed), failure \(event) of \(counting.events)\(lasts ? ", lasting" : "")"
            let remains = try TemporaryFolder()
            for (name, bytes) in subject.before { try remains.write(bytes, to: name) }
            let image = remains.file("disk.\(change.layout.format)")
            let plan = FaultPlan(event: event, errno: 28, lasts: lasts)  // ENOSPC
            #expect(throws: DiskError.self, "\(context)") { try subject.perform(image) { plan.wrap($0) } }
            let names = try remains.snapshotOfAll().keys.sorted()
            do {
                let isNew = try subject.verify(image, isWritable: false, context)
                #expect(isNew || names == subject.before.keys.sorted(), "\(context): it left \(names)")
            } catch {
                Issue.record("\(context): \(error)")
            }
        }
    }
}

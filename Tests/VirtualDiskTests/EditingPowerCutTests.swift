import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import VirtualDisk

/// The power fails at any moment of a change of what an image says, or of its size: afterwards it opens, is as before
/// or as after, shows the same bytes, and what was begun can be done again.
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

    @Test(arguments: changes) func oldOrNew(_ change: Change) throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        var random = SeededGenerator(seed: seed)
        let row = change.layout.row
        let folder = try TemporaryFolder()
        let path = try BackendResizeTests.make(change.layout, in: folder)
        var old = DiskModel(size: change.layout.sizes[0])
        try BackendResizeTests.fill(path, row, &old, &random)
        let before = try folder.snapshotOfAll()
        let metadata = try ImageInformation.read(path, options: row.options(isWritable: false))[0].metadata
        var edit = ImageChanges()
        edit.metadata.comment = String(repeating: "changed ", count: change.layout.format == "vmdk" ? 100 : 20)
        edit.metadata.uuid = .random()
        let log = CrashLog()
        if let size = change.size {
            try BackendResizeTests.resize(path, to: UInt64(size), row, wrap: log)
        } else {
            var options = row.options(isWritable: true)
            options.wrapStorage = { $0.traits.isWritable ? log.record($0) : $0 }
            try ImageEditor.apply(edit, to: path, options: options)
        }
        let new = old.resized(to: change.size ?? old.size)
        #expect(log.count > 0)

        var replay = log.replay()
        let step = max(1, log.count / 30)
        var seen: Set<Int> = []
        for (number, cut) in stride(from: 0, through: log.count, by: step).enumerated() {
            for mode in [CrashReplay.CutMode.all, .none, .some(percent: 50)] {
                let files = replay.files(at: cut, mode, using: &random)
                let context = "\(change), seed \(seed), cut \(cut) of \(log.count), \(mode)"
                let remains = try TemporaryFolder()
                var contents = before
                for (name, bytes) in files { contents[String(name.split(separator: "/").last ?? "")] = bytes }
                for (name, bytes) in contents { try remains.write(bytes, to: name) }
                let image = remains.file("disk.\(change.layout.format)")
                do {
                    let found = try ImageInformation.read(image, options: row.options(isWritable: false))[0]
                    let isOld = found.metadata == metadata
                    #expect(
                        change.size != nil || isOld || edit.metadata.isContained(in: found.metadata), "\(context)")
                    let disk = try Disk.open(image, options: row.options(isWritable: number % 2 == 0))
                    let model = Int(disk.size) == old.size ? old : new
                    #expect(Int(disk.size) == model.size, "\(context): the disk has \(disk.size) bytes")
                    seen.insert(change.size == nil ? (isOld ? 0 : 1) : Int(disk.size))
                    let mistake = try model.mistake(of: disk, in: 0..<min(model.size, Int(disk.size)))
                    #expect(mistake == nil, "\(context): \(mistake ?? "")")
                    try disk.close()
                    if let size = change.size {
                        try BackendResizeTests.resize(image, to: UInt64(size), row)
                    } else {
                        try ImageEditor.apply(edit, to: image, options: row.options(isWritable: true))
                    }
                    let again = try Disk.open(image, options: row.options(isWritable: false))
                    let wrong = try new.mistake(of: again, in: 0..<Int(again.size))
                    #expect(Int(again.size) == new.size && wrong == nil, "\(context), done again: \(wrong ?? "")")
                    try again.close()
                } catch {
                    Issue.record("\(context): \(error)")
                }
            }
        }
        #expect(seen.count == 2, "\(change): both states were seen")
    }
}

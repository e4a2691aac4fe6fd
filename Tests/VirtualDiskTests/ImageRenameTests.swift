import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import VirtualDisk

/// Images get other names and other folders, with all their files and still over their parents, and one that is stopped
/// in between is there under one of its names.
struct ImageRenameTests {
    private static let pool = RandomPool(seed: 29)
    private static let size = 4 << 20

    static let cases = FormatMatrixTests.cases.filter { $0.making != nil && $0.row.format != "overlay" }

    private struct Stop: Error {}

    /// A folder with an image in it.
    private func make(_ test: FormatMatrixTests.Case) throws -> (folder: TemporaryFolder, image: MatrixImage) {
        let folder = try TemporaryFolder()
        var image = try MatrixImage(test, in: folder, size: Self.size, pool: Self.pool)
        try image.weWrite("before")
        return (folder, image)
    }

    private func expect(_ path: String, _ image: MatrixImage, _ context: String) throws {
        let disk = try Disk.open(path, options: image.row.options(isWritable: false))
        let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size)
        #expect(disk.size == UInt64(image.model.size) && mistake == nil, "\(context): \(mistake ?? "")")
        try disk.close()
    }

    private func names(_ folder: String) throws -> [String] {
        // (A folder in which others looked at the image stays behind.)
        try Peer.run("ls", "-A", folder).split(separator: "\n").map(String.init).filter { $0 != "judge-mount" }
    }

    @Test(arguments: cases) func anotherNameAndAnotherFolder(_ test: FormatMatrixTests.Case) throws {
        let (folder, image) = try make(test)
        let options = image.row.options(isWritable: false)
        let before = try names(folder.path)
        let second = folder.file("new name.\(image.row.format)")
        let outcome = try ImageRename.run(image.path, to: second, options: options)
        #expect(outcome.path == second && !outcome.isContinuation)
        try expect(second, image, "\(test), renamed")
        let after = try names(folder.path)
        #expect(after.count == before.count, "\(test): \(after)")
        let others = after.filter { !$0.hasPrefix("new name") && $0 != "base.data" }
        #expect(others.isEmpty, "\(test): \(others)")
        if image.row.isCheckedByPeer, let peer = image.row.peer, !test.isESX {
            try Peer.run("qemu-img", "check", "-q", "-f", peer, second)
        }
        try Peer.run("mkdir", folder.file("there"))
        if test.making?.options["data-file"] != nil {
            // It is named by its full path, as QEMU needs it.
            let error = #expect(throws: DiskError.self, "\(test)") {
                try ImageRename.run(second, to: folder.file("there"), options: options)
            }
            #expect(error?.kind == .unsupported, "\(test)")
            return try expect(second, image, "\(test), not moved")
        }
        try ImageRename.run(second, to: folder.file("there"), options: options)
        let third = folder.file("there/new name.\(image.row.format)")
        try expect(third, image, "\(test), moved")
        #expect(try names(folder.path) == ["there"], "\(test)")
        let error = #expect(throws: DiskError.self) {
            try ImageRename.run(second, to: folder.file("x"), options: options)
        }
        #expect(error?.kind == .notFound)
    }

    /// A child that names its parent by a relative path finds it from where it is then.
    @Test(arguments: FormatRow.all.filter { $0.child != nil }) func childMoves(_ row: FormatRow) throws {
        let folder = try TemporaryFolder()
        var image = try MatrixImage.base(row, in: folder, size: Self.size, pool: Self.pool)
        try image.weWrite("the parent")
        try image.makeSnapshot(row)
        try image.weWrite("the child")
        let information = try ImageInformation.read(image.path, options: row.options(isWritable: false))
        let hasPath = information[0].parent.map { !$0.paths.isEmpty } ?? false
        try Peer.run("mkdir", folder.file("there"))
        guard row.format != "overlay" else {
            // It stores a path that cannot be changed.
            let before = try folder.snapshotOfAll()
            let error = #expect(throws: DiskError.self) {
                try ImageRename.run(image.path, to: folder.file("there/moved"), options: row.options(isWritable: false))
            }
            #expect(error?.kind == .unsupported)
            #expect(try folder.snapshotOfAll() == before)
            return
        }
        let new = folder.file("there/moved.\(row.format)")
        try ImageRename.run(image.path, to: new, options: row.options(isWritable: false))
        var options = row.options(isWritable: false)
        options.allowedFolders = [folder.path]
        let disk = try Disk.open(new, options: options)
        let mistake = try image.model.mistake(of: disk, in: 0..<image.model.size)
        #expect(mistake == nil, "\(row): \(mistake ?? "")")
        try disk.close()
        guard hasPath else { return }
        let link = try ImageInformation.read(new, options: row.options(isWritable: false))[0].parent
        #expect(
            link?.paths.first.map { !$0.hasPrefix("/") || row.format != "vhd" } ?? false, "\(row): \(link?.paths ?? [])"
        )
        // Both move together with a rename of the folder.
        if Judge.canFollow(row, [row]) { try Peer.run("qemu-img", "compare", "-q", new, new) }
    }

    @Test func refusals() throws {
        let folder = try TemporaryFolder()
        var new = NewImage(path: folder.file("a.vmdk"))
        (new.size, new.variant) = (1 << 20, "split-fixed")
        try new.create()
        try folder.write([1], to: "b.vmdk")
        try folder.write([1], to: "c-f001.vmdk")
        try Peer.run("ln", "-s", "a.vmdk", folder.file("link.vmdk"))
        let before = try folder.snapshotOfAll()
        for (old, new) in [
            ("a.vmdk", "b.vmdk"), ("a.vmdk", "c.vmdk"), ("link.vmdk", "d.vmdk"), ("a.vmdk", "nowhere/d.vmdk"),
            ("a.vmdk", "a.vmdk"),
        ] {
            #expect(throws: DiskError.self, "\(old) to \(new)") {
                try ImageRename.run(folder.file(old), to: folder.file(new))
            }
        }
        for isWritable in [true, false] {
            let disk = try Disk.open(new.path, options: DiskOptions(isWritable: isWritable))
            let error = #expect(throws: DiskError.self) { try ImageRename.run(new.path, to: folder.file("d.vmdk")) }
            #expect(error?.kind == .locked)
            try disk.close()
        }
        #expect(try folder.snapshotOfAll() == before)
    }

    /// Stopped before each step, in the same file system and on the way to another.
    @Test(arguments: ["split", "fixed", "dynamic"], [true, false]) func stopped(_ variant: String, _ isFar: Bool) throws
    {
        let test = FormatMatrixTests.Case(
            row: try #require(FormatRow.all.first { $0.format == "vmdk" }),
            making: .init(variant: variant, options: variant == "split" ? ["split-size": "1048576"] : [:]),
            peerOptions: "")
        // Another file system, if there is one.
        var status = (stat(), stat())
        guard unsafe stat("/dev/shm", &status.0) == 0, unsafe stat("/tmp", &status.1) == 0,
            status.0.st_dev != status.1.st_dev || !isFar
        else { return }
        for stop in 0..<12 {
            let (folder, image) = try make(test)
            let place = isFar ? "/dev/shm/\(folder.path.split(separator: "/").last ?? "")" : folder.path
            if isFar { try Peer.run("mkdir", place) }
            defer { if isFar { _ = try? Subprocess.run(["rm", "-rf", place]) } }
            let new = "\(place)/other.vmdk"
            let counter = Counter()
            var rename = ImageRename(options: DiskOptions(), control: OperationControl())
            rename.cleansUp = false
            rename.beforeStep = { (step) throws(DiskError) in
                if counter.next() == stop { throw DiskError(.cancelled, step) }
            }
            let context = "\(variant), \(isFar ? "far" : "near"), stopped at \(stop)"
            do {
                _ = try rename.run(image.path, to: new)
                try expect(new, image, context)
                #expect(stop >= 3, "\(context): it has that many steps")
                return
            } catch {
                let paths = try [image.path, new].filter { try FileMover.exists($0) }
                #expect(!paths.isEmpty, "\(context)")
                for path in paths { try expect(path, image, "\(context), \(path)") }
            }
            do {
                try ImageRename.run(image.path, to: new)
                try expect(new, image, "\(context), again")
                let left = try names(place)
                #expect(left.allSatisfy { $0.hasPrefix("other") }, "\(context): \(left)")
            } catch let error as DiskError {
                // A copy cannot be told from something else: the message says what to do.
                #expect(isFar && "\(error)".contains("remove") || error.kind == .notFound, "\(context): \(error)")
            }
        }
        Issue.record("it has more steps than are stopped")
    }

    /// A failure leaves nothing behind.
    @Test func failure() throws {
        let (folder, image) = try make(
            FormatMatrixTests.Case(
                row: try #require(FormatRow.all.first { $0.format == "vmdk" }),
                making: .init(variant: "split", options: ["split-size": "1048576"]), peerOptions: ""))
        let before = try folder.snapshotOfAll()
        let control = OperationControl()
        var rename = ImageRename(options: DiskOptions(), control: control)
        rename.beforeStep = { (step) throws(DiskError) in if step.contains("s003") { control.cancel() } }
        #expect(throws: DiskError.self) { try rename.run(image.path, to: folder.file("new.vmdk")) }
        #expect(try folder.snapshotOfAll() == before)
    }
}

extension FormatMatrixTests.Case {
    /// Whether qemu-img has no check for it.
    fileprivate var isESX: Bool { making?.variant.map { ["fixed", "split-fixed", "esx"].contains($0) } ?? false }
}

/// Counts calls.
private final class Counter: Sendable {
    private let value = Locked(0)
    func next() -> Int {
        value.withLock { value in
            defer { value += 1 }
            return value
        }
    }
}

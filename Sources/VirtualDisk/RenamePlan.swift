internal import DiskFormats
internal import DiskImage
internal import DiskStorage
internal import Glibc
internal import SystemPackage

/// What a rename has to do; holds the image's lock as long as it exists.
final class RenamePlan {
    let places: RenamePlaces
    /// The files beside the first one, by whole paths.
    let companions: [(old: String, new: String)]
    /// What the first file shall hold, if not what it holds.
    let firstFile: [UInt8]?
    /// The parent as it must be named from the new folder; nil: it need not be named anew.
    private let parent: CreateRequest.ParentDescription?
    private let format: String
    private let hasSeveralFiles: Bool
    private let file: any Storage
    private let opener: ChainOpener

    init(_ places: RenamePlaces, _ options: DiskOptions) throws(DiskError) {
        self.places = places
        opener = ChainOpener(options: options)
        // Whoever uses it has it locked; for writing, so that nobody else may have.
        file = try opener.finder.open(places.old, isWritable: true).storage
        let driver = try opener.driver(for: file, path: places.old, mode: .readOnly)
        format = driver.name
        var unlocked = options
        unlocked.locksImages = false
        unlocked.format = format
        let reader = ChainOpener(options: unlocked)
        let backend = try reader.openLayer(driver, file, places.old, .information, shownAs: places.old).backend
        parent = places.movesFolder ? try Self.parent(of: backend, places, unlocked) : nil
        hasSeveralFiles = backend is any MultipleFileBackend
        guard let several = backend as? any MultipleFileBackend else {
            (companions, firstFile) = ([], nil)
            return
        }
        let names: [CompanionFile]
        do throws(DiskError) {
            names = try several.companions(whenNamed: places.newName)
            firstFile = try several.firstFile(whenNamed: places.newName, names, parent: parent)
        } catch {
            throw error.about(places.old)
        }
        companions = names.map { ("\(places.oldFolder)/\($0.name)", "\(places.newFolder)/\($0.newName)") }
        for file in companions { try FileMover.expectFile(file.old) }
        for path in backend.files.dropFirst() where places.movesFolder && path.hasPrefix(places.oldFolder + "/") {
            guard companions.contains(where: { $0.old == path }) else {
                throw DiskError(
                    .unsupported,
                    "names its file \(path) by more than a name, and would not find it from another folder: rename it "
                        + "within its folder, or convert it", image: places.old)
            }
        }
        for file in companions where file.old != file.new {
            let isFree = try !FileMover.exists(file.new)
            let isLeft = try FileMover.isSame(file.old, file.new)
            guard isFree || isLeft else {
                throw DiskError(
                    .refused, "is there already: not overwritten (if a rename that was interrupted left it, remove it)",
                    image: file.new)
            }
        }
    }

    /// The parent as the image must name it from another folder, if it names it relative to its own.
    private static func parent(
        of backend: any ImageBackend, _ places: RenamePlaces, _ options: DiskOptions
    ) throws(DiskError) -> CreateRequest.ParentDescription? {
        guard let link = backend.parentLink, let path = link.paths.first(where: { !$0.hasPrefix("/") }) else {
            return nil
        }
        guard backend is any EditableBackend else {
            throw DiskError(
                .unsupported,
                "names its parent '\(path.printable(limit: 200))', relative to its folder, and the format "
                    + "\(backend.format) cannot change that: it stays in its folder", image: places.old)
        }
        let chain: [Layer]
        do throws(DiskError) {
            chain = try ChainOpener(options: options).open(places.old, mode: .information, withParents: true)
        } catch {
            throw DiskError(
                error.kind,
                "\(error.message): so its parent cannot be named from the new folder; mend that first",
                image: error.image, offset: error.offset, errno: error.errno)
        }
        guard chain.count > 1 else { return nil }
        var description = NewImage.describe(chain[1], for: places.new)
        description.sectorSize = chain.dropFirst().map(\.backend.sectorSize).max() ?? 512
        return description
    }

    func outcome(isContinuation: Bool) -> ImageRename.Outcome {
        ImageRename.Outcome(
            path: places.new, files: [(places.old, places.new)] + companions.filter { $0.old != $0.new },
            isContinuation: isContinuation)
    }

    /// Whether the new image is there as this rename would make it, with the very same other files.
    func isFinished() throws(DiskError) -> Bool {
        guard let firstFile, !companions.isEmpty else { return try FileMover.isSame(places.old, places.new) }
        for file in companions { guard try FileMover.isSame(file.old, file.new) else { return false } }
        let found = try FileStorage(path: places.new, isWritable: false)
        guard try found.length() == UInt64(firstFile.count) else { return false }
        return try found.availableBytes(at: 0, count: firstFile.count, for: .descriptor) == firstFile
    }

    /// Bytes of all files that must be copied, since they go to another file system.
    func bytesToCopy() throws(DiskError) -> UInt64 {
        guard try FileMover.device(places.oldFolder) != FileMover.device(places.newFolder) else { return 0 }
        var sum: UInt64 = firstFile == nil ? try file.length() : 0
        for file in companions { sum += try FileStorage(path: file.old, isWritable: false).length() }
        return sum
    }

    // MARK: - What is inside

    /// So that it is found from the old folder and from the new one.
    func nameParentByWholePath(_ options: DiskOptions) throws(DiskError) {
        guard var description = parent else { return }
        description.path = description.absolutePath
        try apply(description, to: places.old, options)
    }

    /// The first file is where it shall be: its parent is named from there, and what it calls itself is its name.
    func adoptNewPlace(_ options: DiskOptions) throws(DiskError) {
        guard firstFile == nil else { return }
        if let parent { try apply(parent, to: places.new, options) }
        guard hasSeveralFiles else { return }
        // Nobody relies on it: that it cannot be written is no failure.
        var options = options
        (options.locksImages, options.format) = (false, format)
        guard let backend = try? ImageEditor.open(places.new, options: options, for: ImageChanges()),
            let several = backend as? any MultipleFileBackend
        else { return }
        try? several.noteName(places.newName)
        try? backend.close()
    }

    private func apply(
        _ parent: CreateRequest.ParentDescription, to path: String, _ options: DiskOptions
    ) throws(DiskError) {
        var options = options
        (options.locksImages, options.format) = (false, format)
        var changes = ImageChanges()
        changes.parent = .image(parent)
        try ImageEditor.apply(changes, to: path, options: options)
    }
}

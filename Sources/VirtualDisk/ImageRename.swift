internal import DiskFormats
internal import DiskImage
public import DiskStorage
internal import Glibc
internal import SystemPackage

/// Renames or moves an image with all its files.
///
/// Nothing is overwritten, and nothing that is in use is renamed. At any moment the image opens under its old or its
/// new name: the other files get their new names beside the old ones (hard links; on another file system, copies), then
/// the first file gets its new name, in which the image names the others anew, and then the old names go. What was
/// stopped in between is finished by the same call, or it says what to do.
///
/// A parent that the image names by a relative path is named so that it is found from the new folder. Images made over
/// this one are not looked for: they name it as it was called.
public struct ImageRename {
    /// What a rename did.
    public struct Outcome: Sendable {
        /// Where the image is now.
        public let path: String
        /// Its files that have other names, as they were and as they are.
        public let files: [(old: String, new: String)]
        /// Whether only what an earlier call had left was done.
        public let isContinuation: Bool
    }

    let options: DiskOptions
    let control: OperationControl
    /// Called before each step: the tests' way to stop there.
    var beforeStep: (String) throws(DiskError) -> Void = { (_) throws(DiskError) in }
    /// Whether a failure removes what was made.
    var cleansUp = true

    init(options: DiskOptions, control: OperationControl) {
        var options = options
        options.isWritable = false
        (options.overlay, options.cache, options.snapshot) = (nil, nil, nil)
        self.options = options
        self.control = control
    }

    /// Gives the image at `path` another place: a file's name, or a folder that exists.
    @discardableResult
    public static func run(
        _ path: String, to newPath: String, options: DiskOptions = DiskOptions(),
        control: OperationControl = OperationControl()
    ) throws(DiskError) -> Outcome {
        try ImageRename(options: options, control: control).run(path, to: newPath)
    }

    func run(_ path: String, to newPath: String) throws(DiskError) -> Outcome {
        let places = try RenamePlaces(path, newPath)
        guard places.oldExists else {
            if places.newExists, let outcome = try finishRemoval(places) { return outcome }
            throw DiskError(.notFound, "there is no such file", image: path)
        }
        guard places.old != places.new else {
            throw DiskError(.invalidArgument, "has that name already", image: path)
        }
        let plan = try RenamePlan(places, options)
        defer { withExtendedLifetime(plan) {} }
        if places.newExists {
            guard try plan.isFinished() else {
                throw DiskError(
                    .refused,
                    "is there already: not overwritten (if a rename that was interrupted left it, it is whole; then "
                        + "remove one of the two)", image: newPath)
            }
            try removeOld(plan)
            return plan.outcome(isContinuation: true)
        }
        try perform(plan)
        return plan.outcome(isContinuation: false)
    }

    // MARK: - Steps

    private func perform(_ plan: RenamePlan) throws(DiskError) {
        let total = try plan.bytesToCopy()
        if total > 0 { control.begin("copying", total: total) }
        var made: [String] = []
        do throws(DiskError) {
            for file in plan.companions where file.old != file.new {
                try step("place \(file.new)")
                if try FileMover.isSame(file.old, file.new) { continue }  // left by an earlier call
                try FileMover.place(file.old, at: file.new, control)
                made.append(file.new)
            }
            if let bytes = plan.firstFile {
                try step("write \(plan.places.new)")
                try FileMover.create(plan.places.new, bytes, like: plan.places.old)
            } else {
                try plan.nameParentByWholePath(options)
                try step("move \(plan.places.new)")
                try moveFirst(plan)
            }
        } catch {
            if cleansUp { for path in made { unsafe unlink(path) } }
            throw error
        }
        // From here on the image is where it shall be.
        try step("name what it names")
        try plan.adoptNewPlace(options)
        try removeOld(plan)
    }

    private func step(_ name: String) throws(DiskError) {
        try control.checkCancelled()
        try beforeStep(name)
    }

    /// An image that is one file, or whose other files keep their names.
    private func moveFirst(_ plan: RenamePlan) throws(DiskError) {
        if try FileMover.renameWithoutReplacing(plan.places.old, plan.places.new) { return }
        try FileMover.place(plan.places.old, at: plan.places.new, control)
    }

    private func removeOld(_ plan: RenamePlan) throws(DiskError) {
        try beforeStep("remove \(plan.places.old)")
        try FileMover.remove(plan.places.old)
        for file in plan.companions where file.old != file.new {
            try beforeStep("remove \(file.old)")
            try FileMover.remove(file.old)
        }
        try FileMover.flushFolder(plan.places.oldFolder)
    }

    /// The first file has its new name alone already: other files' old names, if there are any, go.
    private func finishRemoval(_ places: RenamePlaces) throws(DiskError) -> Outcome? {
        var removed: [(old: String, new: String)] = []
        let layer = try ChainOpener(options: options).open(places.new, mode: .information, withParents: false)[0]
        guard let backend = layer.backend as? any MultipleFileBackend else { return nil }
        for file in try backend.companions(whenNamed: places.oldName) {
            let (old, new) = ("\(places.oldFolder)/\(file.newName)", "\(places.newFolder)/\(file.name)")
            guard old != new, try FileMover.isSame(old, new) else { continue }
            try FileMover.remove(old)
            removed.append((old, new))
        }
        guard !removed.isEmpty else { return nil }
        try FileMover.flushFolder(places.oldFolder)
        return Outcome(path: places.new, files: removed, isContinuation: true)
    }
}

/// Where an image is and where it shall be: whole paths, with all links in the folders resolved.
struct RenamePlaces {
    let old: String
    let new: String
    let oldFolder: String
    let newFolder: String
    let oldName: String
    let newName: String
    let oldExists: Bool
    let newExists: Bool

    init(_ path: String, _ newPath: String) throws(DiskError) {
        oldName = FilePath(path).lastComponent?.string ?? ""
        oldFolder = FileFinder.realFolder(of: path)
        var status = stat()
        if unsafe stat(newPath, &status) == 0, status.st_mode & S_IFMT == S_IFDIR {
            newName = oldName
            newFolder = FileFinder.realFolder(of: newPath + "/x")
        } else {
            newName = FilePath(newPath).lastComponent?.string ?? ""
            newFolder = FileFinder.realFolder(of: newPath)
            guard !newPath.hasSuffix("/") else {
                throw DiskError(.notFound, "there is no such folder", image: newPath)
            }
        }
        guard !oldName.isEmpty, !newName.isEmpty, newName != "..", newName != "." else {
            throw DiskError(.invalidArgument, "is no name for an image", image: newName.isEmpty ? newPath : newName)
        }
        guard unsafe stat(newFolder, &status) == 0 else {
            throw DiskError(.notFound, "there is no folder \(newFolder)", image: newPath)
        }
        old = "\(oldFolder)/\(oldName)"
        new = "\(newFolder)/\(newName)"
        newExists = unsafe lstat(new, &status) == 0
        oldExists = unsafe lstat(old, &status) == 0
        guard !oldExists || status.st_mode & S_IFMT != S_IFLNK else {
            throw DiskError(.refused, "is a symbolic link: name the file that it leads to", image: path)
        }
        guard !oldExists || status.st_mode & S_IFMT == S_IFREG else {
            throw DiskError(.refused, "is no regular file: not renamed", image: path)
        }
    }

    var movesFolder: Bool { oldFolder != newFolder }
}

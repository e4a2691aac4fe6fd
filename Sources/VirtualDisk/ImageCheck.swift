internal import DiskFormats
public import DiskImage
public import DiskStorage

/// Looks for damage in an image's structure.
public enum ImageCheck {
    /// Checks the image at `path` alone; with `repair`, puts right what can be. Nothing else may have it open for
    /// writing, and for a repair nothing else may have it open at all.
    public static func run(
        _ path: String, options: DiskOptions = DiskOptions(), repair: Bool = false
    ) throws(DiskError) -> CheckReport {
        let opener = ChainOpener(options: options)
        let mode: OpenMode = repair ? .readWrite : .readOnly
        let file = try opener.finder.open(path, isWritable: repair)
        let path = opener.finder.shownName(path)
        let driver = try opener.driver(for: file.storage, path: path, mode: .readOnly)
        let request = OpenRequest(
            storage: file.storage, path: file.path, mode: mode, cache: opener.cache, companions: opener.finder,
            formatOptions: options.formatOptions)
        do throws(DiskError) {
            var report = try driver.check(request, repair: repair)
            // The files of an image of several are open now, and locked: only what needs it is opened once more.
            if repair, driver.isRelocating, report.remaining(.leak) > 0, try closeHoles(driver, request),
                try driver.check(request, repair: false).counts[.leak] == nil
            {
                report.markRepaired([.leak])
            }
            return report
        } catch {
            throw error.about(path)
        }
    }

    /// What ``run(_:options:repair:)`` with `repair` would answer, with nothing changed: the repair is made in what
    /// seems to be the image's files. What is marked as repaired is what would be.
    ///
    /// - Parameters:
    ///   - path: The image.
    ///   - options: How it is opened.
    ///   - folder: Where files without a name are made for what would be written.
    public static func dryRun(
        _ path: String, options: DiskOptions = DiskOptions(), folder: String = "/tmp"
    ) throws(DiskError) -> CheckReport {
        let opener = ChainOpener(options: options)
        let file = try opener.finder.open(path, isWritable: false)
        let driver = try opener.driver(for: file.storage, path: path, mode: .readOnly)
        do throws(DiskError) {
            let request = OpenRequest(
                storage: try ScratchStorage(file.storage, folder: folder), path: file.path, mode: .readWrite,
                cache: opener.cache, companions: ScratchCompanions(finder: opener.finder, folder: folder),
                formatOptions: options.formatOptions)
            var report = try driver.check(request, repair: true)
            // Blocks are moved into holes; that would be too much to try.
            if driver.isRelocating, report.remaining(.leak) > 0, report.remaining(.loss) == 0 {
                report.markRepaired([.leak])
            }
            return report
        } catch {
            throw error.about(path)
        }
    }

    /// The way to an image's other files, of which none is changed.
    private struct ScratchCompanions: CompanionOpener {
        let finder: FileFinder
        let folder: String

        func openCompanion(
            _ name: String, of imagePath: String, isWritable: Bool, what: String
        ) throws(DiskError) -> (storage: any Storage, path: String) {
            let file = try finder.openCompanion(name, of: imagePath, isWritable: false, what: what)
            guard isWritable else { return file }
            return (try ScratchStorage(file.storage, folder: folder), file.path)
        }

        func createCompanion(
            _ name: String, of imagePath: String
        ) throws(DiskError) -> (storage: any Storage, path: String) {
            throw DiskError(.unsupported, "a repair that makes files cannot be tried", image: imagePath)
        }

        func removeCompanion(_ name: String, of imagePath: String) {}
    }

    /// Moves the last blocks of an image's file into holes of it, where the format can; answers whether it can.
    private static func closeHoles(_ driver: any ImageDriver, _ request: OpenRequest) throws(DiskError) -> Bool {
        guard let backend = try driver.open(request) as? any RelocatingBackend else { return false }
        backend.allowRelocation()
        let disk = Disk(
            chain: Chain(topFirst: [Layer(backend, path: request.path)], isWritable: true), cache: request.cache,
            isWritable: true, lazyFlushInterval: 0)
        try disk.close()
        return true
    }
}

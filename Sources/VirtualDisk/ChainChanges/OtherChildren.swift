internal import DiskFormats
internal import DiskImage
internal import DiskStorage

/// Looks for images that were made over one that is about to change or to go away, and that are not told: they would
/// show other bytes afterwards, or none.
struct OtherChildren {
    private let layers: [Layer]
    private let endangered: Set<Int>
    private let known: Set<FileIdentity>
    private let identities: [FileIdentity?]
    private let options: DiskOptions

    /// - Parameter layers: The chain, the top image first.
    /// - Parameter endangered: Which of them change or go away.
    /// - Parameter other: A child that is not looked for.
    init(
        of endangered: Set<Int>, in layers: [Layer], but other: FileIdentity? = nil, _ options: DiskOptions
    ) throws(DiskError) {
        self.layers = layers
        self.endangered = endangered
        var quiet = options
        quiet.locksImages = false
        quiet.format = nil
        self.options = quiet
        let finder = FileFinder()
        var identities: [FileIdentity?] = []
        var known: Set<FileIdentity> = other.map { [$0] } ?? []
        for layer in layers {
            identities.append(try finder.file(at: layer.backend.files.first ?? layer.path)?.identity)
            for path in layer.backend.files {
                if let file = try finder.file(at: path) { known.insert(file.identity) }
            }
        }
        self.identities = identities
        self.known = known
    }

    /// Throws `DiskError.Kind.refused` if there is one in the folders of the endangered images.
    func refuse(_ what: String) throws(DiskError) {
        let opener = ChainOpener(options: options)
        var seen: Set<String> = []
        for index in endangered.sorted() {
            let path = layers[index].backend.files.first ?? layers[index].path
            for neighbour in opener.finder.neighbours(of: path) where seen.insert(neighbour).inserted {
                guard let file = try opener.finder.file(at: neighbour), !known.contains(file.identity),
                    let parent = parent(of: neighbour, opener)
                else { continue }
                throw DiskError(
                    .refused,
                    "is made over \(layers[parent].path), which \(what): name the top image of its chain, merge or "
                        + "rebase it first, or say --force if it is not needed any more", image: neighbour)
            }
        }
    }

    /// Which of the endangered images is the parent of the image in a file; nil: none, or it is no image.
    private func parent(of path: String, _ opener: ChainOpener) -> Int? {
        guard let file = try? opener.finder.open(path, isWritable: false),
            let driver = try? Formats.all.probe(file.storage),
            let layer = try? opener.openLayer(driver, file.storage, file.path, .information, shownAs: path),
            let link = layer.backend.parentLink
        else { return nil }
        if link.paths.isEmpty || opener.finder.parentIdentity(link.paths, of: file.path) == nil {
            return endangered.first { link.matches(layers[$0].backend.identity) }
        }
        let found = opener.finder.parentIdentity(link.paths, of: file.path)
        return endangered.first { identities[$0] == found }
    }
}

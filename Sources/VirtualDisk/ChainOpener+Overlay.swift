internal import DiskFormats
internal import DiskImage
internal import DiskStorage

extension ChainOpener {
    /// Opens the overlay over an image, making it if there is none yet. One that does not come about leaves no file.
    func open(_ overlay: DiskOverlay, over parent: Layer) throws(DiskError) -> Layer {
        switch overlay {
        case .temporary(let folder): return try openTemporary(in: folder, over: parent)
        case .file(let path): return try openFile(path, over: parent)
        }
    }

    private func openTemporary(in folder: String, over parent: Layer) throws(DiskError) -> Layer {
        let file = try FileStorage(temporaryIn: folder)
        let storage = options.wrapStorage?(file) ?? file
        let name = "overlay in \(folder)"
        do throws(DiskError) {
            try OverlayDriver().initialize(storage, request(name, over: parent))
            return try openLayer(OverlayDriver(), storage, name, .readWrite, shownAs: name)
        } catch {
            throw error.about(name)
        }
    }

    private func openFile(_ path: String, over parent: Layer) throws(DiskError) -> Layer {
        do throws(DiskError) {
            if try !finder.exists(path) {
                // Like a copy of the image: nobody may read it who may not read that.
                try OverlayDriver().initialize(finder.create(path), request(path, over: parent))
            }
            let file = try finder.open(path, isWritable: true)
            guard try OverlayDriver().probe(ProbedFile(file.storage)) == .certain else {
                throw DiskError(
                    .invalidArgument, "is there already and is no overlay: name another file", image: path)
            }
            let layer = try openLayer(OverlayDriver(), file.storage, file.path, .readWrite, shownAs: path)
            try layer.backend.checkLink(to: parent.backend)
            return layer
        } catch {
            finder.removeCreated()
            throw error.about(path)
        }
    }

    private func request(_ path: String, over parent: Layer) -> CreateRequest {
        CreateRequest(
            path: path, virtualSize: NewImage.wholeSectors(parent.backend.virtualSize),
            parent: NewImage.describe(parent, for: path))
    }
}

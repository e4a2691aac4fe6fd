internal import DiskImage
internal import DiskStorage

/// A chain whose images are opened to be changed: some for writing, the others to be read, all locked so that nobody
/// else changes them meanwhile.
struct OpenedChain {
    /// The images, the top one first.
    let layers: [Layer]
    let opener: ChainOpener

    /// Opens the image at `path` and those below it. What children compare stays as it is, whatever is written.
    ///
    /// - Parameter writable: Which are opened for writing, counted from the top.
    init(_ path: String, _ options: DiskOptions, writable: Set<Int>, withParents: Bool = true) throws(DiskError) {
        var opener = ChainOpener(options: options)
        opener.writableLayers = writable
        opener.keepsIdentity = true
        layers = try opener.open(path, mode: writable.contains(0) ? .readWrite : .readOnly, withParents: withParents)
        self.opener = opener
        for index in layers.indices where writable.contains(index) {
            do throws(DiskError) {
                try layers[index].backend.prepareForUse()
            } catch {
                throw error.about(layers[index].path)
            }
        }
    }

    /// The image as one that can be changed.
    func editable(_ index: Int, to what: String) throws(DiskError) -> any EditableBackend {
        guard let backend = layers[index].backend as? any EditableBackend else {
            throw DiskError(
                .unsupported, "the format \(layers[index].backend.format) cannot \(what)", image: layers[index].path)
        }
        return backend
    }

    /// The images from `index` down as a chain; nil if there are none.
    func chain(from index: Int, isWritable: Bool = false) -> Chain? {
        index < layers.count ? Chain(topFirst: Array(layers[index...]), isWritable: isWritable) : nil
    }

    /// Runs `body`, closes all images, and gives their locks back: `afterwards` runs before that.
    func use(
        _ body: () throws(DiskError) -> Void, beforeUnlocking afterwards: () throws(DiskError) -> Void = {}
    ) throws(DiskError) {
        var failure: DiskError?
        do throws(DiskError) { try body() } catch { failure = error }
        for layer in layers {
            do throws(DiskError) { try layer.backend.close() } catch { failure = failure ?? error.about(layer.path) }
        }
        if failure == nil {
            do throws(DiskError) { try afterwards() } catch { failure = error }
        }
        for layer in layers { layer.unlock() }
        if let failure { throw failure }
    }
}

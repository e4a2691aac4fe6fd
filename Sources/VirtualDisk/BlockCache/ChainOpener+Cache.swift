internal import DiskStorage

extension ChainOpener {
    /// The chain of these images, the top one first, with a block cache if one is wanted and can be had.
    ///
    /// - Parameter files: All files of the images that are not written: those below the top one, or below an overlay,
    ///   or all.
    func makeChain(_ layers: [Layer], _ files: ArraySlice<OpenedFile>) throws(DiskError) -> Chain {
        guard let wanted = options.cache else {
            return Chain(
                topFirst: layers, isWritable: options.isWritable || options.overlay != nil, policy: options.writePolicy)
        }
        let firstCached = options.isWritable || options.overlay != nil ? 1 : 0
        let cached = layers[firstCached...]
        guard !cached.isEmpty else {
            wanted.report(
                CacheNotice(
                    isWarning: false,
                    text: "\(wanted.path): not used: only images that are not written are cached, "
                        + "and there is none below \(layers[0].path)"))
            return Chain(
                topFirst: layers, isWritable: options.isWritable || options.overlay != nil, policy: options.writePolicy)
        }
        let identity = CacheIdentity(cached, files, options)
        let source = Chain(topFirst: Array(cached))
        let cache = try BlockCache.open(wanted, self, source: source, identity: identity)
        return Chain(
            topFirst: layers, cache: cache, firstCached: firstCached,
            isWritable: options.isWritable || options.overlay != nil, policy: options.writePolicy)
    }
}

internal import DiskImage
public import DiskStorage

/// Merging images of an open disk, which others may read and write meanwhile.
extension Disk {
    /// Merges one image of the disk into another: ``ChainMerge``, on an open disk. Requests go on; they wait for the
    /// region that is being copied, and at the end for the moment in which the images change places.
    ///
    /// Where the top image is merged downwards while it is written to, what is written is copied again, until little
    /// enough is left to be copied while requests wait.
    ///
    /// On `DiskError.Kind.cancelled` and every other error the disk goes on with the images that it had.
    ///
    /// Of a disk with an overlay the images below it are merged. `DiskError.Kind.unsupported` for the overlay itself,
    /// and where what an overlay with a name records of the image below it would not be true any more.
    ///
    /// - Parameters:
    ///   - source: The number of the image whose blocks are copied; the top image is 0.
    ///   - target: The number of the image that gets them.
    ///   - keepsFiles: Whether the files of images that are not part of the disk any more stay.
    ///   - control: Progress and cancellation.
    ///   - whenDetached: Called when the images have changed places, before any request goes on: nothing was written
    ///     yet that the images which are not part of the disk any more could be read over.
    public func merge(
        _ source: Int, into target: Int, keepsFiles: Bool = false, control: OperationControl = OperationControl(),
        whenDetached: () -> Void = {}
    ) throws(DiskError) -> ChainMerge.Outcome {
        try checkChangeable(withOverlay: true)
        var outcome: ChainMerge.Outcome?
        try changing.withLock { (_) throws(DiskError) in
            let merge = try LiveMerge(self, source, target)
            try merge.check()
            outcome = try merge.run(control, keepsFiles: keepsFiles, whenDetached)
        }
        guard let outcome else { preconditionFailure("a merge that did not fail has an outcome") }
        return outcome
    }
}

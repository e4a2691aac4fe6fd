internal import DiskImage
internal import DiskStorage

extension VMDKDriver: StreamingDriver {
    /// A streamOptimized image.
    func makeStream(
        _ request: CreateRequest, sink: @escaping (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) -> any ImageStreamWriter {
        var request = request
        request.variant = "stream"
        let creator = try VMDKCreator(request, NoCompanions())
        return VMDKStream(
            try VMDKStreamWriter(descriptor: try creator.streamDescriptor(), sink: sink))
    }
}

/// A streamOptimized image under way.
private final class VMDKStream: ImageStreamWriter {
    private let writer: VMDKStreamWriter
    init(_ writer: VMDKStreamWriter) { self.writer = writer }

    var blockSize: UInt64 { UInt64(writer.grainByteCount) }
    func write(block: UInt64, _ bytes: IOBytes) throws(DiskError) { try writer.writeGrain(block, bytes) }
    func finish() throws(DiskError) { try writer.finish() }
}

/// A stream is one file.
private struct NoCompanions: CompanionOpener {
    func openCompanion(
        _ name: String, of imagePath: String, isWritable: Bool, what: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        preconditionFailure("a stream opens no other file")
    }

    func createCompanion(
        _ name: String, of imagePath: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        preconditionFailure("a stream creates no other file")
    }
}

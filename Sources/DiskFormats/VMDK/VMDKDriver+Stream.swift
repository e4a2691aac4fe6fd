internal import DiskImage
internal import DiskStorage

extension VMDKDriver: StreamingDriver, CompressingDriver {
    /// A streamOptimized image.
    func makeStream(
        _ request: CreateRequest, sink: @escaping (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) -> any ImageStreamWriter {
        guard request.parent == nil else {
            throw DiskError(.unsupported, "a streamOptimized image has no parent")
        }
        let grainByteCount = VMDKStreamWriter.usualGrainSectors * 512
        guard request.blockSize == nil || request.blockSize == grainByteCount else {
            throw DiskError(.unsupported, "a streamOptimized image is made with grains of \(grainByteCount) bytes")
        }
        var request = request
        request.variant = "stream"
        let creator = try VMDKCreator(request, NoCompanions())
        return VMDKStream(
            try VMDKStreamWriter(descriptor: try creator.streamDescriptor(), sink: sink))
    }

    func makeCompressedImage(
        _ request: CreateRequest, companions: any CompanionOpener
    ) throws(DiskError) -> any ImageStreamWriter {
        guard isCompressed(variant: request.variant ?? "stream") else {
            throw DiskError(.unsupported, "of the variants of VMDK only stream has compressed grains")
        }
        let name = String(request.path.split(separator: "/").last ?? "")
        let file = try companions.createCompanion(name, of: request.path).storage
        var position: UInt64 = 0
        return try makeStream(request) { (bytes) throws(DiskError) in
            try file.write(bytes, at: position, for: .guestData)
            position += UInt64(bytes.count)
        }
    }

    func isCompressed(variant: String?) -> Bool {
        variant.map { ["stream", "streamoptimized"].contains($0.lowercased()) } ?? false
    }
}

/// A streamOptimized image under way.
private final class VMDKStream: ImageStreamWriter {
    private let writer: VMDKStreamWriter
    init(_ writer: VMDKStreamWriter) { self.writer = writer }

    var blockSize: UInt64 { UInt64(writer.grainByteCount) }
    func makeEncoder() throws(DiskError) -> any BlockEncoder {
        VMDKGrainEncoder(try Deflate.Compressor(), grainByteCount: writer.grainByteCount)
    }
    func write(block: UInt64, _ encoded: EncodedBlock) throws(DiskError) {
        switch encoded {
        case .compressed(let bytes): try writer.writeCompressedGrain(block, bytes)
        case .plain(let bytes): try writer.writeGrain(block, bytes)
        }
    }
    func finish() throws(DiskError) { try writer.finish() }
}

/// Grains are zlib streams, whatever becomes of them.
private final class VMDKGrainEncoder: BlockEncoder {
    private let compressor: Deflate.Compressor
    let bound: Int

    init(_ compressor: Deflate.Compressor, grainByteCount: Int) {
        self.compressor = compressor
        bound = compressor.zlibBound(grainByteCount)
    }

    func encode(_ bytes: IOBytes, into output: IOBuffer) throws(DiskError) -> Int? {
        compressor.deflateZlib(bytes, into: output)
    }
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

    func removeCompanion(_ name: String, of imagePath: String) throws(DiskError) {
        preconditionFailure("a stream has no other file")
    }
}

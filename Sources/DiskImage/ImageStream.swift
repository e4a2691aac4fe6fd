public import DiskStorage

/// An image that is written once, from its first block to its last.
///
/// Blocks are encoded by any number of threads (``BlockEncoder``), and handed over by one at a time, in order.
public protocol ImageStreamWriter: AnyObject {
    /// The bytes of a block.
    var blockSize: UInt64 { get }
    /// Makes what encodes blocks for this image; used by one thread at a time.
    func makeEncoder() throws(DiskError) -> any BlockEncoder
    /// Writes a block, as an encoder has made it; their numbers ascend, and those that are left out read as zeros.
    func write(block: UInt64, _ encoded: EncodedBlock) throws(DiskError)
    /// Writes what makes it an image. No call follows.
    func finish() throws(DiskError)
}

/// A block as it is to be stored.
public enum EncodedBlock {
    /// Compressed.
    case compressed(IOBytes)
    /// As it is, all its bytes.
    case plain(IOBytes)
}

/// Compresses the blocks of an image.
public protocol BlockEncoder: AnyObject {
    /// The most bytes that a block takes.
    var bound: Int { get }
    /// Compresses a whole block into `output`, which has room for ``bound`` bytes, and answers how many it took; nil:
    /// it is better stored as it is.
    func encode(_ bytes: IOBytes, into output: IOBuffer) throws(DiskError) -> Int?
}

/// A driver whose format can be written to somewhere that cannot go back: a pipe, a socket.
public protocol StreamingDriver: ImageDriver {
    /// Begins an image as the request describes it; its bytes go to `sink`, in order. The path of the request is
    /// only a name to record.
    func makeStream(
        _ request: CreateRequest, sink: @escaping (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) -> any ImageStreamWriter
}

/// A driver that makes images of compressed blocks.
public protocol CompressingDriver: ImageDriver {
    /// Creates the file of an image as the request describes it, with nothing in it that could be taken for an image
    /// until ``ImageStreamWriter/finish()``.
    func makeCompressedImage(
        _ request: CreateRequest, companions: any CompanionOpener
    ) throws(DiskError) -> any ImageStreamWriter
    /// Whether all images of that variant have compressed blocks.
    func isCompressed(variant: String?) -> Bool
}

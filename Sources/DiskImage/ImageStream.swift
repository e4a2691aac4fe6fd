public import DiskStorage

/// An image that is written once, from its first block to its last, to somewhere that cannot go back: a pipe, a socket.
public protocol ImageStreamWriter: AnyObject {
    /// The bytes of a block.
    var blockSize: UInt64 { get }
    /// Writes a block; their numbers ascend, and those that are left out read as zeros. The last one of the disk may be
    /// short.
    func write(block: UInt64, _ bytes: IOBytes) throws(DiskError)
    /// Writes what makes it an image. No call follows.
    func finish() throws(DiskError)
}

/// A driver whose format can be written as a stream.
public protocol StreamingDriver: ImageDriver {
    /// Begins an image as the request describes it; its bytes go to `sink`, in order. The path of the request is
    /// only a name to record.
    func makeStream(
        _ request: CreateRequest, sink: @escaping (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) -> any ImageStreamWriter
}

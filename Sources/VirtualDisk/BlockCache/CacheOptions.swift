/// A persistent block cache between the top image and those below it.
public struct CacheOptions: Sendable {
    /// The cache's file (a VCI), which is made if there is none.
    public var path: String
    /// Bytes of a file that is made; nil: ``defaultSize``. One that is there keeps its size.
    public var size: UInt64?
    /// Takes what a user should know of the cache, from any thread. The disk goes on in any case.
    public var report: @Sendable (CacheNotice) -> Void

    /// 10 GiB
    public static let defaultSize: UInt64 = 10 << 30

    /// What bytes a file can have.
    public static let sizes: ClosedRange<UInt64> = 2 << 20...512 << 30

    public init(
        path: String, size: UInt64? = nil, report: @escaping @Sendable (CacheNotice) -> Void = { _ in }
    ) {
        self.path = path
        self.size = size
        self.report = report
    }
}

/// What became of a block cache.
public struct CacheNotice: Sendable {
    /// Whether something is wrong, and not merely as it can be.
    public let isWarning: Bool
    /// One line, with the file's name.
    public let text: String
}

/// What a block cache has been good for since its disk was opened.
public struct CacheUse: Sendable, Equatable {
    /// Bytes that were asked for and answered by the cache.
    public var hitBytes: UInt64
    /// Bytes that were asked for and read from the images.
    public var missBytes: UInt64
    /// Bytes of the disk that it holds.
    public var cachedBytes: UInt64
    /// Bytes that it can hold.
    public var capacity: UInt64
}

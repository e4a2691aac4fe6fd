public import DiskImage
public import DiskStorage

/// Scratch overlays: what was written over an image of any format, kept apart from it.
public struct OverlayDriver: ImageDriver {
    public let name = "overlay"
    public let title = "vdmount scratch overlay"
    public let fileExtensions = ["overlay"]
    public let capabilities: FormatCapabilities = [
        .read, .write, .createDynamic, .differencing, .discard, .check, .compact, .uuids,
    ]
    public let variants = [FormatVariant("dynamic", "grows with what is written")]

    public init() {}

    public func probe(_ file: ProbedFile) -> ProbeResult { OverlayHeader.hasMagic(file.head) ? .certain : .no }

    public func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend { try OverlayImage(request) }

    public func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        let name = String(request.path.split(separator: "/").last ?? "")
        let header = try Self.header(request)
        let file = try companions.createCompanion(name, of: request.path)
        try Self.write(header, to: file.storage)
    }

    /// Makes an empty file an overlay, as ``create(_:companions:)`` does with a new one.
    public func initialize(_ storage: any Storage, _ request: CreateRequest) throws(DiskError) {
        try Self.write(Self.header(request), to: storage)
    }

    private static func write(_ header: OverlayHeader, to storage: any Storage) throws(DiskError) {
        try storage.setLength(header.dataOffset)
        try storage.write(header.encode(), at: 0, for: .header)
        try storage.flush()
    }

    private static func header(_ request: CreateRequest) throws(DiskError) -> OverlayHeader {
        guard let parent = request.parent else {
            throw DiskError(.invalidArgument, "an overlay needs an image that it lies over", image: request.path)
        }
        guard request.comment == nil, request.options.isEmpty, [nil, "dynamic"].contains(request.variant) else {
            throw DiskError(.unsupported, "an overlay has no comment, options or variants", image: request.path)
        }
        let blockSize = request.blockSize ?? 64 << 10
        let shift = UInt64(blockSize.trailingZeroBitCount)
        guard blockSize.isPowerOfTwo, OverlayHeader.blockShifts.contains(shift) else {
            throw DiskError(
                .invalidArgument, "an overlay's blocks have 4K to 2M, a power of two, not \(blockSize) bytes",
                image: request.path)
        }
        guard request.virtualSize % 512 == 0, request.virtualSize <= OverlayHeader.sizeLimit else {
            throw DiskError(
                .invalidArgument, "the size must be a multiple of 512 bytes, at most 256T", image: request.path)
        }
        return OverlayHeader(
            virtualSize: request.virtualSize, blockShift: shift, uuid: request.uuid ?? .random(),
            parent: try OverlayHeader.Parent(parent, of: request.path))
    }

    public func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport {
        var check = OverlayCheck(try OverlayImage(request), file: request.path, isRepairing: repair)
        return try check.run()
    }
}

internal import DiskImage
internal import DiskStorage

/// The kinds of VDI that can be created, by the names they have in commands; the usual one first.
enum VDIVariant: String, CaseIterable, Sendable {
    case dynamic
    case fixed
    case zeroExpand = "zero-expand"

    var summary: String {
        switch self {
        case .dynamic: "grows with what is written"
        case .fixed: "all blocks are there from the beginning"
        case .zeroExpand: "grows, and fills each new block with zeros, so that its space is taken as a whole"
        }
    }
}

/// What a creation was asked for beside size and place, checked.
struct VDICreateOptions {
    /// What the block map and the blocks are aligned to in the file, in bytes.
    var alignment: UInt64 = 1 << 20
    /// Whether a fixed image takes its space at once.
    var preallocates = true

    static let names = ["alignment", "preallocation"]

    init(_ request: CreateRequest, _ variant: VDIVariant) throws(DiskError) {
        for (name, value) in request.options.sorted(by: { $0.key < $1.key }) {
            switch name {
            case "alignment":
                guard let bytes = UInt64(value), bytes.isPowerOfTwo, (512...64 << 20).contains(bytes) else {
                    throw DiskError(
                        .invalidArgument,
                        "the option alignment=\(value) cannot be: it is a number of bytes, a power of two from 512 to "
                            + "64 MiB")
                }
                alignment = bytes
            case "preallocation":
                guard variant == .fixed else {
                    throw DiskError(.invalidArgument, "the option 'preallocation' belongs to the variant fixed")
                }
                guard ["full", "off"].contains(value) else {
                    throw DiskError(
                        .invalidArgument, "the option preallocation=\(value) cannot be: it is full or off")
                }
                preallocates = value == "full"
            default:
                throw DiskError(
                    .invalidArgument,
                    "VDI has no option '\(name)'; there are \(Self.names.joined(separator: ", "))")
            }
        }
    }
}

extension VDIDriver {
    /// Bytes of a block where nobody asks for another.
    static let usualBlockSize: UInt64 = 1 << 20
    /// Bytes of a new image's block.
    private static let blockSizes: ClosedRange<UInt64> = 4096...256 << 20

    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
        let name = String(request.path.split(separator: "/").last ?? "")
        let variant = try Self.variant(request)
        let options = try VDICreateOptions(request, variant)
        let header = try Self.header(request, variant, options)
        let storage = try companions.createCompanion(name, of: request.path).storage
        let isFixed = variant == .fixed
        let length = header.blocksOffset + (isFixed ? header.blockCount * header.stride : 0)
        if isFixed, options.preallocates { try storage.allocate(length) } else { try storage.setLength(length) }
        try Self.writeMap(header, to: storage)
        // The header comes last: without it, the file is no image.
        try storage.flush()
        try storage.write(header.encode(), at: 0, for: .header)
        try storage.flush()
    }

    private static func variant(_ request: CreateRequest) throws(DiskError) -> VDIVariant {
        guard let name = request.variant?.lowercased() else { return .dynamic }
        guard let variant = VDIVariant(rawValue: name) else {
            let known = VDIVariant.allCases.map(\.rawValue).joined(separator: ", ")
            throw DiskError(.invalidArgument, "VDI has no variant '\(name)'; there are \(known)")
        }
        guard request.parent == nil || variant != .fixed else {
            throw DiskError(.invalidArgument, "a fixed VDI holds all its blocks itself, and can have no parent")
        }
        return variant
    }

    private static func header(
        _ request: CreateRequest, _ variant: VDIVariant, _ options: VDICreateOptions
    ) throws(DiskError) -> VDIHeader {
        let size = request.virtualSize
        guard size % 512 == 0 else {
            throw DiskError(.invalidArgument, "the size must be a multiple of 512 bytes, not \(size)")
        }
        let blockSize = request.blockSize ?? usualBlockSize
        guard blockSize.isPowerOfTwo, blockSizes.contains(blockSize) else {
            throw DiskError(
                .invalidArgument, "a VDI's blocks have 4K to 256M, a power of two, not \(blockSize) bytes")
        }
        let blockCount = size.dividedRoundingUp(by: blockSize)
        guard blockCount <= VDIHeader.blockLimit else {
            throw DiskError(
                .invalidArgument,
                "a VDI has \(VDIHeader.blockLimit) blocks at most, not \(blockCount): with larger blocks "
                    + "(--block-size) the disk may be larger")
        }
        let comment = request.comment ?? ""
        guard comment.utf8.count < VDIHeader.commentSize, !comment.utf8.contains(0) else {
            throw DiskError(
                .invalidArgument, "a VDI's comment has at most \(VDIHeader.commentSize - 1) bytes of UTF-8")
        }
        let mapOffset = max(512, options.alignment)
        guard let blocksOffset = (mapOffset + blockCount * 4).alignedUp(to: options.alignment) else {
            throw DiskError(.invalidArgument, "the disk is too large")
        }
        var header = VDIHeader(
            type: variant == .fixed ? .fixed : .dynamic, mapOffset: mapOffset, blocksOffset: blocksOffset,
            diskSize: size, blockSize: blockSize, blockCount: blockCount, uuid: request.uuid ?? .random(),
            modificationUUID: .random())
        header.comment = comment
        if variant == .fixed { header.allocatedBlocks = UInt32(truncatingIfNeeded: blockCount) }
        if variant == .zeroExpand { header.flags = VDIHeader.zeroExpand }
        if let parent = request.parent {
            guard let uuid = parent.identity.uuid else {
                throw DiskError(
                    .unsupported,
                    "a VDI names its parent by UUID alone, and \(parent.path) (\(parent.format)) has none")
            }
            header.type = .differencing
            header.parentUUID = uuid
            header.parentModificationUUID = parent.identity.modificationUUID ?? .null
        }
        return header
    }

    private static func writeMap(_ header: VDIHeader, to storage: any Storage) throws(DiskError) {
        let entriesAtOnce: UInt64 = 256 << 10
        var piece = FieldWriter([UInt8](repeating: 0xff, count: Int(min(entriesAtOnce, header.blockCount)) * 4))
        var first: UInt64 = 0
        while first < header.blockCount {
            let count = min(entriesAtOnce, header.blockCount - first)
            if header.type == .fixed {
                for number in 0..<count {
                    piece.littleEndian(UInt32(truncatingIfNeeded: first + number), at: Int(number) * 4)
                }
            }
            try piece.bytes.withIOBytes { (memory) throws(DiskError) in
                try storage.write(memory.slice(0, Int(count) * 4), at: header.mapOffset + first * 4, for: .table)
            }
            first += count
        }
    }
}

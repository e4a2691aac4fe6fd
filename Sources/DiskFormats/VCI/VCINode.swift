public import DiskStorage

/// A piece of the disk that is cached: an entry of a leaf of the tree, 38 bytes, packed.
///
/// VirtualBox's VCI layout.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | address of the node with the previous extent in order of use |
/// | 8 | 8 | address of the node with the next one |
/// | 16 | 1 | flags: 0 |
/// | 17 | 1 | reserved: 0 |
/// | 18 | 8 | first block, in the disk |
/// | 26 | 4 | number of blocks |
/// | 30 | 8 | address of the data in this file |
public struct VCIExtent: Sendable, Equatable {
    static let byteCount = 38

    /// The node of the extent that was used before this one; 0: this is the one that was used longest ago.
    public var previous: UInt64 = 0
    /// The node of the extent that was used after this one; 0: this is the one that was used last.
    public var next: UInt64 = 0
    /// The first block in the disk.
    public var first: UInt64
    /// How many blocks; 0 is no extent.
    public var blocks: UInt32
    /// Where they lie in the file.
    public var address: UInt64

    public init(first: UInt64, blocks: UInt32, address: UInt64) {
        self.first = first
        self.blocks = blocks
        self.address = address
    }

    init(parsing fields: FieldReader, at place: Int) throws(DiskError) {
        previous = try fields.littleEndian(at: place)
        next = try fields.littleEndian(at: place + 8)
        first = try fields.littleEndian(at: place + 18)
        blocks = try fields.littleEndian(at: place + 26)
        address = try fields.littleEndian(at: place + 30)
        let flags: UInt16 = try fields.littleEndian(at: place + 16)
        guard flags == 0 else { throw DiskError(.invalidImage, "an extent's flags are not zero") }
    }

    func encode(into fields: inout FieldWriter, at place: Int) {
        fields.littleEndian(previous, at: place)
        fields.littleEndian(next, at: place + 8)
        fields.littleEndian(first, at: place + 18)
        fields.littleEndian(blocks, at: place + 26)
        fields.littleEndian(address, at: place + 30)
    }
}

/// An entry of an internal node of the tree, 20 bytes, packed.
///
/// VirtualBox's VCI layout.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 8 | first block covered, in the disk |
/// | 8 | 4 | blocks covered: to the end of the child's last extent, at most 2^32 - 1 |
/// | 12 | 8 | address of the child |
public struct VCIBranch: Sendable, Equatable {
    static let byteCount = 20

    public var first: UInt64
    public var blocks: UInt32
    public var child: UInt64

    init(first: UInt64, blocks: UInt32, child: UInt64) {
        self.first = first
        self.blocks = blocks
        self.child = child
    }

    init(parsing fields: FieldReader, at place: Int) throws(DiskError) {
        first = try fields.littleEndian(at: place)
        blocks = try fields.littleEndian(at: place + 8)
        child = try fields.littleEndian(at: place + 12)
    }

    func encode(into fields: inout FieldWriter, at place: Int) {
        fields.littleEndian(first, at: place)
        fields.littleEndian(blocks, at: place + 8)
        fields.littleEndian(child, at: place + 12)
    }
}

/// A node of the tree: 4096 bytes. The first says of which kind it is, 1 internal, 2 leaf; entries follow, and the rest
/// is zeros. A leaf has at most 107, an internal node 204.
public enum VCINode: Sendable, Equatable {
    case branches([VCIBranch])
    case extents([VCIExtent])

    /// Bytes of a node.
    public static let byteCount = 4096
    /// How many blocks that is.
    public static let blocks: UInt64 = 8
    static let branchLimit = (byteCount - 1) / VCIBranch.byteCount
    static let extentLimit = (byteCount - 1) / VCIExtent.byteCount
    private static let branchKind: UInt8 = 1
    private static let extentKind: UInt8 = 2

    /// Takes 4096 bytes apart. An entry without blocks is none, and then all that follows is zeros.
    public init(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        let kind = try fields.byte(at: 0)
        var used = 1
        switch kind {
        case Self.branchKind:
            var branches: [VCIBranch] = []
            while branches.count < Self.branchLimit {
                let branch = try VCIBranch(parsing: fields, at: used)
                if branch.blocks == 0 { break }
                branches.append(branch)
                used += VCIBranch.byteCount
            }
            self = .branches(branches)
        case Self.extentKind:
            var extents: [VCIExtent] = []
            while extents.count < Self.extentLimit {
                let extent = try VCIExtent(parsing: fields, at: used)
                if extent.blocks == 0 { break }
                extents.append(extent)
                used += VCIExtent.byteCount
            }
            self = .extents(extents)
        default: throw DiskError(.invalidImage, "a node of the tree is of kind \(kind); 1 and 2 are known")
        }
        guard bytes[used...].allSatisfy({ $0 == 0 }) else {
            throw DiskError(.invalidImage, "a node of the tree is not zero behind its entries")
        }
    }

    /// The 4096 bytes.
    public func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        switch self {
        case .branches(let branches):
            fields.byte(Self.branchKind, at: 0)
            for (index, branch) in branches.enumerated() {
                branch.encode(into: &fields, at: 1 + index * VCIBranch.byteCount)
            }
        case .extents(let extents):
            fields.byte(Self.extentKind, at: 0)
            for (index, extent) in extents.enumerated() {
                extent.encode(into: &fields, at: 1 + index * VCIExtent.byteCount)
            }
        }
        return fields.bytes
    }
}

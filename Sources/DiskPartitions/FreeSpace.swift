public import DiskStorage

/// A file system that says, believably, which of its blocks are free.
///
/// Of ext2, ext3 and ext4 the block bitmaps are read. A file system is left alone unless its last user closed it
/// cleanly and found no errors, all its features are known, and every checksum that covers what is read is right.
public struct FreeSpace: Sendable {
    /// Where the file system begins in the source, in bytes.
    public let offset: UInt64
    /// How many bytes it has.
    public let length: UInt64
    private let geometry: ExtGeometry

    /// Looks at the partitions of `source`, or at all of it if it has none. `notes` says of each file system that was
    /// left alone why. An error means that the source cannot be read.
    public static func find(
        in source: some SectorSource
    ) throws(DiskError) -> (fileSystems: [FreeSpace], notes: [String]) {
        let table = try PartitionTable.read(from: source)
        var places = table.partitions.map { (name: "partition \($0.number)", range: $0.range) }
        if places.isEmpty { places = [("the disk", 0..<source.size)] }
        var found: [FreeSpace] = []
        var notes: [String] = []
        for place in places {
            let length = place.range.upperBound - place.range.lowerBound
            let kind = try FileSystem.detect(in: source, offset: place.range.lowerBound, length: length)?.kind
            guard let kind, [.ext2, .ext3, .ext4].contains(kind) else {
                notes.append("\(place.name): free space of \(kind?.rawValue ?? "nothing known") is not looked for")
                continue
            }
            do throws(DiskError) {
                let geometry = try ExtGeometry(source, offset: place.range.lowerBound, length: length)
                found.append(FreeSpace(offset: place.range.lowerBound, length: geometry.length, geometry: geometry))
            } catch {
                guard error.kind == .invalidImage || error.kind == .unsupported else { throw error }
                notes.append("\(place.name): its free space stays: \(error.message)")
            }
        }
        return (found, notes)
    }

    /// Calls `body` with runs of free bytes of the source, in ascending order. Whatever is thrown as
    /// ``DiskError/Kind/invalidImage`` says that the file system contradicts itself: what came before is right by its
    /// own checksums, and nothing more should be believed.
    public func forEachFreeRun(
        in source: some SectorSource, _ body: (Range<UInt64>) throws(DiskError) -> Void
    ) throws(DiskError) {
        var reader = ExtFreeSpaceReader(source, geometry)
        try reader.run(body)
    }
}

/// What the superblock of ext2, ext3 or ext4 says about blocks and groups, checked (Linux,
/// Documentation/filesystems/ext4/super.rst), least significant byte first.
///
/// | offset | size | name |
/// |---|---|---|
/// | 4, 336 | 4 | s_blocks_count, low and high |
/// | 20 | 4 | s_first_data_block |
/// | 24, 28 | 4 | s_log_block_size, s_log_cluster_size: log2 of the bytes, less 10 |
/// | 32, 36 | 4 | s_blocks_per_group, s_clusters_per_group |
/// | 40 | 4 | s_inodes_per_group |
/// | 56, 58 | 2 | s_magic, s_state |
/// | 76 | 4 | s_rev_level |
/// | 88 | 2 | s_inode_size |
/// | 92, 96, 100 | 4 | s_feature_compat, s_feature_incompat, s_feature_ro_compat |
/// | 104 | 16 | s_uuid |
/// | 206 | 2 | s_reserved_gdt_blocks |
/// | 254 | 2 | s_desc_size |
/// | 260 | 4 | s_first_meta_bg |
/// | 588 | 8 | s_backup_bgs |
/// | 624 | 4 | s_checksum_seed |
/// | 1020 | 4 | s_checksum |
struct ExtGeometry: Sendable {
    /// Where the file system begins in the source.
    let offset: UInt64
    let blockSize: UInt64
    let blockCount: UInt64
    let firstDataBlock: UInt64
    let blocksPerGroup: UInt64
    let clustersPerGroup: UInt64
    /// Blocks of a cluster.
    let clusterRatio: UInt64
    let inodeTableBlocks: UInt64
    let descriptorSize: UInt64
    let reservedTableBlocks: UInt64
    let firstMetaGroup: UInt64
    let hasMetaGroups: Bool
    let hasSparseSuper: Bool
    /// With sparse_super2, the two groups that have copies.
    let copies: [UInt64]?
    let checksum: Checksum
    /// crc32c of what all checksums begin with, or the UUID's crc16 with gdt_csum.
    let uuid: [UInt8]
    let seed: UInt32

    /// How descriptors and bitmaps are protected.
    enum Checksum: Sendable { case none, descriptors, metadata }

    /// Groups at most: 128 TiB of the usual ones.
    private static let groupLimit: UInt64 = 1 << 20
    /// What is known of s_feature_incompat: filetype, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed,
    /// largedir, inline_data, encrypt, casefold. (Not: recover, journal_dev, dirdata.)
    private static let knownIncompatible: UInt32 = 0x3e7d2
    /// And of s_feature_ro_compat: all to project but for has_snapshot and replica, and verity. (Not: shared_blocks,
    /// orphan_present.)
    private static let knownReadOnly: UInt32 = 0xb77f

    var groupCount: UInt64 { (blockCount - firstDataBlock).dividedRoundingUp(by: blocksPerGroup) }
    var length: UInt64 { blockCount * blockSize }
    var descriptorsPerBlock: UInt64 { blockSize / descriptorSize }

    init(_ source: some SectorSource, offset: UInt64, length: UInt64) throws(DiskError) {
        guard length >= 2048, let fields = try source.fields(at: offset + 1024, count: 1024) else {
            throw DiskError(.invalidImage, "it is too short for a superblock")
        }
        let incompatible: UInt32 = try fields.littleEndian(at: 96)
        let readOnly: UInt32 = try fields.littleEndian(at: 100)
        try Self.checkState(fields, incompatible, readOnly)
        self.offset = offset
        uuid = try fields.bytes(at: 104, count: 16)
        checksum = readOnly & 0x400 != 0 ? .metadata : readOnly & 0x10 != 0 ? .descriptors : .none
        if checksum == .metadata {
            var sum = CRC32C()
            sum.update(try fields.bytes(at: 0, count: 1020))
            guard sum.register == (try fields.littleEndian(at: 1020)) else {
                throw DiskError(.invalidImage, "its superblock's checksum is wrong")
            }
        }
        if incompatible & 0x2000 != 0 {
            seed = try fields.littleEndian(at: 624)
        } else {
            var sum = CRC32C()
            sum.update(uuid)
            seed = sum.register
        }
        let logBlock: UInt32 = try fields.littleEndian(at: 24)
        let logCluster: UInt32 = try fields.littleEndian(at: 28)
        let hasClusters = readOnly & 0x200 != 0
        guard logBlock <= 6, !hasClusters || (logBlock...20).contains(logCluster) else {
            throw DiskError(.invalidImage, "blocks of 2^\(logBlock) KiB there are not")
        }
        blockSize = 1024 << UInt64(logBlock)
        clusterRatio = hasClusters ? 1 << UInt64(logCluster - logBlock) : 1
        let is64Bit = incompatible & 0x80 != 0
        let high: UInt32 = is64Bit ? try fields.littleEndian(at: 336) : 0
        blockCount = UInt64(high) << 32 | UInt64(try fields.littleEndian(at: 4, as: UInt32.self))
        firstDataBlock = UInt64(try fields.littleEndian(at: 20, as: UInt32.self))
        blocksPerGroup = UInt64(try fields.littleEndian(at: 32, as: UInt32.self))
        clustersPerGroup =
            hasClusters ? UInt64(try fields.littleEndian(at: 36, as: UInt32.self)) : blocksPerGroup
        let size: UInt16 = is64Bit ? try fields.littleEndian(at: 254) : 32
        descriptorSize = UInt64(size)
        let inodes = UInt64(try fields.littleEndian(at: 40, as: UInt32.self))
        let revision: UInt32 = try fields.littleEndian(at: 76)
        let inodeSize = revision == 0 ? 128 : UInt64(try fields.littleEndian(at: 88, as: UInt16.self))
        inodeTableBlocks = (inodes * inodeSize).dividedRoundingUp(by: blockSize)
        reservedTableBlocks = UInt64(try fields.littleEndian(at: 206, as: UInt16.self))
        hasMetaGroups = incompatible & 0x10 != 0
        firstMetaGroup = UInt64(try fields.littleEndian(at: 260, as: UInt32.self))
        hasSparseSuper = readOnly & 1 != 0
        let compatible: UInt32 = try fields.littleEndian(at: 92)
        copies =
            compatible & 0x200 == 0
            ? nil
            : [
                UInt64(try fields.littleEndian(at: 588, as: UInt32.self)),
                UInt64(try fields.littleEndian(at: 592, as: UInt32.self)),
            ]
        try checkNumbers(length: length)
    }

    /// Closed cleanly, and by nobody who knows more than this.
    private static func checkState(
        _ fields: FieldReader, _ incompatible: UInt32, _ readOnly: UInt32
    ) throws(DiskError) {
        guard try fields.littleEndian(at: 56, as: UInt16.self) == 0xef53 else {
            throw DiskError(.invalidImage, "it has no superblock")
        }
        guard incompatible & 4 == 0 else {
            throw DiskError(.unsupported, "it was not unmounted: its journal must be replayed first")
        }
        guard try fields.littleEndian(at: 58, as: UInt16.self) & 3 == 1 else {
            throw DiskError(.unsupported, "it is not clean: it is mounted, or has errors ('e2fsck -f' puts that right)")
        }
        let unknown = incompatible & ~knownIncompatible
        let unknownReadOnly = readOnly & ~knownReadOnly
        guard unknown == 0, unknownReadOnly == 0 else {
            throw DiskError(
                .unsupported,
                "it has features that are not known here: incompat 0x\(String(unknown, radix: 16)), "
                    + "ro_compat 0x\(String(unknownReadOnly, radix: 16))")
        }
    }

    private func checkNumbers(length: UInt64) throws(DiskError) {
        let (bytes, overflow) = blockCount.multipliedReportingOverflow(by: blockSize)
        let isSane =
            !overflow && bytes <= length && firstDataBlock <= 1 && blockCount > firstDataBlock && blocksPerGroup > 0
            && clustersPerGroup <= blockSize * 8 && clustersPerGroup % 8 == 0
            && clustersPerGroup * clusterRatio == blocksPerGroup && descriptorSize >= 32
            && descriptorSize.isPowerOfTwo && descriptorSize <= blockSize && inodeTableBlocks <= blockCount
            && groupCount <= Self.groupLimit
        guard isSane else {
            throw DiskError(
                .invalidImage,
                "its superblock contradicts itself: \(blockCount) blocks of \(blockSize) bytes, \(blocksPerGroup) in a "
                    + "group, in \(length) bytes")
        }
    }

    /// The first block of a group.
    func start(of group: UInt64) -> UInt64 { firstDataBlock + group * blocksPerGroup }

    /// The block in which a group's descriptor lies, and where in it.
    func descriptorPlace(_ group: UInt64) -> (block: UInt64, offset: UInt64) {
        let index = group / descriptorsPerBlock
        let inBlock = group % descriptorsPerBlock * descriptorSize
        // Where blocks have 1 KiB, the superblock is block 1 whatever the first data block is.
        let base = blockSize == 1024 ? 1 : firstDataBlock
        guard hasMetaGroups, index >= firstMetaGroup else { return (base + 1 + index, inBlock) }
        let first = index * descriptorsPerBlock
        let isShifted = first == 0 && blockSize == 1024 && firstDataBlock == 0
        return (start(of: first) + (hasCopy(first) ? 1 : 0) + (isShifted ? 1 : 0), inBlock)
    }

    /// Whether a group begins with a copy of the superblock.
    func hasCopy(_ group: UInt64) -> Bool {
        if group == 0 { return true }
        if let copies { return copies.contains(group) }
        if group == 1 || !hasSparseSuper { return true }
        return [UInt64(3), 5, 7].contains { base in
            var power = base
            while power < group { power *= base }
            return power == group
        }
    }

    /// The blocks that superblock and descriptors take at a group's beginning.
    func headBlocks(_ group: UInt64) -> UInt64 {
        let tableBlocks = groupCount.dividedRoundingUp(by: descriptorsPerBlock)
        let isShifted = group == 0 && blockSize == 1024 && firstDataBlock == 0 ? UInt64(1) : 0
        let copy: UInt64 = hasCopy(group) ? 1 : 0
        let meta = group / descriptorsPerBlock
        if hasMetaGroups, meta >= firstMetaGroup {
            // The first, the second and the last group of a meta group have its block of descriptors.
            let inMeta = group % descriptorsPerBlock
            let hasTable = inMeta == 0 || inMeta == 1 || inMeta == descriptorsPerBlock - 1
            return isShifted + copy + (hasTable ? 1 : 0)
        }
        guard copy == 1 else { return 0 }
        return isShifted + 1 + (hasMetaGroups ? min(firstMetaGroup, tableBlocks) : tableBlocks) + reservedTableBlocks
    }
}

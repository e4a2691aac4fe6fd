internal import DiskStorage

/// An entry of the block allocation table: what a payload block is, and where. [MS-VHDX] 2.5.1.
///
/// Bits 0–2 are the state, bits 20–63 the place in the file in MiB (so that the entry without its low 20 bits is the
/// place in bytes), the others reserved.
struct VHDXEntry: Equatable {
    static let stateMask: UInt64 = 7
    static let offsetMask: UInt64 = ~0xf_ffff

    /// [MS-VHDX] 2.5.1.1; 4 and 5 are none.
    enum PayloadState {
        static let notPresent: UInt64 = 0
        static let undefined: UInt64 = 1
        static let zero: UInt64 = 2
        static let unmapped: UInt64 = 3
        static let fullyPresent: UInt64 = 6
        static let partiallyPresent: UInt64 = 7
    }

    /// [MS-VHDX] 2.5.1.2, of the blocks that hold a piece of the sector bitmap.
    enum BitmapState {
        static let notPresent: UInt64 = 0
        static let present: UInt64 = 6
    }

    let rawValue: UInt64

    init(rawValue: UInt64) { self.rawValue = rawValue }

    init(_ state: UInt64, at offset: UInt64 = 0) { rawValue = offset & Self.offsetMask | state }

    @inline(__always) var state: UInt64 { rawValue & Self.stateMask }
    /// The place in the file, in bytes.
    @inline(__always) var offset: UInt64 { rawValue & Self.offsetMask }
    /// Whether the block's bytes are in the file, all or some.
    @inline(__always) var isInFile: Bool { rawValue & 6 == 6 }
}

/// Where entries stand: after each chunk of payload blocks there is one for the piece of the sector bitmap that says
/// what is in these blocks. [MS-VHDX] 2.5. A plain value, for the hot path.
struct VHDXBlockAllocationTable: Sendable {
    /// Sectors that one block of the sector bitmap tells of: its 1 MiB has that many bits.
    static let sectorsPerChunk: UInt64 = 1 << 23
    /// Bytes of a block of the sector bitmap.
    static let bitmapBlockSize: UInt64 = 1 << 20
    static let entrySize: UInt64 = 8

    /// Where the table lies in the file.
    let offset: UInt64
    let blockCount: UInt64
    let isDifferencing: Bool
    /// log2 of a block's bytes.
    let blockShift: UInt64
    /// log2 of the payload blocks of a chunk.
    let chunkShift: UInt64
    /// log2 of a sector's bytes.
    let sectorShift: UInt64

    init(_ metadata: VHDXMetadata, offset: UInt64) {
        self.offset = offset
        isDifferencing = metadata.hasParent
        blockCount = metadata.virtualDiskSize.dividedRoundingUp(by: metadata.blockSize)
        blockShift = UInt64(metadata.blockSize.trailingZeroBitCount)
        sectorShift = UInt64(metadata.logicalSectorSize.trailingZeroBitCount)
        chunkShift = UInt64(Self.sectorsPerChunk.trailingZeroBitCount) + sectorShift - blockShift
    }

    var chunkCount: UInt64 { (blockCount + (1 << chunkShift) - 1) >> chunkShift }
    /// How many entries there are: those of payload blocks, and between them or, in a differencing image, after each
    /// chunk those of bitmap blocks.
    var entryCount: UInt64 {
        isDifferencing ? chunkCount * ((1 << chunkShift) + 1) : index(ofBlock: blockCount - 1) + 1
    }
    var byteCount: UInt64 { entryCount * Self.entrySize }

    @inline(__always)
    func index(ofBlock block: UInt64) -> UInt64 { block &+ block &>> chunkShift }

    /// Where in the file the entry of a payload block stands.
    @inline(__always)
    func place(ofBlock block: UInt64) -> UInt64 { offset &+ index(ofBlock: block) &* Self.entrySize }

    /// Where the entry of the bitmap block stands that tells of a payload block.
    @inline(__always)
    func place(ofBitmapFor block: UInt64) -> UInt64 {
        let chunk = block &>> chunkShift
        return offset &+ ((chunk &+ 1) &<< chunkShift &+ chunk) &* Self.entrySize
    }

    /// Where in its bitmap block the bits of a payload block begin, in bytes.
    @inline(__always)
    func bitmapOffset(ofBlock block: UInt64) -> UInt64 {
        (block & (1 &<< chunkShift &- 1)) &<< (blockShift &- sectorShift &- 3)
    }

    /// The payload block whose entry stands at `place`, or that comes after the bitmap entry there.
    func block(at place: UInt64) -> UInt64 {
        let index = (place - offset) / Self.entrySize
        let chunk = index / (1 << chunkShift + 1)
        return min(blockCount, chunk << chunkShift + min(index - chunk * (1 << chunkShift + 1), 1 << chunkShift))
    }

    /// Whether the entry at `index` is one of a bitmap block.
    func isBitmap(_ index: UInt64) -> Bool { (index + 1) % (1 << chunkShift + 1) == 0 }
}

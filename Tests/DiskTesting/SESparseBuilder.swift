internal import DiskStorage

/// Makes seSparse extents, which no program but ESX writes: from what QEMU's `block/vmdk.c` reads.
public struct SESparseBuilder: Sendable {
    /// What a grain holds.
    public enum Grain: Sendable {
        case data([UInt8])
        /// Unmapped by the guest: zeros.
        case unmapped
        case zero
    }

    /// Bytes of a grain; entries of a grain table.
    public static let grainSize = 4096
    public static let entriesPerTable = 4096

    /// Sectors of the disk.
    public let sectorCount: Int
    /// The grains that are not absent.
    public var grains: [Int: Grain] = [:]
    /// Whether the journal holds what the tables lack.
    public var needsReplay = false

    public init(sectorCount: Int) { self.sectorCount = sectorCount }

    private var tableCount: Int { (sectorCount + 8 * Self.entriesPerTable - 1) / (8 * Self.entriesPerTable) }
    /// Sectors at which the parts lie, and how many sectors they have.
    public var directory: (sector: Int, count: Int) { (8, (tableCount + 63) / 64) }
    public var tables: (sector: Int, count: Int) { (64, tableCount * 64) }
    private var bitmap: (sector: Int, count: Int) { (tables.sector + tables.count, 8) }
    private var backMap: (sector: Int, count: Int) { (bitmap.sector + bitmap.count, 64) }
    public var grainsSector: Int { (backMap.sector + backMap.count + 63) / 64 * 64 }

    /// The whole file. The second half of its grains is stored in reverse, so that numbers and places differ.
    public func encode() -> [UInt8] {
        let stored = grains.filter { if case .data = $0.value { true } else { false } }.keys.sorted()
        let places = Dictionary(
            uniqueKeysWithValues: stored.enumerated().map {
                ($1, $0 < stored.count / 2 ? $0 : stored.count * 3 / 2 - 1 - $0)
            })
        var file = FieldWriter(count: grainsSector * 512 + max(stored.count, 1) * Self.grainSize)
        encodeHeaders(to: &file)
        var tableNumbers: [Int: Int] = [:]
        for (grain, content) in grains.sorted(by: { $0.key < $1.key }) {
            let number = grain / Self.entriesPerTable
            let table = tableNumbers[number] ?? tableCount - 1 - tableNumbers.count
            tableNumbers[number] = table
            file.littleEndian(UInt64(0x1000_0000) << 32 | UInt64(table), at: directory.sector * 512 + number * 8)
            let entry: UInt64
            switch content {
            case .unmapped: entry = 1 << 60
            case .zero: entry = 2 << 60
            case .data(let bytes):
                let place = UInt64(places[grain] ?? 0)
                entry = 3 << 60 | (place & 0xfff) << 48 | place >> 12
                file.bytes(bytes, at: grainsSector * 512 + Int(place) * Self.grainSize)
            }
            file.littleEndian(
                entry, at: tables.sector * 512 + table * 64 * 512 + grain % Self.entriesPerTable * 8)
        }
        return file.bytes
    }

    private func encodeHeaders(to file: inout FieldWriter) {
        file.littleEndian(UInt64(0xcafe_babe), at: 0)
        file.littleEndian(UInt64(0x2_0000_0001), at: 8)
        file.littleEndian(UInt64(sectorCount), at: 16)
        file.littleEndian(UInt64(8), at: 24)
        file.littleEndian(UInt64(64), at: 32)
        let places = [(1, 1), (2, 2), (4, 4), directory, tables, bitmap, backMap, (grainsSector, sectorCount)]
        for (index, place) in places.enumerated() {
            file.littleEndian(UInt64(place.0), at: 80 + index * 16)
            file.littleEndian(UInt64(place.1), at: 88 + index * 16)
        }
        file.littleEndian(UInt64(0xcafe_cafe), at: 512)
        file.littleEndian(UInt64(needsReplay ? 1 : 0), at: 512 + 24)
    }

    /// A descriptor for the extent in `file`.
    public func descriptor(naming file: String) -> String {
        """
        # Disk DescriptorFile
        version=1
        CID=12345678
        parentCID=ffffffff
        createType="seSparse"
        RW \(sectorCount) SESPARSE "\(file)"

        """
    }
}

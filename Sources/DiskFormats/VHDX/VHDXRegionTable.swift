internal import DiskStorage

/// A part of the file with one purpose. [MS-VHDX] 2.2.3.2.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 16 | Guid |
/// | 16 | 8 | FileOffset: a multiple of 1 MiB |
/// | 24 | 4 | Length: bytes, a multiple of 1 MiB |
/// | 28 | 4 | Required: bit 0 |
struct VHDXRegion: Sendable, Equatable {
    static let byteCount = 32
    /// What everything past the header section is aligned to.
    static let alignment: UInt32 = 1 << 20

    let guid: DiskUUID
    let range: Range<UInt64>
    let isRequired: Bool

    init(guid: DiskUUID, range: Range<UInt64>, isRequired: Bool) {
        self.guid = guid
        self.range = range
        self.isRequired = isRequired
    }

    init(parsing fields: FieldReader, at offset: Int) throws(DiskError) {
        guid = try DiskUUID(mixedEndian: fields.bytes(at: offset, count: 16))
        let start: UInt64 = try fields.littleEndian(at: offset + 16)
        let length: UInt32 = try fields.littleEndian(at: offset + 24)
        isRequired = try fields.littleEndian(at: offset + 28, as: UInt32.self) & 1 != 0
        let alignment = UInt64(Self.alignment)
        let (end, overflow) = start.addingReportingOverflow(UInt64(length))
        guard start >= alignment, start % alignment == 0, length > 0, length % Self.alignment == 0, !overflow else {
            throw DiskError(
                .invalidImage,
                "the region \(guid) is said to have \(length) bytes from byte \(start) on; both must be multiples of "
                    + "1 MiB, and not 0")
        }
        range = start..<end
    }
}

/// Which regions there are. [MS-VHDX] 2.2.3.1.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | Signature: `regi` |
/// | 4 | 4 | Checksum: CRC-32C of the 64 KiB, with this field 0 |
/// | 8 | 4 | EntryCount: at most 2047 |
/// | 16 | 32 each | the regions |
struct VHDXRegionTable: Sendable {
    static let byteCount = 64 << 10
    /// Where the two copies lie.
    static let offsets: [UInt64] = [192 << 10, 256 << 10]
    static let entryLimit: UInt32 = 2047
    private static let entriesOffset = 16
    private static let signature: StaticString = "regi"

    /// [MS-VHDX] 2.5.
    static let blockAllocationTable = DiskUUID(known: "2dc27766-f623-4200-9d64-115e9bfd4a08")
    /// [MS-VHDX] 2.6.
    static let metadata = DiskUUID(known: "8b7ca206-4790-4b9a-b8fe-575f050f886e")

    let regions: [VHDXRegion]
    /// The table's bytes, as they belong into both places.
    let bytes: [UInt8]
    /// What is wrong with the other copy, and which one it is.
    private(set) var damage: (index: Int, message: String)?

    init(regions: [VHDXRegion]) {
        self.regions = regions
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes(Self.signature.bytes, at: 0)
        fields.littleEndian(UInt32(regions.count), at: 8)
        for (index, region) in regions.enumerated() {
            let offset = Self.entriesOffset + index * VHDXRegion.byteCount
            fields.bytes(region.guid.mixedEndian, at: offset)
            fields.littleEndian(region.range.lowerBound, at: offset + 16)
            fields.littleEndian(UInt32(region.range.upperBound - region.range.lowerBound), at: offset + 24)
            fields.littleEndian(UInt32(region.isRequired ? 1 : 0), at: offset + 28)
        }
        bytes = VHDXChecksum.set(fields.bytes)
    }

    /// Reads the first copy that is whole.
    init(_ storage: any Storage) throws(DiskError) {
        var copies: [[UInt8]?] = []
        for offset in Self.offsets {
            let bytes = try storage.availableBytes(at: offset, count: Self.byteCount, for: .header)
            let isWhole =
                bytes.count == Self.byteCount && FieldReader(bytes).matches(Self.signature, at: 0)
                && VHDXChecksum.isRight(bytes)
            copies.append(isWhole ? bytes : nil)
        }
        guard let index = copies.firstIndex(where: { $0 != nil }), let bytes = copies[index] else {
            throw DiskError(
                .invalidImage, "both copies of the region table are damaged (their signatures or checksums are wrong)",
                offset: Self.offsets[0])
        }
        self.bytes = bytes
        let other = 1 - index
        if copies[other] == nil {
            damage = (other, "the copy of the region table at byte \(Self.offsets[other]) is damaged")
        } else if copies[other] != bytes {
            damage = (other, "the copy of the region table at byte \(Self.offsets[other]) differs from the first one")
        }
        regions = try Self.regions(FieldReader(bytes))
    }

    private static func regions(_ fields: FieldReader) throws(DiskError) -> [VHDXRegion] {
        let count: UInt32 = try fields.littleEndian(at: 8)
        guard count <= entryLimit else {
            throw DiskError(.invalidImage, "the region table is said to have \(count) entries; \(entryLimit) can be")
        }
        var regions: [VHDXRegion] = []
        for index in 0..<Int(count) {
            let region = try VHDXRegion(parsing: fields, at: entriesOffset + index * VHDXRegion.byteCount)
            if region.isRequired, region.guid != blockAllocationTable, region.guid != metadata {
                throw DiskError(
                    .unsupported, "it needs the region \(region.guid) to be understood, which nobody here knows")
            }
            regions.append(region)
        }
        return regions
    }

    /// The one region of a kind.
    func region(_ guid: DiskUUID, _ what: String) throws(DiskError) -> Range<UInt64> {
        let found = regions.filter { $0.guid == guid }
        guard found.count == 1 else {
            throw DiskError(.invalidImage, "the region table has \(found.count) entries for \(what) instead of one")
        }
        return found[0].range
    }

    /// Regions and log must lie inside the file, none over another.
    func checkPlaces(log: Range<UInt64>, fileLength: UInt64) throws(DiskError) {
        var places = regions.map { (range: $0.range, name: "the region \($0.guid)") }
        places.append((log, "the log"))
        places.sort { $0.range.lowerBound < $1.range.lowerBound }
        for (index, place) in places.enumerated() {
            guard place.range.upperBound <= fileLength else {
                throw DiskError(
                    .invalidImage,
                    "the file is cut short: \(place.name) ends at byte \(place.range.upperBound), the file at "
                        + "\(fileLength)")
            }
            if index > 0, places[index - 1].range.upperBound > place.range.lowerBound {
                throw DiskError(
                    .invalidImage, "\(place.name) lies over \(places[index - 1].name)", offset: place.range.lowerBound)
            }
        }
    }
}

extension DiskUUID {
    /// One that stands in a specification.
    init(known text: String) {
        guard let uuid = DiskUUID(text) else { preconditionFailure("\(text) is no UUID") }
        self = uuid
    }
}

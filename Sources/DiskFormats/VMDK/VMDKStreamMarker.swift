internal import DiskStorage

/// What stands before each piece of a streamOptimized extent, little endian, at the beginning of a sector (VMware
/// Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents").
///
/// | offset | size | name | grain | metadata |
/// |---|---|---|---|---|
/// | 0 | 8 | val | the grain's first sector on the disk | sectors of what follows (some writers: 0) |
/// | 8 | 4 | size | bytes of compressed data | 0 |
/// | 12 | 4 | type | the data begins here | 0 end of stream, 1 grain table, 2 grain directory, 3 footer |
enum VMDKStreamMarker: Equatable, Sendable {
    /// `size` bytes of compressed data follow the marker's first 12 bytes at once.
    case grain(sector: UInt64, size: UInt32)
    case endOfStream
    /// That many sectors follow the marker's own sector.
    case grainTable(sectors: UInt64)
    case grainDirectory(sectors: UInt64)
    case footer(sectors: UInt64)

    /// Bytes of a grain's marker.
    static let grainByteCount = 12
    /// Bytes of any other one: a sector.
    static let metadataByteCount = 512

    /// Parses a marker, of which the first 16 bytes must be there; nil if its type is unknown.
    init?(parsing fields: FieldReader) {
        guard let value = try? fields.littleEndian(at: 0, as: UInt64.self),
            let size = try? fields.littleEndian(at: 8, as: UInt32.self),
            let type = try? fields.littleEndian(at: 12, as: UInt32.self)
        else { return nil }
        if size > 0 {
            self = .grain(sector: value, size: size)
            return
        }
        switch type {
        case 0: self = .endOfStream
        case 1: self = .grainTable(sectors: value)
        case 2: self = .grainDirectory(sectors: value)
        case 3: self = .footer(sectors: value)
        default: return nil
        }
    }

    /// The marker: 12 bytes for a grain, to be followed by its data, and otherwise a sector.
    func encode() -> [UInt8] {
        switch self {
        case .grain(let sector, let size):
            var fields = FieldWriter(count: Self.grainByteCount)
            fields.littleEndian(sector, at: 0)
            fields.littleEndian(size, at: 8)
            return fields.bytes
        case .endOfStream: return Self.metadata(sectors: 0, type: 0)
        case .grainTable(let sectors): return Self.metadata(sectors: sectors, type: 1)
        case .grainDirectory(let sectors): return Self.metadata(sectors: sectors, type: 2)
        case .footer(let sectors): return Self.metadata(sectors: sectors, type: 3)
        }
    }

    private static func metadata(sectors: UInt64, type: UInt32) -> [UInt8] {
        var fields = FieldWriter(count: metadataByteCount)
        fields.littleEndian(sectors, at: 0)
        fields.littleEndian(type, at: 12)
        return fields.bytes
    }
}

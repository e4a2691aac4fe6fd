import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// The header: what is read is what was written, and what cannot be is refused, whatever field it is in.
struct QEDHeaderTests {
    @Test func encodesWhatItParses() throws {
        var header = QEDHeader(clusterSize: 8192, tableSize: 2, imageSize: 5 << 20)
        header.headerSize = 3
        header.features = [.backingFile, .backingFormatNoProbe]
        header.compatFeatures = 0x8000_0000_0000_0001
        header.autoclearFeatures = 0x30
        header.l1TableOffset = 24 << 10
        header.backingFilenameOffset = 20_000
        header.backingFilenameSize = 17
        #expect(try QEDHeader(parsing: header.encode()) == header)
    }

    /// The same bytes as an independent writer makes of the specification's table.
    @Test func bytesAreThoseOfTheSpecification() throws {
        var builder = QEDBuilder(imageSize: 3 << 20, clusterCount: 2)
        builder.features = 2
        builder.compatFeatures = 7
        var header = QEDHeader(clusterSize: 4096, tableSize: 1, imageSize: 3 << 20)
        header.features = .needCheck
        header.compatFeatures = 7
        #expect(header.encode() == Array(builder.encode().prefix(64)))
    }

    @Test func everyGeometryIsRead() throws {
        for clusterShift in 12...26 as ClosedRange<UInt64> {
            for tableShift in 0...4 as ClosedRange<UInt64> {
                let header = QEDHeader(clusterSize: 1 << clusterShift, tableSize: 1 << tableShift, imageSize: 512)
                #expect(try QEDHeader(parsing: header.encode()) == header)
                #expect(header.tableEntries == 1 << (clusterShift + tableShift - 3))
            }
        }
    }

    /// The largest disk of a geometry is read, and one sector more is refused.
    @Test func sizeLimitIsThatOfTheTables() throws {
        #expect(QEDHeader.imageSizeLimit(clusterSize: 4096, tableSize: 1) == 1 << 30)
        #expect(QEDHeader.imageSizeLimit(clusterSize: 65_536, tableSize: 4) == 64 << 40)
        #expect(QEDHeader.imageSizeLimit(clusterSize: 1 << 26, tableSize: 16) == UInt64(Int64.max) & ~511)
        for (cluster, table) in [(4096, 1), (65_536, 4), (1 << 26, 16)] as [(UInt64, UInt64)] {
            let limit = QEDHeader.imageSizeLimit(clusterSize: cluster, tableSize: table)
            let good = QEDHeader(clusterSize: cluster, tableSize: table, imageSize: limit)
            #expect(try QEDHeader(parsing: good.encode()).imageSize == limit)
            let bad = QEDHeader(clusterSize: cluster, tableSize: table, imageSize: limit + 512)
            #expect { try QEDHeader(parsing: bad.encode()) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        }
    }

    @Test(
        arguments: [
            ("magic", 0, 4), ("cluster_size", 4, 4), ("table_size", 8, 4), ("header_size", 12, 4),
            ("image_size", 48, 8),
        ], [0, 3, UInt64.max - 1, .max, 1 << 27])
    func impossibleFieldIsRefused(_ field: (name: String, offset: Int, width: Int), _ value: UInt64) throws {
        // A header's size and a disk's are checked against other things when they are no nonsense by themselves.
        if field.name == "header_size", value != 0 { return }
        if field.name == "image_size", value % 512 == 0, value < 1 << 30 { return }
        let good = QEDHeader(clusterSize: 4096, tableSize: 1, imageSize: 1 << 20).encode()
        var bytes = FieldWriter(good)
        if field.width == 4 {
            bytes.littleEndian(UInt32(truncatingIfNeeded: value), at: field.offset)
        } else {
            bytes.littleEndian(value, at: field.offset)
        }
        #expect { try QEDHeader(parsing: bytes.bytes) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
    }

    @Test func unknownFeatureIsRefusedAndOthersAreNot() throws {
        for bit in 0..<64 as Range<UInt64> {
            var header = QEDHeader(clusterSize: 4096, tableSize: 1, imageSize: 1 << 20)
            header.backingFilenameOffset = 64
            header.backingFilenameSize = 4
            header.features = QEDHeader.Features(rawValue: 1 << bit)
            header.compatFeatures = 1 << bit
            header.autoclearFeatures = 1 << bit
            if bit < 3 {
                #expect(try QEDHeader(parsing: header.encode()) == header)
            } else {
                #expect { try QEDHeader(parsing: header.encode()) } throws: {
                    ($0 as? DiskError)?.kind == .unsupported
                }
            }
        }
    }

    @Test(
        arguments: [(4096, 0), (4095, 2), (UInt32.max, UInt32.max), (0, 4096), (64, 0), (64, 4033)]
            as [(UInt32, UInt32)])
    func backingFilenameMustLieInTheHeader(_ offset: UInt32, _ size: UInt32) throws {
        var header = QEDHeader(clusterSize: 4096, tableSize: 1, imageSize: 1 << 20)
        header.features = .backingFile
        header.backingFilenameOffset = UInt64(offset)
        header.backingFilenameSize = UInt64(size)
        #expect { try QEDHeader(parsing: header.encode()) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        // Without the feature bit the fields mean nothing.
        header.features = []
        #expect(try QEDHeader(parsing: header.encode()) == header)
    }

    @Test func l1TableMustLieInTheFile() throws {
        var header = QEDHeader(clusterSize: 4096, tableSize: 2, imageSize: 1 << 20)
        #expect(throws: Never.self) { try header.checkPlaces(end: 3 * 4096) }
        #expect(throws: DiskError.self) { try header.checkPlaces(end: 3 * 4096 - 1) }
        for offset in [0, 1, 4097, 2 * 4096 + 512, .max, .max & ~4095] as [UInt64] {
            header.l1TableOffset = offset
            #expect(throws: DiskError.self) { try header.checkPlaces(end: 4 * 4096) }
        }
    }
}
